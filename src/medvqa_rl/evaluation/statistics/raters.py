"""Agreement of raters beyond chance: Cohen's kappa for two, Krippendorff's alpha for any number. Imports no torch.

Ratings are integers from 0 to levels - 1. Intervals resample clusters (all ratings for one image or question).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.evaluation.statistics.intervals_and_tests import Interval

Scale = Literal["nominal", "interval"]
"""Distance of two ratings: 1 if they differ (nominal), or their squared difference (interval)."""
Floats = NDArray[np.float64]


def _distances(levels: int, scale: Scale) -> Floats:
    """(levels, levels) distance of every two ratings."""
    ratings = np.arange(levels, dtype=np.float64)
    apart = ratings[:, None] - ratings
    return (apart != 0).astype(np.float64) if scale == "nominal" else apart**2


def _kappas(tables: Floats, distances: Floats) -> Floats:
    """Cohen's kappa of (N, K, K) contingency tables; NaN if a rater always gives the same rating."""
    total = tables.sum(axis=(1, 2))
    observed = (tables * distances).sum(axis=(1, 2))
    first, second = tables.sum(axis=2), tables.sum(axis=1)
    expected = np.einsum("ni,ij,nj->n", first, distances, second) / total
    varies = ((first > 0).sum(axis=1) > 1) & ((second > 0).sum(axis=1) > 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappas: Floats = np.where(varies, 1 - observed / expected, np.nan)
    return kappas


def kappa_interval(
    first: Sequence[int],
    second: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    levels: int = 2,
    scale: Scale = "nominal",
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Cohen's kappa: 1 - D_o / D_e with the observed mean distance D_o of the two ratings and that of independent
    raters with the same shares (Cohen 1960; 1968 with quadratic weights, which is ``scale="interval"``).

    Args:
        first: (N,) ratings by one rater.
        second: (N,) ratings of the same items by the other.
        clusters: (N,) clusters to resample.

    Returns:
        Kappa, NaN if a rater always gives the same rating: D_o is then D_e (or both are 0) whatever the other says, so
        the number 0 would not mean agreement by chance; and the 2.5 and 97.5 % quantiles of
        resampled clusters, NaN for fewer than two.
    """
    index, count = _positions(clusters)
    tables = np.zeros((count, levels, levels))
    np.add.at(tables, (index, np.asarray(first, dtype=int), np.asarray(second, dtype=int)), 1)
    distances = _distances(levels, scale)

    def statistic(drawn: Floats) -> Floats:
        return _kappas(np.tensordot(drawn, tables, axes=1), distances)

    return _resampled(statistic, count, resamples, seed)


def alpha_interval(
    units: Sequence[Sequence[int]],
    clusters: Sequence[Hashable],
    *,
    levels: int,
    scale: Scale,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Krippendorff's alpha: 1 - D_o / D_e over all pairs of ratings of the same item and of any items (Krippendorff
    2011, "Computing Krippendorff's Alpha-Reliability"). Any number of raters, of whom not all need rate every item.

    Args:
        units: the ratings of each item; items with fewer than two are ignored.
        clusters: cluster of each item, to resample.
        levels: number of possible ratings.
        scale: distance of two ratings.

    Returns:
        Alpha, NaN if no item was rated twice or all ratings are equal; and the 2.5 and 97.5 % quantiles of resampled
        clusters of items.
    """
    paired = [(unit, cluster) for unit, cluster in zip(units, clusters, strict=True) if len(unit) > 1]
    if not paired:
        return Interval(math.nan, math.nan, math.nan)
    index, count = _positions([cluster for _, cluster in paired])
    distances = _distances(levels, scale)
    values = np.stack([np.bincount(unit, minlength=levels) for unit, _ in paired]).astype(np.float64)  # (U, levels)
    # Each pair of ratings of an item with m ratings counts 1 / (m - 1).
    apart = np.einsum("ui,ij,uj->u", values, distances, values) / (values.sum(axis=1) - 1)
    observed, ratings = np.zeros(count), np.zeros((count, levels))
    np.add.at(observed, index, apart)
    np.add.at(ratings, index, values)

    def statistic(drawn: Floats) -> Floats:
        counts = drawn @ ratings  # (R, levels) of each rating
        expected = np.einsum("ri,ij,rj->r", counts, distances, counts) / (counts.sum(axis=1) - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            alphas: Floats = np.where(expected > 0, 1 - (drawn @ observed) / expected, np.nan)
        return alphas

    return _resampled(statistic, count, resamples, seed)


def _positions(clusters: Sequence[Hashable]) -> tuple[NDArray[np.int64], int]:
    """(N,) index of each cluster, in order of appearance, and the number of clusters."""
    positions: dict[Hashable, int] = {}
    index = np.array([positions.setdefault(cluster, len(positions)) for cluster in clusters], dtype=np.int64)
    return index, len(positions)


def _resampled(statistic: Callable[[Floats], Floats], count: int, resamples: int, seed: int) -> Interval:
    """Percentile interval of a statistic of cluster counts, (R, clusters) -> (R,)."""
    estimate = float(statistic(np.ones((1, count)))[0])
    if count < 2 or not resamples or math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
    low, high = np.nanquantile(statistic(drawn), [0.025, 0.975])
    return Interval(estimate, float(low), float(high))
