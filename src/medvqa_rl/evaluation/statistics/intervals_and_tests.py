"""Intervals and tests for clustered data: many questions share one image. Imports no torch.

Questions about the same image are not independent, so intervals resample whole images and permutations flip whole
images. Random procedures are seeded, and results are exact wherever that is feasible.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binomtest, norm

Method = Literal["bca", "percentile"]
"""How the bounds are derived from the resampled estimates."""
Floats = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)

LEVELS = ((1 - 0.95) / 2, (1 + 0.95) / 2)
"""Quantile levels of a 95 % interval."""

_DRAWS_AT_ONCE = 4_000_000  # cluster draws in memory at a time (32 MB as int64)
_MOST_STATES = 10_000_000  # limit of the exact permutation distribution: number of clusters times the sum of all


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; the bounds are NaN for fewer than two clusters."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """The three numbers by name."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def _per_cluster(values: ArrayLike, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """(K,) sums and (K,) counts of the values in each cluster, in order of appearance."""
    numbers = np.asarray(values, dtype=np.float64)
    assert numbers.ndim == 1 and len(numbers) == len(clusters) > 0, "one cluster per value, and at least one value"
    assert np.isfinite(numbers).all(), "unscored values must be excluded"
    positions: dict[Hashable, int] = {}
    index = np.array([positions.setdefault(cluster, len(positions)) for cluster in clusters])
    sums: Floats = np.bincount(index, weights=numbers).astype(np.float64)
    return sums, np.bincount(index).astype(np.float64)


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Mean of values with an interval from resampling whole clusters.

    All K clusters are drawn with replacement; a resample's mean is (sum of all values in the drawn clusters) /
    (number of these values). The 95 % interval is, with ``percentile``, bounded by the 2.5 % and 97.5 % quantiles of
    the resampled means (linear interpolation); ``bca`` corrects both quantiles for bias and skewness (Efron 1987;
    Davison and Hinkley 1997, section 5.3.2), with a jackknife over whole clusters and ties counted half. Intervals
    have zero width if all clusters have the same mean (see :func:`proportion_interval` for proportions) and are
    somewhat too narrow below about 20 clusters, so report the number of clusters beside them.

    Args:
        values: (N,) finite numbers, such as 0 for wrong and 1 for correct.
        clusters: (N,) cluster of each value, such as its image.
        resamples: number of bootstrap resamples.
        seed: of NumPy's PCG64 generator; equal inputs give equal intervals.
        method: ``bca`` or ``percentile``.
    """
    sums, sizes = _per_cluster(values, clusters)
    count = len(sums)
    estimate = float(sums.sum() / sizes.sum())
    if count < 2:
        return Interval(estimate, math.nan, math.nan)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(resamples)
    rows = max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, count, size=(min(rows, resamples - start), count))
        means[start : start + rows] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    levels = np.array(LEVELS)
    if method == "bca":
        levels = _bca_levels(means, estimate, sums, sizes, levels)
    low, high = np.quantile(means, levels)
    return Interval(estimate, float(low), float(high))


def _bca_levels(means: Floats, estimate: float, sums: Floats, sizes: Floats, levels: Floats) -> Floats:
    """The quantile levels that BCa uses in place of the nominal ones."""
    tolerance = 1e-12 * max(1.0, abs(estimate))  # equal estimates may differ by rounding
    below = np.mean(means < estimate - tolerance)
    share = below + np.mean(np.abs(means - estimate) <= tolerance) / 2
    if not 0 < share < 1:
        return levels  # no resample on one side: only with very few resamples
    bias = norm.ppf(share)
    remaining = sizes.sum() - sizes
    jackknife = (sums.sum() - sums) / remaining
    deviation = jackknife.mean() - jackknife
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5) if spread > tolerance**2 else 0.0
    shifted = bias + norm.ppf(levels)
    return np.asarray(norm.cdf(bias + shifted / (1 - acceleration * shifted)), dtype=np.float64)


