"""Numbers, lists and yes or no as text.

Run: pytest tests/core/test_text.py
"""

import math

import pytest

from medvqa_rl.core.text import format_p, format_points, format_range


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


def test_ranges() -> None:
    assert format_range(-0.01, 0.025, "+") == "-1.0 to +2.5"
    assert format_range(math.nan, math.nan) == format_range(None, None) == ""
