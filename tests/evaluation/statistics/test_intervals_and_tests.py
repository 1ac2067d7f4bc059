"""Intervals and tests against SciPy, statsmodels, theory and simulation.

Run: pytest tests/evaluation/statistics/test_intervals_and_tests.py
"""

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from medvqa_rl.evaluation.statistics import intervals_and_tests
from medvqa_rl.evaluation.statistics.intervals_and_tests import (
    Method,
    cluster_bootstrap,
    cluster_permutation,
    cluster_standard_error,
    effective_n,
    exact_mcnemar,
    holm,
    minimum_detectable_effect,
    paired_cluster_bootstrap,
    paired_difference_interval,
    proportion_interval,
    seeds_and_clusters_bootstrap,
)

GENERATOR = np.random.default_rng(1)


METHODS: tuple[tuple[Method, str], ...] = (("percentile", "percentile"), ("bca", "BCa"))


@pytest.mark.parametrize(("method", "name"), METHODS)
def test_single_value_clusters_agree_with_scipy(method: Method, name: str) -> None:
    values = (GENERATOR.random(300) < 0.6).astype(float)
    ours = cluster_bootstrap(values, range(300), resamples=20_000, seed=3, method=method)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=name, rng=np.random.default_rng(4)
    ).confidence_interval
    assert ours.estimate == values.mean()
    # 20,000 resamples place each bound with a Monte Carlo error below 0.0007 (one grid step is 1/300).
    assert ours.low == pytest.approx(theirs.low, abs=0.0034)
    assert ours.high == pytest.approx(theirs.high, abs=0.0034)


