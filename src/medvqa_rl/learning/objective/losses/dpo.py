"""Online DPO (arXiv 2402.04792): the preference pairs of a rollout and the loss on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from medvqa_rl.config import LossConfig
from medvqa_rl.core.types import Group
from medvqa_rl.learning.objective.advantages import group_statistics
from medvqa_rl.learning.objective.losses.loss import LossInputs, LossOutput, StepCounts, k3_divergence


def preferences(rewards: Tensor) -> Tensor:
    """Find the best and the worst completion of each group.

    Args:
        rewards: (P, G) rewards; NaN is unscored and never chosen.

    Returns:
        (P, 2) indices, best first; the first index wins ties. -1 if all scored rewards of the group are equal.
    """
    best = torch.where(rewards.isnan(), -torch.inf, rewards).argmax(1)
    worst = torch.where(rewards.isnan(), torch.inf, rewards).argmin(1)
    has_spread = group_statistics(rewards)[1] > 0
    return torch.where(has_spread[:, None], torch.stack([best, worst], dim=1), -1)


def preference_pairs(groups: Sequence[Group], rewards: Tensor) -> tuple[list[Group], Tensor, Tensor]:
    """Reduce each group to its best and worst completion.

    Args:
        groups: P groups of G completions.
        rewards: (P, G) rewards; NaN is unscored.

    Returns:
        The arguments of ``Learner.update``: P groups of two completions, chosen first; their (P, 2) signs, +1 and -1,
        or 0 in groups without a preference, which keep their first two completions; and (P, 2) True.
    """
    indices = preferences(rewards)
    has_pair = indices[:, :1] >= 0
    chosen = torch.where(has_pair, indices, torch.tensor([0, 1])).tolist()
    pairs = [
        replace(group, completions=tuple(group.completions[index] for index in pair))
        for group, pair in zip(groups, chosen, strict=True)
    ]
    signs = torch.tensor([1.0, -1.0]) * has_pair
    return pairs, signs, torch.ones_like(signs, dtype=torch.bool)


def dpo_loss(inputs: LossInputs, counts: StepCounts, config: LossConfig) -> LossOutput:
    """Direct preference optimisation (arXiv 2305.18290, equation 7).

    Mean over pairs of -log sigmoid(beta * (d_chosen - d_rejected)), where d is log pi - log pi_ref summed over a
    completion's tokens. Each pair is two consecutive rows. Nothing is clipped.
    """
    logps, _, ref_logps, signs, mask, _ = inputs
    difference = logps if ref_logps is None else logps - ref_logps  # no reference: no row belongs to a pair
    margins = (signs.to(logps.dtype) * torch.where(mask, difference, 0.0).sum(1)).view(-1, 2).sum(1)  # (B / 2,)
    is_pair = (signs != 0).view(-1, 2).all(1)
    nothing = torch.zeros_like(mask)
    return LossOutput(
        loss=torch.where(is_pair, -logsigmoid(config.beta * margins), 0.0).sum() / max(counts.num_unequal, 1),
        kl=torch.zeros_like(logps) if ref_logps is None else k3_divergence(logps, ref_logps).detach(),
        is_low_clipped=nothing,
        is_high_clipped=nothing,
    )
