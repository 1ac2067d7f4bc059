"""How far a run is: time left, and whether it still lives. Imports no torch."""

from __future__ import annotations

from datetime import datetime
from statistics import fmean

from medvqa_rl.core.progress import duration
from medvqa_rl.report.runs import StoredRun

SILENT_SECONDS = 300.0
"""Age of the last status update of a running run from which a warning is shown."""
RECENT_STEPS = 20
"""Number of steps whose mean duration gives the time left."""


def seconds_left(run: StoredRun) -> float | None:
    """Return the estimated seconds until the last step, without evaluations; None if unknown."""
    durations = [row["step_time"] for row in run.steps if "step_time" in row][-RECENT_STEPS:]
    step, steps = run.status.get("step"), run.status.get("steps")
    if not durations or not isinstance(step, int) or not isinstance(steps, int) or step >= steps:
        return None
    return fmean(durations) * (steps - step)


def seconds_since_update(run: StoredRun, now: datetime) -> float | None:
    """Return the seconds since a run last updated its status; None if unknown."""
    try:
        updated = datetime.fromisoformat(str(run.status.get("updated")))
    except ValueError:
        return None
    return max(0.0, (now - updated).total_seconds()) if updated.tzinfo is not None else None


def progress_line(run: StoredRun, now: datetime) -> str:
    """Say how long a running run will take, that it may have been killed, or what a stopped one lacks; may be empty.

    Args:
        now: the time, with time zone.
    """
    if run.status.get("state") == "running":
        silence = seconds_since_update(run, now)
        if silence is not None and silence > SILENT_SECONDS:
            return f"no update for {duration(silence)}: it may have been killed, see train.log"
    left = seconds_left(run)
    if left is None:
        return ""
    return f"about {duration(left)} {'left' if run.status.get('state') == 'running' else 'of training left'}"
