"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing give their place to others.

A group whose rewards are all equal has no advantage. So groups of other prompts are sampled, and those whose rewards
differ take its place. Which prompts an attempt draws, and every token of it, is a function of the step and the number
of the attempt, so a resumed run meets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.types import Group, Scores

_EPOCHS = 2**32
"""More than any run has: tells the attempts' occurrences of a sample apart."""


def without_signal(total: NDArray[np.float64]) -> list[int]:
    """Indices of the groups whose rewards are all equal.

    A group with an unscored completion is not among them: what we failed to score must be seen, not replaced.

    Args:
        total: (P, G) rewards; NaN is unscored.
    """
    return np.flatnonzero(total.max(axis=1) == total.min(axis=1)).tolist()


def occurrence(attempt: int, epoch: int) -> int:
    """What tells a completion of this attempt from the step's own, and from those of other attempts."""
    return attempt * _EPOCHS + epoch


def resample(
    groups: Sequence[Group],
    scores: Scores,
    *,
    max_times: int,
    roll_out: Callable[[int, Sequence[int]], list[Group]],
    score: Callable[[Sequence[Group]], Scores],
    number: Callable[[Sequence[int]], list[int] | None] | None = None,
) -> tuple[list[Group], Scores]:
    """Replace groups without signal by groups of other prompts that have some, as far as they are found.

    Args:
        groups: P groups of the step's own prompts.
        scores: theirs.
        max_times: attempts at most, each with as many prompts as there are groups left to replace.
        roll_out: (attempt from 1, numbers of prompts in the attempt) -> groups of these prompts.
        score: their scores.
        number: of several ranks, all of which call it in every attempt: which of this rank's groups are to be replaced
            -> their numbers among those of all ranks, None where no rank has any. None counts this rank's alone.

    Returns:
        P groups and their scores. ``extras`` are those of the step's own groups, and ``frac_groups_resampled``, the
        share of the groups that are not the step's own.
    """
    groups, num_replaced = list(groups), 0
    for attempt in range(1, max_times + 1):
        places = without_signal(scores.total)
        numbers = (list(range(len(places))) or None) if number is None else number(places)
        if numbers is None:
            break
        if not places:
            continue  # but other ranks have some
        fresh = roll_out(attempt, numbers)
        found = score(fresh)
        useless = set(without_signal(found.total))
        pairs = [(place, index) for index, place in enumerate(places) if index not in useless]
        for place, index in pairs:
            groups[place] = fresh[index]
        scores = _with_rows(scores, found, pairs)
        num_replaced += len(pairs)
    return groups, replace(scores, extras={**scores.extras, "frac_groups_resampled": num_replaced / len(groups)})


def _with_rows(scores: Scores, fresh: Scores, pairs: Sequence[tuple[int, int]]) -> Scores:
    """Scores with the rows of some groups replaced: pairs of a row here and a row of the fresh ones."""
    if not pairs:
        return scores
    places, indices = (list(numbers) for numbers in zip(*pairs))

    def merged(own: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
        own = own.copy()
        own[places] = other[indices]
        return own

    size = scores.total.shape[1]
    columns = {name: list(values) for name, values in scores.columns.items()}
    for name, values in columns.items():
        others = fresh.columns.get(name, [None] * fresh.total.size)  # a function need not log in every call
        for place, index in pairs:
            values[place * size : (place + 1) * size] = others[index * size : (index + 1) * size]
    return replace(
        scores,
        total=merged(scores.total, fresh.total),
        parts={name: merged(values, fresh.parts[name]) for name, values in scores.parts.items()},
        columns=columns,
    )