def test_paired_single_value_clusters_agree_with_scipy() -> None:
    before, after = GENERATOR.normal(0, 1, 150), GENERATOR.normal(0.3, 1, 150)
    ours = paired_cluster_bootstrap(before, after, range(150), resamples=20_000, method="percentile")
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
    ours = cluster_bootstrap(values, clusters, resamples=500, seed=9, method="percentile")
    members = [[1.0, 1.0, 0.5], [0.0], [1.0, 0.0]]  # b, a, c in order of appearance
    means = []
    for drawn in np.random.Generator(np.random.PCG64(9)).integers(0, 3, size=(500, 3)):
        resample = [value for cluster in drawn for value in members[cluster]]
        means.append(sum(resample) / len(resample))
    assert ours.estimate == pytest.approx(3.5 / 6)
    assert (ours.low, ours.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_copies_of_a_question_do_not_narrow_the_interval() -> None:
    values = (GENERATOR.random(60) < 0.5).astype(float)
    once = cluster_bootstrap(values, range(60), seed=1)
    copied = cluster_bootstrap(np.repeat(values, 10), np.repeat(np.arange(60), 10).tolist(), seed=1)
    naive = cluster_bootstrap(np.repeat(values, 10), range(600), seed=1)
    assert (copied.low, copied.high) == (once.low, once.high)
    assert (naive.high - naive.low) < (once.high - once.low) / 2


def test_bca_of_unequal_clusters_agrees_with_scipy() -> None:
    """SciPy resamples pairs (sum, size) of clusters; skewed values, so that BCa differs from the percentiles."""
    sizes = GENERATOR.integers(1, 6, size=60)
    clusters = np.repeat(np.arange(60), sizes)
    values = GENERATOR.exponential(1.0, len(clusters)) * np.repeat(GENERATOR.exponential(1.0, 60), sizes)
    ours = cluster_bootstrap(values, clusters.tolist(), resamples=20_000)
    theirs = scipy_stats.bootstrap(
        (np.bincount(clusters, weights=values), sizes.astype(float)),
        lambda sums, counts, axis: sums.sum(axis=axis) / counts.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="BCa",
        rng=np.random.default_rng(6),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)
    plain = cluster_bootstrap(values, clusters.tolist(), resamples=20_000, method="percentile")
    assert ours.high - plain.high > 0.04 * width


def study(seed: int, num_images: int = 120) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models on images with different numbers of questions and an image effect; true accuracies 0.6 and 0.65."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 8, size=num_images)
    chances = np.repeat(generator.beta(3, 2, size=num_images), sizes)
    lift = np.repeat(generator.uniform(0.0, 0.25, size=num_images), sizes)
    luck = generator.random(len(chances))
    before, after = luck < chances, luck < chances + lift * (1 - chances)
    return before.astype(float), after.astype(float), np.repeat(np.arange(num_images), sizes)


@pytest.mark.slow
def test_intervals_have_their_nominal_coverage() -> None:
    """1,000 studies of 120 images and about 480 questions. Binomial error of the share: 0.7 %."""
    covered = {"bca": 0, "percentile": 0, "difference": 0, "naive": 0}
    for trial in range(1000):
        before, after, clusters = study(trial)
        images = clusters.tolist()
        bca = cluster_bootstrap(before, images, resamples=1000, seed=trial)
        plain = cluster_bootstrap(before, images, resamples=1000, seed=trial, method="percentile")
        difference = paired_cluster_bootstrap(before, after, images, resamples=1000, seed=trial)
        error = 1.96 * before.std(ddof=1) / math.sqrt(len(before))
        covered["bca"] += bca.low <= 0.6 <= bca.high
        covered["percentile"] += plain.low <= 0.6 <= plain.high
        covered["difference"] += difference.low <= 0.05 <= difference.high
        covered["naive"] += abs(before.mean() - 0.6) <= error
    assert 930 <= covered["bca"] <= 970
    assert 930 <= covered["percentile"] <= 970
    assert 930 <= covered["difference"] <= 970
    assert covered["naive"] < 900  # what taking questions as independent would have claimed


def test_equal_answers_do_not_give_a_zero_width_interval() -> None:
    clusters = [index // 3 for index in range(60)]
    assert cluster_bootstrap([1.0] * 60, clusters).low == 1.0
    interval = proportion_interval([True] * 60, clusters)
    theirs = scipy_stats.binomtest(20, 20).proportion_ci(0.95, method="exact")
    assert (interval.estimate, interval.low, interval.high) == (1.0, pytest.approx(theirs.low), 1.0)
    interval = proportion_interval([False] * 60, clusters)
    assert (interval.estimate, interval.low, interval.high) == (0.0, 0.0, pytest.approx(1 - theirs.low))
    mixed = [True] * 59 + [False]
    assert proportion_interval(mixed, clusters) == cluster_bootstrap(mixed, clusters)


def test_equal_differences_do_not_give_a_zero_width_interval() -> None:
    """With K images, a share of changed ones with 0.975 probability of showing none of them has (1 - b)^K = 0.025."""
    flags, clusters = [True, False, True, True, False, False], [0, 0, 1, 1, 2, 2]
    bound = 1 - 0.025 ** (1 / 3)
    same = paired_difference_interval(flags, flags, clusters)
    assert (same.estimate, same.low, same.high) == (0, pytest.approx(-bound), pytest.approx(bound))
    twelve = paired_difference_interval([True] * 12, [True] * 12, range(12))
    assert twelve.high == -twelve.low == pytest.approx(scipy_stats.binomtest(0, 12).proportion_ci(0.95, "exact").high)
    better = paired_difference_interval([False] * 6, [True] * 6, clusters)
    assert (better.estimate, better.low, better.high) == (1, pytest.approx(1 - 2 * bound), 1)
    swapped = paired_difference_interval([True, False] * 3, [False, True] * 3, clusters)  # one up, one down per image
    assert (swapped.low, swapped.high) == (pytest.approx(-bound), pytest.approx(bound))
    assert math.isnan(paired_difference_interval(flags, flags, [0] * 6).low)


def test_intervals_depend_on_the_seed_alone() -> None:
    values, clusters = GENERATOR.random(50), [index // 3 for index in range(50)]
    assert cluster_bootstrap(values, clusters, seed=1) == cluster_bootstrap(values, clusters, seed=1)
    assert cluster_bootstrap(values, clusters, seed=1) != cluster_bootstrap(values, clusters, seed=2)


def test_many_clusters_are_drawn_in_blocks_without_changing_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = GENERATOR.random(40), list(range(40))
    whole = cluster_bootstrap(values, clusters)
    monkeypatch.setattr("medvqa_rl.evaluation.statistics.intervals_and_tests._DRAWS_AT_ONCE", 100)
    assert cluster_bootstrap(values, clusters) == whole


def test_one_cluster_has_no_interval() -> None:
    interval = cluster_bootstrap([1, 0, 1], ["a", "a", "a"])
    assert interval.estimate == pytest.approx(2 / 3)
    assert math.isnan(interval.low) and math.isnan(interval.high)


def test_an_evaluation_of_usual_size_is_fast() -> None:
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
    # 5 changes, all improvements: 2 * (1/2)**5.
    assert exact_mcnemar([False] * 5 + [True], [True] * 6).p_value == pytest.approx(0.0625)
    assert exact_mcnemar([True, False], [True, False]).p_value == 1.0


def random_pairs(seed: int, count: int) -> tuple[list[bool], list[bool]]:
    generator = np.random.default_rng(seed)
    return (generator.random(count) < 0.5).tolist(), (generator.random(count) < 0.6).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_permuting_single_questions_is_mcnemar(seed: int) -> None:
    before, after = random_pairs(seed, 80)
    p = cluster_permutation(np.array(before), np.array(after), range(80))
    assert p == pytest.approx(exact_mcnemar(before, after).p_value, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_exact_cluster_permutation_agrees_with_scipy(seed: int) -> None:
    before, after = random_pairs(seed, 40)
    clusters = [index // 4 for index in range(40)]
    sums = [np.reshape(values, (10, 4)).sum(axis=1).astype(float) for values in (before, after)]
    theirs = scipy_stats.permutation_test(
        sums, lambda one, other: other.sum() - one.sum(), permutation_type="samples", n_resamples=np.inf
    )
    assert cluster_permutation(np.array(before), np.array(after), clusters) == pytest.approx(theirs.pvalue, rel=1e-9)


def test_random_permutations_of_fractions_agree_with_all_of_them() -> None:
    before, after = GENERATOR.random(24), GENERATOR.random(24) + 0.12
    clusters = [index // 2 for index in range(24)]
    sums = np.bincount(clusters, weights=after - before)
    signs = 1 - 2 * ((np.arange(2**12)[:, None] >> np.arange(12)) & 1)
    exact = float(np.mean(np.abs(signs @ sums) >= abs(sums.sum()) - 1e-12))
    assert 0.005 < exact < 0.9
    found = cluster_permutation(before, after, clusters, resamples=40_000)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))


def test_permutation_by_hand() -> None:
    # Two images, +2 and +1: totals 3, 1, -1, -3 are equally likely.
    before, after, clusters = [0, 0, 0], [1, 1, 1], ["x", "x", "y"]
    assert cluster_permutation(before, after, clusters) == pytest.approx(0.5)
    assert cluster_permutation(before, before, clusters) == 1.0
    assert cluster_permutation([1, 0], [0, 1], ["x", "x"]) == 1.0


def test_permutation_holds_its_level_where_mcnemar_does_not() -> None:
    """No difference, but the questions of an image change together. Binomial error of 1,000 trials: 0.7 %."""
    rejected = {"permutation": 0, "mcnemar": 0}
    for trial in range(1000):
        generator = np.random.default_rng(trial)
        turns = np.repeat(generator.integers(-1, 2, size=60), 5)  # an image gets worse, stays or gets better
        follows = generator.random(300) < 0.5
        before = generator.random(300) < 0.5
        after = np.where(follows & (turns != 0), turns > 0, before)
        before = np.where(follows & (turns != 0), turns < 0, before)
        rejected["permutation"] += cluster_permutation(before, after, np.repeat(np.arange(60), 5).tolist()) <= 0.05
        rejected["mcnemar"] += exact_mcnemar(before.tolist(), after.tolist()).p_value <= 0.05
    assert rejected["permutation"] <= 70
    assert rejected["permutation"] >= 25
    assert rejected["mcnemar"] > 120


def test_holm_agrees_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = dict(enumerate([0.01, 0.04, 0.03, 0.005, 0.04, 0.9, 0.2]))
    theirs = multitest.multipletests(list(p_values.values()), method="holm")[1]
    assert list(holm(p_values).values()) == pytest.approx(list(theirs), rel=1e-12)
    with_hole = holm({**p_values, "none": math.nan})
    assert math.isnan(with_hole.pop("none")) and with_hole == holm(p_values)
    assert holm({}) == {}


def test_standard_error_agrees_with_cluster_robust_regression() -> None:
    regression = pytest.importorskip("statsmodels.api")
    before, _, clusters = study(3)
    fit = regression.OLS(before, np.ones(len(before))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    # statsmodels multiplies by (N - 1) / (N - 1 parameter) = 1 besides K / (K - 1)
    assert cluster_standard_error(before, clusters.tolist()) == pytest.approx(float(fit.bse[0]), rel=1e-9)
    assert math.isnan(cluster_standard_error([0, 1], ["x", "x"]))


def test_effective_n() -> None:
    values = (GENERATOR.random(200) < 0.5).astype(float)
    assert effective_n(values, range(200)) == pytest.approx(200, rel=1e-9)
    copied = effective_n(np.repeat(values, 4), np.repeat(np.arange(200), 4).tolist())
    assert copied == pytest.approx(200, rel=0.01)  # four copies tell no more
    assert math.isnan(effective_n([1, 1, 1], ["x", "y", "z"])) and math.isnan(effective_n([1, 0], ["x", "x"]))


def test_minimum_detectable_effect_agrees_with_statsmodels_and_holds_its_power() -> None:
    assert math.isnan(minimum_detectable_effect(0.0)) and math.isnan(minimum_detectable_effect(math.nan))
    power = pytest.importorskip("statsmodels.stats.power")
    theirs = power.NormalIndPower(ddof=0).solve_power(nobs1=451, alpha=0.05, power=0.8, ratio=0)
    assert minimum_detectable_effect(1 / math.sqrt(451)) == pytest.approx(theirs, rel=1e-4)
    # A quarter of 451 answers differ: 6.6 points are detected with 80 % power.
    assert minimum_detectable_effect(math.sqrt(0.25 / 451)) == pytest.approx(0.066, abs=0.0005)
    effect, found = minimum_detectable_effect(0.02), 0
    for observed in GENERATOR.normal(effect, 0.02, 20_000):
        found += abs(observed) > 1.959964 * 0.02
    assert found / 20_000 == pytest.approx(0.8, abs=0.01)


def test_resampling_seeds_and_images_has_the_spread_of_all_draws() -> None:
    """Two seeds and three images: every one of 2^2 * 3^3 equally likely draws, by hand."""
    values = np.array([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    clusters = ["a", "a", "b", "c"]
    members = {"a": [0, 1], "b": [2], "c": [3]}
    means = []
    for seeds in itertools.product(range(2), repeat=2):
        for drawn in itertools.product("abc", repeat=3):
            columns = [column for name in drawn for column in members[name]]
            means.append(np.mean([values[seed][column] for seed in seeds for column in columns]))
    found = seeds_and_clusters_bootstrap({"": values}, clusters, resamples=40_000)[""]
    assert found.estimate == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(np.std(means), rel=0.02)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_several_sets_of_values_share_draws_and_get_the_intervals_of_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(6)
    clusters = [str(number // 2) for number in range(60)]
    values = {f"{seeds} seeds, {arm}": generator.integers(0, 2, (seeds, 60)) for seeds in (1, 3) for arm in range(4)}
    alone = {name: seeds_and_clusters_bootstrap({name: rows}, clusters)[name] for name, rows in values.items()}
    drawn, exact = list[tuple[int, ...]](), intervals_and_tests._resampled_means

    def count(sums: Any, sizes: Any, **rest: Any) -> Any:
        drawn.append(next(iter(sums.values())).shape)
        return exact(sums, sizes, **rest)

    monkeypatch.setattr(intervals_and_tests, "_resampled_means", count)
    assert seeds_and_clusters_bootstrap(values, clusters) == alone
    assert sorted(drawn) == [(1, 30), (3, 30)]  # once per number of seeds, not once per arm


def test_one_seed_is_the_bootstrap_of_images() -> None:
    generator = np.random.default_rng(5)
    values, clusters = generator.integers(0, 2, 90), [str(number // 3) for number in range(90)]
    one = seeds_and_clusters_bootstrap({"": values[None]}, clusters, resamples=20_000)[""]
    other = cluster_bootstrap(values, clusters, resamples=20_000, method="percentile")
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.01)
    assert math.isnan(seeds_and_clusters_bootstrap({"": [[1.0, 0.0]]}, ["a", "a"])[""].low)
