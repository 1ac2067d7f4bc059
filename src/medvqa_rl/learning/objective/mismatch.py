"""Importance sampling correction if vLLM samples: its probabilities differ slightly from those of training.

Completions are sampled from mu, vLLM's computation of the policy, and pi is the same policy as computed by training.
Each token's loss is weighted by pi / mu, truncated from above (``token_truncate`` in TRL 1.16).

Legend: B completions, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.accelerator import Accelerator
from torch import Tensor

from medvqa_rl.core.types import Group


def sampled_logps(groups: Sequence[Group], mask: Tensor) -> Tensor:
    """Return the log-probabilities with which vLLM sampled the completions.

    Args:
        mask: (B, T) bool, True at tokens of the completions.

    Returns:
        (B, T) float32, NaN where unknown.
    """
    rows = [completion.logps for group in groups for completion in group.completions]
    assert None not in rows, "a completion has no sampling log-probabilities"
    flat = torch.tensor([logp for row in rows if row for logp in row], dtype=torch.float32, device=mask.device)
    return torch.full(mask.shape, torch.nan, device=mask.device).masked_scatter(mask, flat)


def importance_weights(logps: Tensor, sampled: Tensor, *, clip_max: float) -> Tensor:
    """Compute min(pi / mu, clip_max) of every token; 1 where mu is unknown.

    Args:
        logps: any shape, log pi under the policy that sampled, without gradient.
        sampled: same shape, log mu; NaN where unknown.
    """
    return torch.exp(torch.nan_to_num(logps - sampled, nan=0.0)).clamp(max=clip_max)


DIFFERENCE = "sampling/sampling_logp_difference"
"""Prefix of the metrics of |log pi - log mu|."""


class Mismatch:
    """Accumulates statistics of the mismatch over the tokens of a step."""

    def __init__(self, device: torch.device) -> None:
        zeros = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums = zeros  # of |log pi - log mu| and of the weights
        self._counts = zeros.clone()  # of tokens with a known mu, and of all that count
        self._largest = torch.full_like(zeros, -torch.inf)  # of either
        self._smallest = torch.full_like(zeros[:1], torch.inf)  # of the weights

    def add(self, logps: Tensor, sampled: Tensor, weights: Tensor, mask: Tensor) -> None:
        """Add a micro-batch. All arguments are (B, T); only tokens in the mask count."""
        known = mask & ~sampled.isnan()
        difference = torch.where(known, (logps - sampled).abs(), 0.0).double()
        counted = torch.where(mask, weights, 0.0).double()
        self._sums += torch.stack([difference.sum(), counted.sum()])
        self._counts += torch.stack([known.sum(), mask.sum()])
        if bool(mask.any()):
            self._largest = torch.maximum(self._largest, torch.stack([difference.max(), counted.max()]))
            self._smallest = torch.minimum(self._smallest, torch.where(mask, weights, torch.inf).min().double())

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the metrics over all ranks under TRL's names; empty if no token counts. A collective call."""
        own = torch.cat([self._sums, self._counts, self._largest, self._smallest])
        ranks = accelerator.gather(own[None])  # (ranks, 7)
        sums, counts = ranks[:, :2].sum(0).tolist(), ranks[:, 2:4].sum(0).tolist()
        if not counts[1]:
            return {}
        largest, smallest = ranks[:, 4:6].amax(0).tolist(), float(ranks[:, 6].min())
        return {
            f"{DIFFERENCE}/mean": sums[0] / max(counts[0], 1.0),
            f"{DIFFERENCE}/max": largest[0],
            "sampling/importance_sampling_ratio/min": smallest,
            "sampling/importance_sampling_ratio/mean": sums[1] / counts[1],
            "sampling/importance_sampling_ratio/max": largest[1],
        }
