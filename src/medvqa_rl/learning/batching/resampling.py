"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): replace groups whose rewards are all equal.

Such a group has zero advantages and no gradient. Groups of other prompts are rolled out, and those with unequal
rewards take its place. The prompts of an attempt and every sampled token are pure functions of the step and the
attempt, so a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.types import Group
from medvqa_rl.rewards.scores import Scores

T = TypeVar("T")
Value = TypeVar("Value", np.float64, np.bool_)

_MAX_EPOCHS = 2**32
"""Above the number of epochs of any run, so that occurrences of different attempts never collide."""


def groups_without_signal(total: NDArray[np.float64]) -> list[int]:
    """Indices of the groups whose rewards are all equal.

    Groups with an unscored completion are not included, so that scoring failures stay visible.

    Args:
        total: (P, G) rewards; NaN is unscored.
    """
    return np.flatnonzero(total.max(axis=1) == total.min(axis=1)).tolist()


def resampled_occurrence(attempt: int, epoch: int) -> int:
    """The occurrence of a sample in a resampling attempt: unique for each (attempt, epoch)."""
    return attempt * _MAX_EPOCHS + epoch


def resample(
    groups: Sequence[Group],
    scores: Scores,
    *,
    max_attempts: int,
    roll_out: Callable[[int, Sequence[int]], list[Group]],
    score: Callable[[Sequence[Group]], Scores],
    global_indices: Callable[[Sequence[int]], list[int] | None] | None = None,
) -> tuple[list[Group], Scores]:
    """Replace groups without signal by groups of other prompts, in at most ``max_attempts`` attempts.

    Each attempt rolls out as many prompts as there are groups left to replace.

    Args:
        groups: this rank's P groups of the step.
        scores: their scores.
        roll_out: (attempt counted from 1, prompt indices within the attempt) -> groups of these prompts.
        score: groups -> scores.
        global_indices: for several ranks, a collective call in every attempt: indices of this rank's groups to replace
            -> their indices among those of all ranks, or None if no rank has any. None: this is the only rank.

    Returns:
        P groups and their scores. ``extras`` are those of the original groups, with ``frac_groups_resampled``: the
        fraction of groups that were replaced.
    """
    groups, num_replaced = list(groups), 0
    for attempt in range(1, max_attempts + 1):
        targets = groups_without_signal(scores.total)
        indices = (list(range(len(targets))) or None) if global_indices is None else global_indices(targets)
        if indices is None:
            break
        if not targets:
            continue  # other ranks still have groups to replace
        fresh = roll_out(attempt, indices)
        fresh_scores = score(fresh)
        useless = set(groups_without_signal(fresh_scores.total))
        pairs = [(target, index) for index, target in enumerate(targets) if index not in useless]
        for target, index in pairs:
            groups[target] = fresh[index]
        scores = _replace_rows(scores, fresh_scores, pairs)
        num_replaced += len(pairs)
    return groups, replace(scores, extras={**scores.extras, "frac_groups_resampled": num_replaced / len(groups)})


def _replace_rows(scores: Scores, fresh: Scores, pairs: Sequence[tuple[int, int]]) -> Scores:
    """Copy rows of ``fresh`` into ``scores``: pairs of (row in scores, row in fresh)."""
    if not pairs:
        return scores
    rows, fresh_rows = (list(indices) for indices in zip(*pairs))

    def merged(own: NDArray[Value], other: NDArray[Value]) -> NDArray[Value]:
        own = own.copy()
        own[rows] = other[fresh_rows]
        return own

    size = scores.total.shape[1]

    def merged_lists(own: Sequence[T], other: Sequence[T]) -> list[T]:
        own = list(own)
        for row, fresh_row in pairs:
            own[row * size : (row + 1) * size] = other[fresh_row * size : (fresh_row + 1) * size]
        return own

    unlogged = [None] * fresh.total.size  # a reward function need not log in every call
    return replace(
        scores,
        total=merged(scores.total, fresh.total),
        parts={name: merged(values, fresh.parts[name]) for name, values in scores.parts.items()},
        applies={name: merged(values, fresh.applies[name]) for name, values in scores.applies.items()},
        columns={name: merged_lists(own, fresh.columns.get(name, unlogged)) for name, own in scores.columns.items()},
        steps=merged_lists(scores.steps, fresh.steps),
        reads=merged_lists(scores.reads, fresh.reads),
    )
