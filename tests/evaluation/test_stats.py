"""Bootstrap intervals and McNemar's test against SciPy, statsmodels and theory.

Run: pytest tests/evaluation/test_stats.py
"""

import math
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medvqa_rl.evaluation.stats import cluster_bootstrap, exact_mcnemar, paired_cluster_bootstrap

GENERATOR = np.random.default_rng(1)


def test_single_value_clusters_agree_with_scipy() -> None:
    values = (GENERATOR.random(300) < 0.6).astype(float)
    ours = cluster_bootstrap(values, range(300), resamples=20_000, seed=3)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.estimate == values.mean()
    # 20,000 resamples place each bound with a Monte Carlo error below 0.0007 (one grid step is 1/300).
    assert ours.low == pytest.approx(theirs.low, abs=0.0034)
    assert ours.high == pytest.approx(theirs.high, abs=0.0034)


def test_paired_single_value_clusters_agree_with_scipy() -> None:
    before, after = GENERATOR.normal(0, 1, 150), GENERATOR.normal(0.3, 1, 150)
    ours = paired_cluster_bootstrap(before, after, range(150), resamples=20_000)
    theirs = scipy_stats.bootstrap(
        (before, after),
        lambda b, a, axis: (a - b).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert ours.estimate == pytest.approx(float((after - before).mean()), abs=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_clusters_equal_a_plain_loop_over_the_same_draws() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    clusters = ["b", "a", "b", "c", "c", "b"]
    ours = cluster_bootstrap(values, clusters, resamples=500, seed=9, confidence=0.9)
    members = [[1.0, 1.0, 0.5], [0.0], [1.0, 0.0]]  # b, a, c in order of appearance
    means = []
    for drawn in np.random.Generator(np.random.PCG64(9)).integers(0, 3, size=(500, 3)):
        resample = [value for cluster in drawn for value in members[cluster]]
        means.append(sum(resample) / len(resample))
    assert ours.estimate == pytest.approx(3.5 / 6)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=1e-12)


def test_copies_of_a_question_add_no_certainty() -> None:
    values = (GENERATOR.random(60) < 0.5).astype(float)
    once = cluster_bootstrap(values, range(60), seed=1)
    copied = cluster_bootstrap(np.repeat(values, 10), np.repeat(np.arange(60), 10).tolist(), seed=1)
    naive = cluster_bootstrap(np.repeat(values, 10), range(600), seed=1)
    assert (copied.low, copied.high) == (once.low, once.high)
    assert (naive.high - naive.low) < (once.high - once.low) / 2


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Images of unequal size with an effect of their own; the truth is 0.6. Binomial error of 300 trials: 1.3 %."""
    covered = 0
    for trial in range(300):
        generator = np.random.default_rng(trial)
        sizes = generator.integers(1, 8, size=80)
        chances = generator.beta(3, 2, size=80)
        clusters = np.repeat(np.arange(80), sizes)
        values = generator.random(len(clusters)) < np.repeat(chances, sizes)
        interval = cluster_bootstrap(values, clusters.tolist(), resamples=400, seed=trial)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.91 <= covered / 300 <= 0.98


def test_intervals_depend_on_the_seed_alone() -> None:
    values, clusters = GENERATOR.random(50), [index // 3 for index in range(50)]
    assert cluster_bootstrap(values, clusters, seed=1) == cluster_bootstrap(values, clusters, seed=1)
    assert cluster_bootstrap(values, clusters, seed=1) != cluster_bootstrap(values, clusters, seed=2)


def test_many_clusters_are_drawn_in_blocks_without_changing_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = GENERATOR.random(40), list(range(40))
    whole = cluster_bootstrap(values, clusters)
    monkeypatch.setattr("medvqa_rl.evaluation.stats._DRAWS_AT_ONCE", 100)
    assert cluster_bootstrap(values, clusters) == whole


def test_one_cluster_has_no_interval() -> None:
    interval = cluster_bootstrap([1, 0, 1], ["a", "a", "a"])
    assert interval.estimate == pytest.approx(2 / 3)
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_an_evaluation_of_usual_size_takes_a_moment() -> None:
    start = time.perf_counter()
    cluster_bootstrap(GENERATOR.random(600), range(600), resamples=2000)
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(("both", "improved", "worsened", "neither"), [(5, 9, 2, 4), (0, 3, 3, 0), (9, 0, 6, 1)])
def test_mcnemar_agrees_with_statsmodels(both: int, improved: int, worsened: int, neither: int) -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    before = [True] * both + [False] * improved + [True] * worsened + [False] * neither
    after = [True] * both + [True] * improved + [False] * worsened + [False] * neither
    result = exact_mcnemar(before, after)
    assert (result.improved, result.worsened) == (improved, worsened)
    theirs = tables.mcnemar([[both, worsened], [improved, neither]], exact=True)
    assert result.p_value == pytest.approx(theirs.pvalue, rel=1e-12)


def test_mcnemar_by_hand() -> None:
    # 5 changes, all for the better: 2 * (1/2)**5.
    assert exact_mcnemar([False] * 5 + [True], [True] * 6).p_value == pytest.approx(0.0625)
    assert exact_mcnemar([True, False], [True, False]).p_value == 1.0
