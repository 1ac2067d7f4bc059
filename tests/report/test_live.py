"""How far a run is: from its status and the duration of its steps.

Run: pytest tests/report/test_live.py
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.report.live import progress_line, seconds_left, seconds_since_update
from medvqa_rl.report.runs import StoredRun

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


def run(durations: list[float], **status: Any) -> StoredRun:
    rows = [{"step": float(step), "step_time": seconds} for step, seconds in enumerate(durations, start=1)]
    return StoredRun(Path("x"), status=status, metrics=rows)


def test_time_left_is_that_of_the_last_20_steps() -> None:
    assert seconds_left(run([100.0] * 5 + [2.0] * 19 + [4.0], step=25, steps=35)) == pytest.approx(10 * 2.1)
    assert seconds_left(run([2.0], step=35, steps=35)) is None
    assert seconds_left(run([], step=1, steps=35)) is None
    assert seconds_left(run([2.0])) is None
    rows = [{"step": 1.0, "step_time": 2.0}, {"step": 1.0, "eval/accuracy": 0.5}]
    assert seconds_left(StoredRun(Path("x"), status={"step": 1, "steps": 4}, metrics=rows)) == 6.0


@pytest.mark.parametrize(
    ("updated", "expected"),
    [
        ((NOW - timedelta(minutes=5)).isoformat(), 300.0),
        ((NOW + timedelta(minutes=5)).isoformat(), 0.0),
        ("2026-01-01T11:00:00", None),
        ("yesterday", None),
        (None, None),
    ],
)
def test_the_age_of_the_status(updated: str | None, expected: float | None) -> None:
    assert seconds_since_update(run([], updated=updated), NOW) == expected


def test_what_is_said_of_the_progress() -> None:
    fresh, old = NOW.isoformat(), (NOW - timedelta(hours=2)).isoformat()
    assert progress_line(run([60.0], step=1, steps=31, state="running", updated=fresh), NOW) == "about 30 min left"
    assert progress_line(run([60.0], step=1, steps=31, state="running", updated=old), NOW) == (
        "no update for 2.0 h: it may have been killed, see train.log"
    )
    stopped = run([60.0], step=1, steps=31, state="stopped", updated=old)
    assert progress_line(stopped, NOW) == "about 30 min of training left"
    assert progress_line(run([60.0], step=31, steps=31, state="finished", updated=old), NOW) == ""