def proportion_interval(
    flags: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Share of true flags, with the interval of :func:`cluster_bootstrap`.

    If all flags are equal, so are all resamples, and the bootstrap interval would have zero width. The bound is then
    that of Clopper and Pearson (1934) with clusters as independent trials: 0.025 ** (1 / K), or 1
    minus that. It counts the questions of an image as one.
    """
    values = np.asarray(flags, dtype=np.float64)
    interval = cluster_bootstrap(values, clusters, resamples=resamples, seed=seed, method=method)
    count = len(set(clusters))
    if count < 2 or 0 < values.sum() < len(values):
        return interval
    bound = float(beta.ppf(LEVELS[0], count, 1))
    return Interval(interval.estimate, bound, 1.0) if values[0] else Interval(interval.estimate, 0.0, 1 - bound)


def paired_cluster_bootstrap(
    before: ArrayLike,
    after: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Mean of after - before on the same questions, with an interval from resampling whole clusters.

    The two values of a question stay together, so what they share, such as its difficulty, cancels.

    Args:
        before: (N,) finite values.
        after: (N,) finite values of the same questions in the same order.
        clusters: (N,) cluster of each question.
        resamples: see :func:`cluster_bootstrap`, as are seed and method.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return cluster_bootstrap(difference, clusters, resamples=resamples, seed=seed, method=method)


def paired_difference_interval(
    before: Sequence[bool],
    after: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Difference of two rates on the same questions, with the interval of :func:`paired_cluster_bootstrap`.

    If all clusters have the same mean difference d, as without any change, the bootstrap interval would have zero
    width. By Clopper and Pearson (1934), with clusters as independent trials, at most b = 1 - 0.025 ** (1 / K) of all
    clusters differ from d; as their differences lie in [-1, 1], the interval is d - b (d + 1) to d + b (1 - d).
    """
    interval = paired_cluster_bootstrap(before, after, clusters, resamples=resamples, seed=seed, method=method)
    sums, sizes = _per_cluster(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), clusters)
    if len(sums) < 2 or np.ptp(sums / sizes) > 0:
        return interval
    d, share = interval.estimate, 1 - float(beta.ppf(LEVELS[0], len(sums), 1))
    return Interval(d, d - share * (d + 1), d + share * (1 - d))


@dataclass(frozen=True)
class SeededInterval(Interval):
    """Result of :func:`seeds_and_clusters_bootstrap`."""

    standard_error: float
    """Standard deviation of the resampled means."""


