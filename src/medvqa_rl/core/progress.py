"""What commands print: tables on standard output, progress on standard error: bars on a terminal, else lines."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
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
from rich.segment import Segment
from rich.text import Text

from medvqa_rl.core.text import for_terminal

INTERVAL = 10.0
"""Seconds between signs of life."""
PIPED_WIDTH = 10_000
"""Width of output that does not go to a terminal: nothing wraps there."""


class TerminalConsole(Console):
    """A console on which text from data, models and files cannot steer the terminal; styles still can."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(for_terminal(segment.text), segment.style)


def open_console(*, stderr: bool = False) -> Console:
    """Return a console on standard output or standard error: as wide as the terminal, or without limit if the output
    goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    return TerminalConsole(width=None if stream.isatty() else PIPED_WIDTH, highlight=False, stderr=stderr)


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: without markup or highlighting, wrapped by the terminal only, so that it can be
    searched."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def to_stderr(line: str) -> None:
    """Print a line on standard error, on the first rank only."""
    if os.environ.get("RANK", "0") == "0":  # set by launchers
        print(for_terminal(line), file=sys.stderr, flush=True)


@contextmanager
def heartbeat(line: Callable[[float], str], say: Callable[[str], None] = to_stderr) -> Iterator[None]:
    """Print a line every :data:`INTERVAL` seconds while the block runs.

    Args:
        line: takes the seconds since the start; an empty line is not printed.
        say: prints a line; called in a thread. By default standard error of the first rank.
    """
    began, is_over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not is_over.wait(INTERVAL):
            if text := line(time.monotonic() - began):
                say(text)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def waiting(what: str) -> AbstractContextManager[None]:
    """Print every ten seconds that the block is still busy with something, such as "loading the judge"."""
    return heartbeat(lambda seconds: f"Still {what} ({duration(seconds)}).")


class _Rate(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed and task.speed >= 1 else "", style="progress.data.speed")


@contextmanager
def _progress(*rate: ProgressColumn) -> Iterator[Progress]:
    """Bars with the remaining time on standard error, removed when the block ends; lines if that is no terminal."""
    columns = (
        *(TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=24), *rate),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    is_terminal = sys.stderr.isatty()
    with Progress(*columns, console=open_console(stderr=True), disable=not is_terminal, transient=True) as progress:
        if is_terminal:
            yield progress
            return
        with heartbeat(lambda _: "\n".join(_as_line(task) for task in progress.tasks if not task.finished)):
            yield progress


def _as_line(task: Task) -> str:
    """What the bar of a task shows, as text."""
    done = f"{task.completed:,.0f}" + ("" if task.total is None else f"/{task.total:,.0f}")
    left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
    return f"{task.description} {done}, {duration(task.elapsed or 0.0)}{left}"


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
