"""Group-relative advantages from rewards.

Legend: P prompts, G completions per prompt, B completions of a micro-batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Advantages = Tensor | Sequence[Sequence[Tensor]]
"""(P, G) one per completion, or P x G tensors with one per token of the completion."""

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


def group_advantages(
    rewards: Tensor,
    *,
    scale: Literal["group", "none", "batch", "whiten"],
    baseline: Literal["group", "leave_one_out"] = "group",
    everyone: Tensor | None = None,
) -> Tensor:
    """Subtract a baseline from the rewards of each group, and divide by a standard deviation.

    With n scored completions in the group, and the statistics of :func:`group_statistics`:

    - ``baseline``: r_i - mean for ``group``; r_i - (mean of the others) = n / (n - 1) * (r_i - mean) for
      ``leave_one_out`` (RLOO, arXiv 2402.14740).
    - ``scale``: divided by std + 1e-4 with the standard deviation of the group for ``group`` (GRPO, arXiv 2402.03300),
      of all scored rewards of the step for ``batch`` (arXiv 2508.08221), of the step's undivided advantages for
      ``whiten`` (REINFORCE++, arXiv 2501.03262); not divided for ``none`` (Dr. GRPO, arXiv 2503.20783). All have
      divisor n - 1.

    Unscored completions, and groups with fewer than 2 scored completions or equal rewards, get exactly 0.

    Args:
        rewards: (P, G) rewards; NaN is unscored.
        everyone: (any, G) rewards of the whole step, on all ranks; defaults to ``rewards``.

    Returns:
        (P, G) advantages, never NaN.
    """
    mean, std = group_statistics(rewards)
    advantages = rewards - mean[:, None]
    if baseline == "leave_one_out":
        count = (~rewards.isnan()).sum(1, keepdim=True)
        advantages = advantages * (count / (count - 1).clamp(min=1))
    if scale == "group":
        advantages = advantages / (std[:, None] + EPSILON)
    elif scale != "none":
        step = rewards if everyone is None else everyone
        if scale == "whiten":
            # A group with a single scored completion has no advantage; one with equal rewards has 0 and counts.
            is_compared = ~step.isnan() & ((~step.isnan()).sum(1, keepdim=True) >= 2)
            undivided = group_advantages(step, scale="none", baseline=baseline)
            step = torch.where(is_compared, undivided, torch.nan)
        advantages = advantages / (group_statistics(step.reshape(1, -1))[1] + EPSILON)
    return torch.where(rewards.isnan() | (std[:, None] == 0), 0.0, advantages)


def have_signal(advantages: Advantages) -> Tensor:
    """Return (P,) bool: which groups have an advantage other than 0."""
    if isinstance(advantages, Tensor):
        return (advantages != 0).any(1)
    return torch.tensor([any(bool(tokens.any()) for tokens in group) for group in advantages], dtype=torch.bool)


def advantage_rows(advantages: Advantages, indices: Sequence[int], mask: Tensor) -> Tensor:
    """Lay the advantages of some groups out for a loss.

    Args:
        advantages: of P groups.
        indices: the groups, in the order of the rows.
        mask: (B, T) bool, True at the tokens of their completions.

    Returns:
        (B,) float32 on the mask's device, or (B, T), 0 at padding, if they were given per token.
    """
    if isinstance(advantages, Tensor):
        return advantages[list(indices)].reshape(-1).float().to(mask.device)
    rows = [tokens for index in indices for tokens in advantages[index]]
    assert [len(row) for row in rows] == mask.sum(1).tolist(), "one advantage per token is needed"
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(rows).float().to(mask.device))
