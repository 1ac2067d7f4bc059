"""Metrics of answers against hand-computed numbers.

Run: pytest tests/evaluation/test_metrics.py
"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.evaluation.metrics import exact_match, majority_share, rate, token_f1


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("left lung", "left lung", 1.0),
        ("The left lung.", "left lung", 1.0),
        ("lung", "left lung", 2 / 3),  # precision 1, recall 1/2
        ("left upper lung base", "left lung", 2 / 3),  # precision 1/2, recall 1
        ("right kidney", "left lung", 0.0),
        ("lung lung", "left lung", 0.5),  # the second "lung" matches nothing: 1/2 and 1/2
        ("lung lung left", "left lung lung", 1.0),
        ("two cysts", "2 cysts", 1.0),
        ("abnormal", "normal", 0.0),
        ("", "left", 0.0),
        ("...", "?", 1.0),
        (None, "left", 0.0),
    ],
)
def test_token_f1(prediction: str | None, gold: str, f1: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(f1, abs=1e-12)


@given(st.text("abc .", max_size=12), st.text("abc .", max_size=12))
def test_token_f1_is_symmetric_bounded_and_1_for_exact_matches(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1
    if exact_match(one, other):
        assert token_f1(one, other) == 1


def test_exact_match() -> None:
    assert exact_match("No.", "no") == 1
    assert exact_match("abnormal", "no") == 0
    assert exact_match(None, "no") == 0


def test_rates() -> None:
    assert rate([True, False, False, False]) == 0.25
    assert math.isnan(rate([]))
    assert majority_share(["A", "B", "B", "C"]) == 0.5
    assert math.isnan(majority_share([]))
