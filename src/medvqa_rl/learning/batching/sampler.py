"""Which samples each training step uses. Pure functions of the step, so a resumed run draws the same samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from medvqa_rl.core.randomness import address, permutation
from medvqa_rl.core.types import Dataset, Sample


class DrawnSample(NamedTuple):
    """A sample drawn for a step."""

    sample: Sample
    epoch: int
    """The epoch it belongs to. A step that spans two epochs can contain a sample twice."""
    position: int
    """Its index among the step's samples over all ranks."""


_ATTEMPT_OFFSET = 2**32
"""Offset between resampling attempts in an endless data set. The steps' own prompts never reach it."""
_SEED_STRIDE = 2654435761
"""2**32 divided by the golden ratio (Knuth's multiplicative hash), which spreads the starts of different seeds."""


def step_indices(
    step: int, *, num_prompts: int, length: int | None, seed: int, attempt: int = 0, in_order: bool = False
) -> list[tuple[int, int]]:
    """(index, epoch) of each sample of a step.

    An endless data set is read in order: step s takes start + s * P ... start + s * P + P - 1, where start is
    seed * 2654435761 modulo 2**31. A finite one is reshuffled every epoch. Epochs follow each other without a gap, so
    a step can span two of them. ``in_order`` reads it as it is in every epoch; resampling attempts are shuffled.

    Args:
        step: counted from 0.
        num_prompts: P, prompts per step over all ranks.
        length: size of the data set; None if endless.
        seed: seed of the start or the shuffling.
        attempt: 0 for the step's own prompts, n for the n-th resampling attempt. Each attempt starts at its own offset
            in an endless data set and has its own shuffling in a finite one.
        in_order: do not shuffle.
    """
    positions = range(step * num_prompts, (step + 1) * num_prompts)
    if length is None:
        start = seed * _SEED_STRIDE % (_ATTEMPT_OFFSET // 2) + attempt * _ATTEMPT_OFFSET
        return [(start + position, 0) for position in positions]
    if in_order and not attempt:
        return [(position % length, position // length) for position in positions]
    key: tuple[str | int, ...] = (seed, "attempt", attempt, "epoch") if attempt else (seed, "epoch")
    orders = {epoch: permutation(address(*key, epoch), length) for epoch in {p // length for p in positions}}
    return [(int(orders[position // length][position % length]), position // length) for position in positions]


def step_samples(
    dataset: Dataset,
    step: int,
    *,
    num_prompts: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    attempt: int = 0,
    in_order: bool = False,
    cost: Callable[[Sample], float] | None = None,
) -> list[DrawnSample]:
    """The samples of a step that one rank processes, in step order.

    Args:
        in_order: do not shuffle a finite data set.
        cost: expected cost of a sample, used to balance ranks (:func:`balance_by_cost`). None gives each rank
            consecutive samples.
    """
    length = None if dataset.is_endless else len(dataset)
    indices = step_indices(step, num_prompts=num_prompts, length=length, seed=seed, attempt=attempt, in_order=in_order)
    if num_ranks == 1 or cost is None:
        share = num_prompts // num_ranks
        positions = list(range(rank * share, (rank + 1) * share))
    else:
        positions = balance_by_cost([cost(dataset[index]) for index, _ in indices], num_ranks)[rank]
    return [DrawnSample(dataset[indices[position][0]], indices[position][1], position) for position in positions]


def balance_by_cost(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Assign the same number of items to each rank, with total costs as equal as a greedy pass gets them.

    Items are assigned in order of decreasing cost to the rank with the lowest total that still has room (longest
    processing time first, Graham 1969). Deterministic, so all ranks compute the same assignment.

    Returns:
        Item indices of each rank, ascending.
    """
    share = len(costs) // num_ranks
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min((rank for rank in range(num_ranks) if len(assigned[rank]) < share), key=lambda rank: totals[rank])
        assigned[rank].append(index)
        totals[rank] += costs[index]
    return [sorted(indices) for indices in assigned]
