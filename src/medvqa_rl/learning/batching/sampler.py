"""Which samples a step trains on: a function of the step alone, so a resumed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from medvqa_rl.core.randomness import address, permutation
from medvqa_rl.core.types import Dataset, Sample


class Draw(NamedTuple):
    """A sample and the epoch that it is drawn in: a step that holds the end of one epoch and the beginning of the
    next can hold a sample twice."""

    sample: Sample
    epoch: int
    place: int
    """Its number among the step's samples over all ranks."""


_FURTHER = 2**32
"""Samples of an endless data set that the steps' own prompts leave to each attempt at resampling."""
_STRIDE = 2654435761
"""2**32 over the golden ratio: its multiples lie far apart, so the starts of two seeds are never near each other."""


def indices_at(
    step: int, *, num_prompts: int, length: int | None, seed: int, attempt: int = 0
) -> list[tuple[int, int]]:
    """Indices of the samples of one step, each with its epoch.

    An endless data set is read in order from a start that the seed sets, seed * 2654435761 modulo 2**31: step s takes
    start + s * P ... start + s * P + P - 1. A finite one is shuffled anew in every epoch; epochs join without a gap,
    so a step may hold the end of one and the beginning of the next.

    Args:
        step: counted from 0.
        num_prompts: P, prompts of a step over all ranks.
        length: samples in the data set; None is endless.
        seed: of the start or of the shuffling.
        attempt: 0 for the step's own prompts; others for those that are sampled in their place, which come from
            further on in an endless data set, and from orders of their own in a finite one.
    """
    places = range(step * num_prompts, (step + 1) * num_prompts)
    if length is None:
        start = seed * _STRIDE % (_FURTHER // 2)
        return [(start + place + attempt * _FURTHER, 0) for place in places]
    order: tuple[str | int, ...] = (seed, "attempt", attempt, "epoch") if attempt else (seed, "epoch")
    orders = {epoch: permutation(address(*order, epoch), length) for epoch in {i // length for i in places}}
    return [(int(orders[place // length][place % length]), place // length) for place in places]


def samples_at(
    dataset: Dataset,
    step: int,
    *,
    num_prompts: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    attempt: int = 0,
    cost: Callable[[Sample], float] | None = None,
) -> list[Draw]:
    """The samples of one step that one rank works on, in the order of the step.

    Args:
        cost: what a sample is expected to take; ranks get as many samples each, and as equal sums as :func:`deal`
            finds. None deals consecutive ones.
    """
    length = None if dataset.is_endless else len(dataset)
    indices = indices_at(step, num_prompts=num_prompts, length=length, seed=seed, attempt=attempt)
    if num_ranks == 1 or cost is None:
        share = num_prompts // num_ranks
        places = list(range(rank * share, (rank + 1) * share))
    else:
        places = deal([cost(dataset[index]) for index, _ in indices], num_ranks)[rank]
    return [Draw(dataset[indices[place][0]], indices[place][1], place) for place in places]


def deal(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Share things out so that every rank gets as many, and the dearest share is cheap.

    The dearest thing left goes to the rank that has least so far and still has room (longest processing time first,
    Graham 1969). All ranks find the same.

    Returns:
        Indices by rank, each list ascending.
    """
    room = len(costs) // num_ranks
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0.0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min((rank for rank in range(num_ranks) if len(shares[rank]) < room), key=lambda rank: sums[rank])
        shares[rank].append(index)
        sums[rank] += costs[index]
    return [sorted(share) for share in shares]
