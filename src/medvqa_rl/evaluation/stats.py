"""Intervals and tests that respect clusters: many questions share one image. Imports no torch.

Questions about one image are not independent, so intervals resample images, not questions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

_DRAWS_AT_ONCE = 4_000_000  # cluster draws held in memory together (32 MB as int64)


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; the bounds are NaN where there are fewer than two clusters."""

    estimate: float
    low: float
    high: float


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean of values with a percentile interval from resampling whole clusters.

    K clusters are drawn with replacement from the K there are; a resample's mean is (sum of all values of the drawn
    clusters) / (their number). The bounds are the (1 - confidence) / 2 and (1 + confidence) / 2 quantiles of the
    resampled means (linear interpolation). Percentile intervals have zero width where all values are equal and are
    somewhat too narrow below about 20 clusters (Davison and Hinkley 1997, section 2.4 and 3.8): show the number of
    clusters beside them.

    Args:
        values: (N,) finite numbers, such as 0 and 1 for wrong and right.
        clusters: (N,) name of each value's cluster, such as its image.
        resamples: number of bootstrap resamples.
        seed: of NumPy's PCG64 generator; equal inputs give equal intervals.
        confidence: coverage of the interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    assert numbers.ndim == 1 and len(numbers) == len(clusters) > 0, "one cluster per value, and at least one value"
    assert np.isfinite(numbers).all(), "leave unscored values out before"
    positions: dict[Hashable, int] = {}
    index = np.array([positions.setdefault(cluster, len(positions)) for cluster in clusters])
    count = len(positions)
    estimate = float(numbers.mean())
    if count < 2:
        return Interval(estimate, float("nan"), float("nan"))
    sums = np.bincount(index, weights=numbers)
    sizes = np.bincount(index).astype(np.float64)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(resamples)
    rows = max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, count, size=(min(rows, resamples - start), count))
        means[start : start + rows] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(estimate, float(low), float(high))


def paired_cluster_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean of after - before on the same questions, with an interval from resampling whole clusters.

    The two values of a question stay together, so what both share (its difficulty) cancels.

    Args:
        before: (N,) finite values.
        after: (N,) finite values of the same questions in the same order.
        clusters: (N,) name of each question's cluster.
        resamples: see :func:`cluster_bootstrap`, as are seed and confidence.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return cluster_bootstrap(difference, clusters, resamples=resamples, seed=seed, confidence=confidence)


@dataclass(frozen=True)
class McNemar:
    """Result of :func:`exact_mcnemar`."""

    improved: int
    """Questions wrong before and right after."""
    worsened: int
    """Questions right before and wrong after."""
    p_value: float
    """Two-sided."""


def exact_mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Exact McNemar test: are changes in both directions equally likely?

    p = P(at least as uneven a split | changes ~ Binomial(improved + worsened, 1/2)), two-sided; 1 without changes.
    It takes questions as independent, so with many questions per image read it beside the clustered interval.

    Args:
        before: (N,) whether each answer was right.
        after: (N,) the same of the same questions in the same order.
    """
    assert len(before) == len(after), "the same questions before and after"
    improved = sum(now and not then for then, now in zip(before, after))
    worsened = sum(then and not now for then, now in zip(before, after))
    changed = improved + worsened
    return McNemar(improved, worsened, float(binomtest(improved, changed).pvalue) if changed else 1.0)
