"""The worth of a warm-up in RL steps, against values computed by hand.

Run: pytest tests/study/test_steps_worth.py
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.study.steps_worth import accuracy_curve, mean_curve, steps_to_reach, steps_worth


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ({0: 0.5, 100: 0.7}, 0.6, 50.0),  # half way
        ({0: 0.5, 100: 0.7, 200: 0.8}, 0.75, 150.0),
        ({0: 0.5, 100: 0.7}, 0.4, 0.0),  # reached before the first step
        ({0: 0.5, 100: 0.7}, 0.71, math.inf),
        # 0.6 and 0.4 are pooled to 0.5: a lucky point does not count as reached.
        ({0: 0.4, 50: 0.6, 100: 0.4, 150: 0.8}, 0.6, 100 + 50 * (0.6 - 0.5) / (0.8 - 0.5)),
        ({0: 0.5}, 0.5, 0.0),
    ],
)
def test_steps_to_an_accuracy(curve: dict[int, float], target: float, expected: float) -> None:
    assert steps_to_reach(curve, target) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_accuracy_is_never_reached_earlier(values: list[float], one: float, other: float) -> None:
    curve = {25 * index: value for index, value in enumerate(values)}
    assert steps_to_reach(curve, min(one, other)) <= steps_to_reach(curve, max(one, other))


def test_curves_are_read_and_averaged_where_all_seeds_have_a_point() -> None:
    rows = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1, "reward": 2.0}, {"step": 25, "eval/accuracy": 0.6}]
    assert accuracy_curve(rows) == {0: 0.5, 25: 0.6}
    assert mean_curve([{0: 0.5, 25: 0.6}, {0: 0.7, 50: 0.9}]) == {0: pytest.approx(0.6)}


def test_a_warm_up_is_worth_the_steps_to_its_accuracy() -> None:
    reference = [{0: 0.5, 100: 0.7}, {0: 0.5, 100: 0.9}]  # mean 0.5 to 0.8
    worth = steps_worth([{0: 0.6, 50: 0.9}, {0: 0.7, 50: 0.9}], reference)
    assert worth is not None and worth.accuracy == pytest.approx(0.65) and worth.longest == 100
    assert worth.steps.estimate == pytest.approx(50.0)
    # With the first seed alone 0.6 on 0.5 to 0.7, with the second 0.7 on 0.5 to 0.9: both 50.
    assert worth.steps.low == pytest.approx(50.0) and worth.steps.high == pytest.approx(50.0)
    beyond = steps_worth([{0: 0.75}, {0: 0.75}], reference)
    assert beyond is not None and beyond.steps.estimate == pytest.approx(100 * 0.25 / 0.3)
    assert beyond.steps.high == math.inf  # the first seed's curve ends at 0.7
    assert steps_worth([{}], [{0: 0.5}]) is None
