"""Drops and jumps of curves, against curves whose drops and jumps are known and a plain search.

Run: pytest tests/report/test_stability.py
"""

from __future__ import annotations

import math
from statistics import fmean, variance

import numpy as np
import pytest

from medvqa_rl.report.stability import abrupt_changes, largest_change, largest_drop, window_for

NOISE = np.random.default_rng(7).normal(0, 0.02, 200).tolist()


def test_the_largest_drop_by_hand() -> None:
    # Means of two: 1.5, 2.5, 3, 2.5, 1.5, 2.5: from 3 at step 40 to 1.5 at step 60.
    drop = largest_drop([10, 20, 30, 40, 50, 60, 70], [1, 2, 3, 3, 2, 1, 4], 2)
    assert (drop.size, drop.top, drop.bottom) == (1.5, 40, 60)
    never = largest_drop([1, 2, 3], [1, 2, 3], 1)
    assert never.size == 0 and math.isnan(never.top)


def test_the_largest_drop_by_trying_all_pairs() -> None:
    steps, values = list(range(200)), [math.sin(step / 20) + noise for step, noise in enumerate(NOISE)]
    means = [fmean(values[end - 9 : end + 1]) for end in range(9, 200)]
    best = max(means[s] - means[t] for t in range(len(means)) for s in range(t + 1))
    drop = largest_drop(steps, values, 10)
    assert drop.size == pytest.approx(best)
    assert means[int(drop.top) - 9] - means[int(drop.bottom) - 9] == pytest.approx(best)


def test_jumps_are_found_where_they_are() -> None:
    steps = list(range(1, 201))
    values = [noise + (0.5 if 80 < step <= 150 else 0.0) for step, noise in zip(steps, NOISE)]
    found = abrupt_changes(steps, values, 10, 3.0)
    assert [change.step for change in found] == [81, 151]
    assert found[0].change == pytest.approx(0.5, abs=0.03) and found[1].change == pytest.approx(-0.5, abs=0.03)
    before, after = values[70:80], values[80:90]
    expected = (fmean(after) - fmean(before)) / math.sqrt((variance(before) + variance(after)) / 2)
    assert found[0].deviations == pytest.approx(expected)
    assert largest_change(steps, values, 10) in found
    assert abrupt_changes(steps, NOISE, 10, 3.0) == []


def test_a_jump_between_flat_stretches_is_infinitely_abrupt() -> None:
    change = largest_change(list(range(40)), [0.0] * 20 + [1.0] * 20, 10)
    assert (change.step, change.change, change.deviations) == (20, 1.0, math.inf)
    assert largest_change(list(range(40)), [0.0] * 40, 10).deviations == 0.0


def test_stretches_are_a_twentieth_within_bounds() -> None:
    assert [window_for(count) for count in (20, 199, 300, 2000, 10_000)] == [10, 10, 15, 100, 100]
