"""What commands print: tables on standard output, progress bars on standard error if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PIPED_WIDTH = 10_000
"""Width of output that does not go to a terminal: nothing wraps there."""


def open_console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error: as wide as the terminal, or without limit if the output
    goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(width=None if stream.isatty() else PIPED_WIDTH, highlight=False, stderr=stderr)


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: without markup or highlighting, wrapped by the terminal only, so that it can be
    searched."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 1 else "", style="progress.data.speed")


@contextmanager
def _progress(*rate: ProgressColumn) -> Iterator[Progress]:
    """Bars with the remaining time, on standard error if that is a terminal, removed when the block ends."""
    columns = (
        *(TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=24), *rate),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        yield progress


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the remaining time while the block runs.

    Args:
        unit: what is counted, such as "questions".

    Yields:
        A function that takes the number done and the total.
    """
    with _progress() as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per stage, with rates, while the block runs.

    Yields:
        A function that takes what is counted, the number done and the total.
    """
    with _progress(_Rate()) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
