"""The page of all runs below a folder, with their status and main numbers. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from medvqa_rl.core.progress import duration
from medvqa_rl.report.comparisons import accuracy_rows
from medvqa_rl.report.live import SILENT_SECONDS, seconds_since_update
from medvqa_rl.report.pages.rendering import render_with_script
from medvqa_rl.report.runs import StoredEvaluation, StoredRun

MAX_COMPARED = 6
"""Runs on one page: as many as charts have colours."""


@dataclass(frozen=True)
class _Row:
    name: str
    address: str
    state: str
    is_silent: bool
    progress: tuple[int, int] | None
    """Step, and number of steps."""
    age: str
    first: StoredEvaluation | None
    """The evaluation before the first step of training, if there are two."""
    last: StoredEvaluation | None
    others: Sequence[tuple[str, StoredEvaluation]]


def render_overview(runs: Sequence[StoredRun], problems: Sequence[str], *, folder: str, now: datetime) -> str:
    """Return the page as HTML, running and recent runs first.

    Args:
        problems: sentences about runs that are not shown.
        folder: name of the folder that holds the runs.
        now: the time, with time zone.
    """
    ages = {run.name: seconds_since_update(run, now) for run in runs}

    def order(run: StoredRun) -> tuple[bool, float, str]:
        age = ages[run.name]
        return run.status.get("state") != "running", float("inf") if age is None else age, run.name

    return render_with_script(
        "overview.html.j2",
        styles=("_style.css", "_scroll.css", "_report.css"),
        scripts=("_live.js",),
        data={},
        is_served=True,
        rows=[_row(run, ages[run.name]) for run in sorted(runs, key=order)],
        problems=[*problems, *(f"{run.name}: {problem}" for run in runs for problem in run.problems)],
        folder=folder,
        max_compared=MAX_COMPARED,
    )


def _row(run: StoredRun, age: float | None) -> _Row:
    step, steps = run.status.get("step"), run.status.get("steps")
    during = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
    state = str(run.status.get("state", "evaluated" if run.evaluations else "unknown"))
    return _Row(
        name=run.name,
        address=f"runs?{urlencode({'run': run.name})}",
        state=f"{run.status.get('kind', '')} {state}".strip(),
        is_silent=state == "running" and age is not None and age > SILENT_SECONDS,
        progress=(step, steps) if isinstance(step, int) and isinstance(steps, int) and steps > 0 else None,
        age="" if age is None else _age(age),
        first=during[0] if len(during) > 1 else None,
        last=during[-1] if during else None,
        others=[(label, item) for _, label, item in accuracy_rows([run]) if item.step is None],
    )


def _age(seconds: float) -> str:
    """A time in the past that changes once a minute at most."""
    if seconds < 120:
        return "now"
    return f"{duration(60 * (seconds // 60))} ago" if seconds < 2 * 86_400 else f"{seconds / 86_400:.0f} days ago"
