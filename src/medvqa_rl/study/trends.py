"""Compute the trends of a study: measures of series of arms, with intervals over seeds and images.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import LEVELS, SeededInterval
from medvqa_rl.report.runs import Row
from medvqa_rl.study.findings import ends
from medvqa_rl.study.plan.contrasts import matched_by_seed
from medvqa_rl.study.plan.trends import Trend
from medvqa_rl.study.steps_worth import Worth, accuracy_curve, steps_worth

Floats = NDArray[np.float64]
_Terms = tuple[tuple[str, int], ...]
"""Arms to add up, with their signs."""


@dataclass(frozen=True)
class Answered:
    """What a finished cell gives to a trend."""

    seed: int
    is_once: bool
    """Whether the arm has a single cell, which every seed of the others is compared with."""
    records: Sequence[EvalRecord]
    """Of the trend's test."""
    rows: Sequence[Row]
    """Of metrics.jsonl; empty if untrained."""


@dataclass(frozen=True)
class Point:
    """The measures at one number of a series, or of a difference of two series."""

    series: str
    x: float
    values: Mapping[str, SeededInterval]
    """By metric; NaN where nothing was measured."""


@dataclass(frozen=True)
class Change:
    """The measures at the largest number of a series, or of a difference, minus those at the smallest."""

    series: str
    first: float
    last: float
    values: Mapping[str, SeededInterval]
    """By metric; NaN where nothing was measured."""


@dataclass(frozen=True)
class TrendResult:
    """A trend with its numbers."""

    trend: Trend
    points: tuple[Point, ...]
    differences: tuple[Point, ...]
    changes: tuple[Change, ...]
    """Of every series and difference with two numbers or more."""
    worths: Mapping[float, Worth]
    """Number -> worth in RL steps; empty unless asked for."""


def _judged(record: EvalRecord) -> float | None:
    return None if record.verdict is None else record.is_well_formed + record.verdict


_VALUES: Mapping[str, Callable[[EvalRecord], float | None]] = {
    "accuracy": lambda record: record.is_correct,
    "faithfulness": lambda record: record.faithfulness,
    "distinct_truths": lambda record: record.distinct_truths,
    "thinking": _judged,
    "length": lambda record: record.num_tokens,
    "format": lambda record: record.is_well_formed,
    "length_wrong": lambda record: None if record.is_correct else record.num_tokens,
    "length_right": lambda record: record.num_tokens if record.is_correct else None,
}
"""The value of an answer; None where it has none, which its mean leaves out."""

_TERMS: Mapping[str, tuple[tuple[str, int], ...]] = {
    **{name: ((name, 1),) for name in _VALUES},
    "length_bias": (("length_wrong", 1), ("length_right", -1)),
}
"""Metric -> the means that it adds up, with their signs."""


