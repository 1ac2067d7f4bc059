"""Agreement of raters against statsmodels, a published example and a plain computation over all pairs.

Run: pytest tests/evaluation/statistics/test_raters.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from medvqa_rl.evaluation.statistics.raters import (
    Scale,
    alpha_interval,
    kappa_interval,
)

# Krippendorff (2011), section "Nominal data, any number of observers, missing data": 4 observers, 12 units, 0 is none.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
)
UNITS = [[int(value) for value in column if value] for column in PUBLISHED.T]
grades = st.integers(0, 3)


@given(st.lists(st.tuples(grades, grades), min_size=2, max_size=60))
def test_quadratic_kappa_equals_statsmodels(rows: list[tuple[int, int]]) -> None:
    first, second = zip(*rows)
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    ours = kappa_interval(first, second, range(len(first)), levels=4, scale="interval", resamples=0).estimate
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(ours), "one rater always says the same"
    else:
        assert ours == pytest.approx(float(reference_kappa(table, wt="quadratic").kappa), abs=1e-12)


@pytest.mark.parametrize(("scale", "expected"), [("nominal", 0.743), ("interval", 0.849)])
def test_alpha_equals_the_published_example(scale: Scale, expected: float) -> None:
    assert alpha(UNITS, levels=6, scale=scale) == pytest.approx(expected, abs=5e-4)


def alpha(units: list[list[int]], *, levels: int, scale: Scale) -> float:
    return alpha_interval(units, range(len(units)), levels=levels, scale=scale, resamples=0).estimate


def plain_alpha(units: list[list[int]], distance: Callable[[int, int], float]) -> float:
    """1 - D_o / D_e, pair by pair."""
    units = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in units for value in unit]
    count = len(everything)
    if not count:
        return math.nan
    observed = sum(distance(a, b) / (len(unit) - 1) for unit in units for a, b in permutations(unit, 2)) / count
    expected = sum(distance(a, b) for a, b in permutations(everything, 2)) / (count * (count - 1))
    return 1 - observed / expected if expected else math.nan


@given(st.lists(st.lists(grades, max_size=4), max_size=12))
def test_alpha_equals_a_sum_over_all_pairs(units: list[list[int]]) -> None:
    nominal = alpha(units, levels=4, scale="nominal")
    interval = alpha(units, levels=4, scale="interval")
    assert nominal == pytest.approx(plain_alpha(units, lambda a, b: float(a != b)), abs=1e-12, nan_ok=True)
    assert interval == pytest.approx(plain_alpha(units, lambda a, b: (a - b) ** 2), abs=1e-12, nan_ok=True)


def test_intervals_resample_clusters() -> None:
    generator = np.random.default_rng(0)
    first = generator.integers(0, 4, 300)
    second = np.clip(first + generator.integers(-1, 2, 300), 0, 3)
    kappa = kappa_interval(first, second, range(300), levels=4, scale="interval")  # type: ignore[arg-type]
    units = [list(pair) for pair in zip(first, second)]
    total = alpha_interval(units, range(300), levels=4, scale="interval")
    for found in (kappa, total):
        assert found.low < found.estimate < found.high and found.high - found.low < 0.15
    assert total.estimate == pytest.approx(kappa.estimate, abs=0.01), "the same up to the sharing of marginals"
    twice = alpha_interval(units * 2, [*range(300), *range(300)], levels=4, scale="interval")
    assert twice.high - twice.low == pytest.approx(total.high - total.low, rel=0.05)
    alone = alpha_interval(units, [0] * 300, levels=4, scale="interval")
    assert math.isnan(alone.low) and alone.estimate == pytest.approx(total.estimate)


def test_items_without_two_ratings_have_no_agreement() -> None:
    assert math.isnan(alpha([[1], [2], []], levels=4, scale="nominal"))
    assert math.isnan(alpha([[1, 1], [1, 1]], levels=4, scale="nominal"))
