"""Group-relative advantages from rewards."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as in TRL."""


def group_statistics(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation of each group's scored completions.

    Args:
        rewards: (P, G) rewards; NaN is unscored.

    Returns:
        (P,) means, NaN if nothing was scored, and (P,) standard deviations with divisor n - 1, exactly 0 if fewer
        than 2 completions were scored or all scored rewards are equal.
    """
    is_scored = ~rewards.isnan()
    count = is_scored.sum(1)  # (P,)
    mean = torch.where(is_scored, rewards, 0.0).sum(1) / count
    squares = torch.where(is_scored, rewards - mean[:, None], 0.0).square().sum(1)
    low = torch.where(is_scored, rewards, torch.inf).amin(1)
    high = torch.where(is_scored, rewards, -torch.inf).amax(1)
    # Compare rewards rather than deviations: rounding can leave 1e-17 in a group of equal rewards.
    has_spread = (count >= 2) & (high > low)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return mean, torch.where(has_spread, std, 0.0)


def group_advantages(rewards: Tensor, *, scale: Literal["group", "none"]) -> Tensor:
    """Center the rewards of each group, and for GRPO divide them by the group's standard deviation.

    A_i = (r_i - mean) / (std + 1e-4) for ``group`` (GRPO, arXiv 2402.03300) and A_i = r_i - mean for ``none``
    (Dr. GRPO, arXiv 2503.20783), with the statistics of :func:`group_statistics`. Unscored completions, and groups
    with fewer than 2 scored completions or equal rewards, get exactly 0.

    Args:
        rewards: (P, G) rewards; NaN is unscored.
        scale: divide by the standard deviation (``group``) or not (``none``).

    Returns:
        (P, G) advantages, never NaN.
    """
    mean, std = group_statistics(rewards)
    advantages = rewards - mean[:, None]
    if scale == "group":
        advantages = advantages / (std[:, None] + EPSILON)
    return torch.where(rewards.isnan() | (std[:, None] == 0), 0.0, advantages)
