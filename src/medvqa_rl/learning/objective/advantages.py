"""From the rewards of a group to the advantages of its completions. Pure mathematics on tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


def group_statistics(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each group's scored completions.

    Args:
        rewards: (P, G) rewards; NaN is unscored.

    Returns:
        (P,) mean, NaN where nothing was scored, and (P,) standard deviation with n - 1 as divisor, exactly 0 where
        fewer than 2 were scored or where all scored rewards are equal.
    """
    is_scored = ~rewards.isnan()
    count = is_scored.sum(1)  # (P,)
    mean = torch.where(is_scored, rewards, 0.0).sum(1) / count
    squares = torch.where(is_scored, rewards - mean[:, None], 0.0).square().sum(1)
    low = torch.where(is_scored, rewards, torch.inf).amin(1)
    high = torch.where(is_scored, rewards, -torch.inf).amax(1)
    # Rounding can leave a deviation of 1e-17 in a group of equal rewards; the comparison cannot.
    has_spread = (count >= 2) & (high > low)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean, torch.where(has_spread, std, 0.0)


def preferences(rewards: Tensor) -> Tensor:
    """The best and the worst completion of each group.

    Args:
        rewards: (P, G) rewards; NaN is unscored and neither.

    Returns:
        (P, 2) indices, best first, the first ones where several are equal; -1 where all scored rewards are equal.
    """
    best = torch.where(rewards.isnan(), -torch.inf, rewards).argmax(1)
    worst = torch.where(rewards.isnan(), torch.inf, rewards).argmin(1)
    has_spread = group_statistics(rewards)[1] > 0
    return torch.where(has_spread[:, None], torch.stack([best, worst], dim=1), -1)


def group_advantages(rewards: Tensor, *, scale: Literal["group", "none"]) -> Tensor:
    """Center the rewards inside each group, and scale them for GRPO.

    A_i = (r_i - mean) / (std + 1e-4) for ``group`` (GRPO, arXiv 2402.03300); A_i = r_i - mean for ``none``
    (Dr. GRPO, arXiv 2503.20783). Mean and standard deviation (n - 1, as in TRL) are those of the scored completions.
    A group with fewer than 2 scored completions, or whose scored rewards are all equal, gets exactly 0; so does an
    unscored completion.

    Args:
        rewards: (P, G) rewards; NaN is unscored.
        scale: ``group`` divides by the standard deviation, ``none`` does not.

    Returns:
        (P, G) advantages, dimensionless, never NaN.
    """
    mean, std = group_statistics(rewards)
    advantages = rewards - mean[:, None]
    if scale == "group":
        advantages = advantages / (std[:, None] + EPSILON)
    return torch.where(rewards.isnan() | (std[:, None] == 0), 0.0, advantages)
