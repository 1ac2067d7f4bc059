"""The interface of a loss function, and the terms that several losses share.

Each loss is one function of type :data:`Loss` in its own file (grpo_loss.py, dpo_loss.py). The table ``LOSSES``
in update.py selects it by ``loss.type``.

Legend: B completions of a micro-batch, T tokens per completion, padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from medvqa_rl.config import LossConfig


class LossInputs(NamedTuple):
    """One micro-batch: log-probabilities of the sampled tokens and the learning signal."""

    logps: Tensor
    """(B, T) under the policy, with gradient."""
    old_logps: Tensor
    """(B, T) under the policy that sampled, without gradient."""
    ref_logps: Tensor | None
    """(B, T) under the reference; None if beta is 0 or no token counts."""
    advantages: Tensor
    """(B,) one per completion. In preference pairs +1 is chosen, -1 rejected and 0 no preference."""
    mask: Tensor
    """(B, T) bool, True at tokens that count in the loss."""
    weights: Tensor | None = None
    """(B, T) importance weights if another engine sampled (mismatch.py)."""


class StepCounts(NamedTuple):
    """Counts over a whole step: all micro-batches of all ranks.

    Losses divide by these, so that the losses of the micro-batches add up to the loss of the step and the gradient
    does not depend on how the step is split.
    """

    num_completions: int = 0
    """Scored completions, including truncated ones that are masked."""
    num_tokens: int = 0
    """Tokens that count in the loss."""
    token_budget: int = 0
    """``num_completions * rollout.max_completion_length``."""
    num_computed_tokens: int = 0
    """Tokens that count in the loss and are in some micro-batch."""
    num_groups: int = 0
    num_skipped: int = 0
    """Groups left out of the micro-batches because their gradient is zero."""
    num_unequal: int = 0
    """Groups with a nonzero advantage; with DPO, the number of preference pairs."""


class LossOutput(NamedTuple):
    """This micro-batch's share of the loss, and per-token values for metrics."""

    loss: Tensor
    """(,) with gradient."""
    kl: Tensor
    """(B, T) estimated divergence from the reference, without gradient; 0 without a reference."""
    is_low_clipped: Tensor
    """(B, T) bool, True where the lower clip bound removed the gradient."""
    is_high_clipped: Tensor
    """(B, T) bool, True where the upper clip bound removed the gradient."""


Loss = Callable[[LossInputs, StepCounts, LossConfig], LossOutput]
"""A loss function."""


def k3_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = log pi_ref - log pi.

    Non-negative, and unbiased under the policy (Schulman, "Approximating KL divergence", 2020).
    """
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def aggregate(per_token: Tensor, mask: Tensor, kind: str, counts: StepCounts) -> Tensor:
    """Average token losses over the step.

    - ``grpo``: mean over each completion's tokens, then over completions (arXiv 2402.03300).
    - ``dr_grpo``: sum over tokens / (num_completions * max_completion_length) (arXiv 2503.20783).
    - ``dapo``: sum over tokens / num_tokens (arXiv 2503.14476).

    Args:
        per_token: (B, T) token losses of one micro-batch.
        mask: (B, T) bool; a completion without any True contributes 0.

    Returns:
        (,) this micro-batch's share of the average.
    """
    sums = torch.where(mask, per_token, 0.0).sum(1)  # (B,)
    if kind == "grpo":
        return (sums / mask.sum(1).clamp(min=1)).sum() / max(counts.num_completions, 1)
    denominator = {"dr_grpo": counts.token_budget, "dapo": counts.num_tokens}[kind]
    return sums.sum() / max(denominator, 1)
