"""The interface of a loss function, and the terms that several losses share.

Each loss is one function of type :data:`Loss` in its own file; ``LOSSES`` selects it by ``loss.type``.

Legend: B completions of a micro-batch, T tokens per completion, padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

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
    """(B,) one per completion, or (B, T) one per token. In preference pairs +1 is chosen, -1 rejected and 0 no
    preference."""
    mask: Tensor
    """(B, T) bool, True at tokens that count in the loss."""
    weights: Tensor | None = None
    """(B, T) importance weights if another engine sampled (mismatch.py)."""

    @property
    def token_advantages(self) -> Tensor:
        """(B, 1) or (B, T) advantages in the dtype of the log-probabilities."""
        advantages = self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]
        return advantages.to(self.logps.dtype)


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
    num_top_tokens: int = 0
    """Tokens that count in the loss and belong to the top share by entropy: all of them, if that share is 1."""


class LossOutput(NamedTuple):
    """This micro-batch's share of the loss, and per-token values for metrics."""

    loss: Tensor
    """(,) with gradient."""
    kl: Tensor
    """(B, T) estimated divergence from the reference, without gradient; 0 without a reference."""
    is_low_clipped: Tensor
    """(B, T) bool, True where the lower clip bound removed the gradient."""
    is_high_clipped: Tensor
    """(B, T) bool, True where the upper clip bound removed the gradient or, in CISPO, lowered its weight."""


Loss = Callable[[LossInputs, StepCounts, LossConfig], LossOutput]
"""A loss function."""


def importance_ratios(inputs: LossInputs, level: Literal["token", "sequence"]) -> Tensor:
    """Compute pi / pi_old of each token, or the ratio of its whole sequence (GSPO, arXiv 2507.18071).

    The ratio of a sequence is s = exp(mean over its tokens of log pi - log pi_old), equation 7. It is returned as
    stop_gradient(s) * pi / stop_gradient(pi), equation 14 (GSPO-token): the value at every token is s, and a token's
    gradient is its own, so that advantages and weights may differ between tokens. If they do not, the gradient is that
    of s.

    Returns:
        (B, T) ratios with gradient.
    """
    if level == "token":
        return torch.exp(inputs.logps - inputs.old_logps)
    gaps = torch.where(inputs.mask, inputs.logps - inputs.old_logps, 0.0).detach()
    mean = gaps.sum(1) / inputs.mask.sum(1).clamp(min=1)  # (B,)
    return torch.exp(mean[:, None] + (inputs.logps - inputs.logps.detach()))


def k3_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(policy || reference): exp(d) - d - 1 with d = log pi_ref - log pi.

    Non-negative, and unbiased under the policy (Schulman, "Approximating KL divergence", 2020).
    """
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def penalised(loss: Tensor, inputs: LossInputs, beta: float) -> tuple[Tensor, Tensor]:
    """Multiply the policy's token losses by the importance weights, and add beta * KL, which is not weighted.

    Args:
        loss: (B, T) token losses of the policy.

    Returns:
        (B, T) token losses, and the (B, T) divergence without gradient.
    """
    if inputs.weights is not None:
        loss = loss * inputs.weights
    if inputs.ref_logps is None:
        return loss, torch.zeros_like(loss)
    kl = k3_divergence(inputs.logps, inputs.ref_logps)
    return loss + beta * kl, kl.detach()


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