def trend_result(
    trend: Trend, arms: Mapping[str, Sequence[Answered]], *, resamples: int, seed: int = 0
) -> TrendResult:
    """Compute a trend from the finished cells; numbers whose arm has none are left out.

    A metric of a cell is a mean over its answers, ``length_bias`` the mean tokens of wrong minus those of right
    answers, and ``entropy`` the mean per token over the last fifth of its training, in nats. A point is the mean over
    seeds. Differences, and changes of points and differences from the smallest number to the largest, are paired by
    seed; an arm with one cell is paired with every seed of the others. Intervals are 95 % percentiles over resamples
    of seeds and, independently, of images (Owen 2007), with the same draws for all points.

    Args:
        trend: the series.
        arms: the finished cells of every arm that has one; all answered the same questions.
        resamples: of the bootstrap.
        seed: of NumPy's PCG64 generator.
    """
    found = [cell for cells in arms.values() for cell in cells]
    keys = list(dict.fromkeys(record.image_key for record in found[0].records))
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.multinomial(len(keys), [1 / len(keys)] * len(keys), size=resamples).astype(np.float64)
    every = np.vstack([np.ones(len(keys)), drawn])  # the first row is the sample itself

    def means(cell: Answered, metric: str) -> Floats:
        """(1 + R,) the metric of a cell, then of its resampled images."""
        if metric == "entropy":
            return np.full(len(every), ends(cell.rows, "entropy")[1])
        total = np.zeros(len(every))
        for name, sign in _TERMS[metric]:
            sums = dict.fromkeys(keys, (0.0, 0))
            for record in cell.records:
                value = _VALUES[name](record) if record.is_scored else None
                if value is not None:
                    added, counted = sums[record.image_key]
                    sums[record.image_key] = (added + value, counted + 1)
            added_up, counts = (every @ np.array(column, dtype=np.float64) for column in zip(*sums.values()))
            with np.errstate(invalid="ignore"):
                total += sign * added_up / counts
        return total

    @cache
    def of(arm: str, index: int, metric: str) -> Floats:
        return means(arms[arm][index], metric)

    @cache
    def weights(num_seeds: int) -> Floats:
        """(1 + R, S) how often each seed is drawn; once in the first row."""
        seeds = np.random.Generator(np.random.PCG64([seed, num_seeds]))
        counts = seeds.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=resamples)
        return np.vstack([np.ones(num_seeds), counts])

    def interval(columns: Sequence[Floats]) -> SeededInterval:
        values = (weights(len(columns)) * np.stack(columns, axis=1)).sum(axis=1) / len(columns)
        resampled = values[1:][~np.isnan(values[1:])]
        is_constant = len(columns) == 1 and len(resampled) > 0 and not np.ptp(resampled)  # one seed of a seed's value
        if math.isnan(values[0]) or len(resampled) < 2 or len(keys) < 2 or is_constant:
            return SeededInterval(float(values[0]), math.nan, math.nan, math.nan)
        low, high = np.quantile(resampled, LEVELS)
        return SeededInterval(float(values[0]), float(low), float(high), float(resampled.std(ddof=1)))

    def measure(terms: _Terms) -> dict[str, SeededInterval] | None:
        together = _of_the_same_seeds([arms.get(arm, ()) for arm, _ in terms])

        def column(metric: str, indices: Sequence[int]) -> Floats:
            parts = [sign * of(arm, index, metric) for (arm, sign), index in zip(terms, indices)]
            added_up: Floats = np.sum(parts, axis=0)
            return added_up

        if not together:
            return None
        return {metric: interval([column(metric, indices) for indices in together]) for metric in trend.metrics}

    series: dict[str, dict[float, _Terms]] = {
        name: {x: ((arm, 1),) for x, arm in line.items()} for name, line in trend.series.items()
    }
    differences: dict[str, dict[float, _Terms]] = {
        f"{one} minus {other}": {
            x: ((arm, 1), (trend.series[other][x], -1))
            for x, arm in trend.series[one].items()
            if x in trend.series[other]
        }
        for one, other in trend.differences
    }

    def points(lines: Mapping[str, Mapping[float, _Terms]]) -> tuple[Point, ...]:
        measured = [(name, x, measure(terms)) for name, line in lines.items() for x, terms in line.items()]
        return tuple(Point(name, x, values) for name, x, values in measured if values is not None)

    def changes() -> Iterator[Change]:
        for name, line in (series | differences).items():
            first, last = min(line, default=0.0), max(line, default=0.0)
            if first == last:
                continue
            values = measure((*line[last], *((arm, -sign) for arm, sign in line[first])))
            if values is not None:
                yield Change(name, first, last, values)

    return TrendResult(
        trend=trend,
        points=points(series),
        differences=points(differences),
        changes=tuple(changes()),
        worths=_worths(trend, arms, resamples),
    )


def _of_the_same_seeds(arms: Sequence[Sequence[Answered]]) -> list[tuple[int, ...]]:
    """Indices of the cells of some arms that have the same seed, one row per seed that all of them have."""
    indices = [{cell.seed: index for index, cell in enumerate(cells)} for cells in arms]
    once = [any(cell.is_once for cell in cells) for cells in arms]
    return [row for _, row in matched_by_seed(indices, once)]


def _worths(trend: Trend, arms: Mapping[str, Sequence[Answered]], resamples: int) -> dict[float, Worth]:
    if trend.steps_worth is None:
        return {}
    found = {}
    for x, arm in trend.series[trend.steps_worth.series].items():
        if arm not in arms or trend.steps_worth.reference not in arms:
            continue
        cells, reference = arms[arm], arms[trend.steps_worth.reference]
        pairs = _of_the_same_seeds([cells, reference])
        curves = [(accuracy_curve(cells[a].rows), accuracy_curve(reference[b].rows)) for a, b in pairs]
        worth = steps_worth([one for one, _ in curves], [other for _, other in curves], resamples=resamples)
        if worth is not None and x > 0:
            found[x] = worth
    return found
