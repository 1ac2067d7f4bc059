"""Numbers, lists and yes or no as text.

Run: pytest tests/core/test_text.py
"""

import math

import pytest

from medvqa_rl.core.text import first_few, format_p, format_points, format_range, is_yes_no


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "< 0.001"),
        (0.000999, "< 0.001"),
        (0.001, "0.001"),
        (0.04, "0.040"),
        (1, "1.000"),
        (math.nan, ""),
        (None, ""),
    ],
)
def test_p_values(value: float | None, expected: str) -> None:
    assert format_p(value) == expected


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [(0.5, "", "50.0"), (0.0123, "+", "+1.2"), (-0.0123, "+", "-1.2"), (math.nan, "", ""), (None, "+", "")],
)
def test_percentage_points(value: float | None, sign: str, expected: str) -> None:
    assert format_points(value, sign) == expected


def test_yes_and_no_are_recognised_once_normalised() -> None:
    assert is_yes_no("Yes.") and is_yes_no(" no ") and not is_yes_no("abnormal") and not is_yes_no("yes, left")


def test_lists_are_shortened() -> None:
    assert first_few([]) == "" and first_few(["a"]) == "a" and first_few([1, 2], 2) == "1, 2"
    assert first_few(range(1500), 2) == "0, 1 and 1,498 more"


def test_ranges() -> None:
    assert format_range(-0.01, 0.025, "+") == "-1.0 to +2.5"
    assert format_range(math.nan, math.nan) == format_range(None, None) == ""
