"""Formatted durations."""

from __future__ import annotations

import pytest

from medvqa_rl.core.progress import duration


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