def seeds_and_clusters_bootstrap(
    values: Mapping[K, ArrayLike],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[K, SeededInterval]:
    """Mean over training seeds and questions, with an interval from resampling both seeds and whole clusters.

    The S seeds and, independently, the K clusters are drawn with replacement (pigeonhole bootstrap, Owen 2007,
    arXiv 0712.1111); a resample's mean is that of the drawn clusters' values in the drawn seeds. Bounds are
    percentiles. With one seed, only the clusters vary. With few seeds, the variance between them is underestimated by
    a factor of (S - 1) / S, so report each seed as well.

    Args:
        values: by name, (S, N) finite numbers for the same N questions in every seed. S may differ between names;
            names with the same S share their resamples, because drawing takes longest.
        clusters: (N,) cluster of each question, such as its image.
        resamples: see :func:`cluster_bootstrap`, as is seed.
    """
    numbers = {name: np.asarray(given, dtype=np.float64) for name, given in values.items()}
    assert all(rows.ndim == 2 and len(rows) for rows in numbers.values()), "one row per seed"
    sums = {name: np.stack([_per_cluster(row, clusters)[0] for row in rows]) for name, rows in numbers.items()}
    sizes = _per_cluster(np.zeros(len(clusters)), clusters)[1]
    means: dict[K, Floats] = {}
    for num_seeds in {len(rows) for rows in sums.values()}:
        alike = {name: rows for name, rows in sums.items() if len(rows) == num_seeds}
        means |= _resampled_means(alike, sizes, resamples=resamples, seed=seed)
    intervals = {}
    for name, rows in numbers.items():
        low, high = np.quantile(means[name], LEVELS)
        intervals[name] = SeededInterval(float(rows.mean()), float(low), float(high), float(means[name].std(ddof=1)))
    return intervals


def _resampled_means(sums: Mapping[K, Floats], sizes: Floats, *, resamples: int, seed: int) -> dict[K, Floats]:
    """(R,) means of the drawn clusters in the drawn seeds; NaN for fewer than two clusters.

    Args:
        sums: (S, K) sums by name, with the same S.
        sizes: (K,) number of questions of each cluster.
    """
    num_seeds, count = next(iter(sums.values())).shape
    means = {name: np.full(resamples, math.nan) for name in sums}
    if count < 2:
        return means
    generator = np.random.Generator(np.random.PCG64(seed))
    seed_weights = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=resamples)  # (R, S)
    rows = max(1, _DRAWS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        chunk = slice(start, min(start + rows, resamples))
        drawn = generator.multinomial(count, [1 / count] * count, size=chunk.stop - start).astype(np.float64)  # (r, K)
        totals = num_seeds * (drawn @ sizes)
        for name, values in sums.items():
            means[name][chunk] = (seed_weights[chunk] * (drawn @ values.T)).sum(axis=1) / totals
    return means


def cluster_standard_error(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean of clustered values.

    sqrt(K / (K - 1) * sum over clusters of (S_k - m_k * mean)^2) / N for sums S_k and sizes m_k: the linearised ratio
    estimator (Cochran 1977, section 11.8), which is also the cluster-robust error (CR1) of a regression on a constant.
    NaN for fewer than two clusters.
    """
    sums, sizes = _per_cluster(values, clusters)
    count, total = len(sums), sizes.sum()
    if count < 2:
        return math.nan
    residuals = sums - sizes * sums.sum() / total
    return float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / total)


def effective_n(values: ArrayLike, clusters: Sequence[Hashable]) -> float:
    """Number of independent questions with the same information: N / design effect (Kish 1965).

    Computed as the variance of the values over the squared :func:`cluster_standard_error`. NaN for fewer than two
    clusters and if all values are equal; may exceed N if the questions of an image are negatively correlated.
    """
    numbers = np.asarray(values, dtype=np.float64)
    error = cluster_standard_error(numbers, clusters)
    if math.isnan(error) or error == 0 or np.ptp(numbers) == 0:
        return math.nan
    return float(numbers.var(ddof=1) / error**2)


def minimum_detectable_effect(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test at level alpha detects with the given power.

    (z(1 - alpha / 2) + z(power)) * standard error (normal approximation). With the cluster standard error of the
    paired differences it holds for clustered questions. NaN if the standard error is 0 (or rounding), as when all
    clusters of a few have equal differences: that says nothing about others.
    """
    if standard_error < 1e-12:
        return math.nan
    return float((norm.ppf(1 - alpha / 2) + norm.ppf(power)) * standard_error)


@dataclass(frozen=True)
class McNemar:
    """Result of :func:`exact_mcnemar`."""

    improved: int
    """Questions answered wrong before and correctly after."""
    worsened: int
    """Questions answered correctly before and wrong after."""
    p_value: float
    """Two-sided."""


def exact_mcnemar(before: Sequence[bool], after: Sequence[bool]) -> McNemar:
    """Exact McNemar test: are changes in both directions equally likely?

    p = P(at least as uneven a split | improved ~ Binomial(improved + worsened, 1/2)), two-sided; 1 without changes.
    It treats questions as independent; :func:`cluster_permutation` does not.

    Args:
        before: (N,) whether each answer was correct.
        after: (N,) for the same questions in the same order.
    """
    assert len(before) == len(after), "the same questions before and after"
    improved = sum(now and not then for then, now in zip(before, after))
    worsened = sum(then and not now for then, now in zip(before, after))
    changed = improved + worsened
    return McNemar(improved, worsened, float(binomtest(improved, changed).pvalue) if changed else 1.0)


def cluster_permutation(
    before: ArrayLike, after: ArrayLike, clusters: Sequence[Hashable], *, resamples: int = 20_000, seed: int = 0
) -> float:
    """Two-sided p-value of a paired difference from flipping the signs of whole clusters.

    If before and after are exchangeable, the sum D_k of a cluster's differences is as likely as -D_k. The p-value is
    the share of sign patterns whose absolute total is at least the observed one. For integer sums, such as those of
    correct and wrong answers, it is computed exactly over all 2^K patterns (by convolution); with one question per
    cluster this is the exact McNemar test. Otherwise it is (1 + hits) / (1 + resamples) over random patterns (Phipson
    and Smyth 2010).

    Args:
        before: (N,) finite values.
        after: (N,) finite values of the same questions in the same order.
        clusters: (N,) cluster of each question.
        resamples: number of random patterns, if not exact.
        seed: of NumPy's PCG64 generator, if not exact.
    """
    sums, _ = _per_cluster(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64), clusters)
    observed = abs(float(sums.sum()))
    sums = np.abs(sums[sums != 0])
    if not len(sums):
        return 1.0
    if np.array_equal(sums, np.rint(sums)) and len(sums) * sums.sum() <= _MOST_STATES:
        steps = sums.astype(np.int64)
        chances = np.ones(1)  # of each total, from -reach to reach in steps of two
        for step in steps:
            wider = np.zeros(len(chances) + step)
            wider[: len(chances)] += chances / 2
            wider[step:] += chances / 2
            chances = wider
        totals = 2 * np.arange(len(chances)) - int(steps.sum())
        return min(1.0, float(chances[np.abs(totals) >= round(observed)].sum()))
    generator = np.random.Generator(np.random.PCG64(seed))
    hits = 0
    rows = max(1, _DRAWS_AT_ONCE // len(sums))
    for start in range(0, resamples, rows):
        signs = generator.integers(0, 2, size=(min(rows, resamples - start), len(sums))) * 2.0 - 1.0
        hits += int((np.abs(signs @ sums) >= observed - 1e-12 * sums.sum()).sum())
    return (1 + hits) / (1 + resamples)


def holm(p_values: Mapping[K, float]) -> dict[K, float]:
    """Adjust p-values for multiple comparisons (Holm 1979).

    An adjusted p-value is the largest (number of p-values that are not smaller) * p over all p up to its own, at most
    1. This bounds the family-wise error rate under any dependence. NaN (no test) stays NaN and does not count.
    """
    tested = sorted((p, order, name) for order, (name, p) in enumerate(p_values.items()) if not math.isnan(p))
    adjusted = dict.fromkeys(p_values, math.nan)
    highest = 0.0
    for rank, (p, _, name) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[name] = highest
    return adjusted
