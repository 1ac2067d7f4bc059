"""A live view of a run in the terminal: curves, latest samples and time left. Imports no torch.

    medvqa-rl watch runs/lora

Reads only the run folder, so it works on any machine that can access it. It ends with the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from medvqa_rl.core.progress import TerminalConsole, duration
from medvqa_rl.report.figures.panels import LENGTH, MEAN_LENGTH, REWARD, find_panels, series_of
from medvqa_rl.report.runs import StoredGroup, StoredRun, read_groups, read_run

BARS = "▁▂▃▄▅▆▇█"
SILENT_SECONDS = 300.0
"""Age of the last status update of a running run from which the view shows a warning."""
RECENT_STEPS = 20
"""Number of steps whose mean duration gives the time left."""

_STATES = {"running": "cyan", "finished": "green", "stopped": "yellow", "failed": "bold red"}


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw a curve as one line of text, scaled from its minimum to its maximum.

    Args:
        values: the curve; more than ``width`` values are averaged in segments.
        width: maximum number of characters.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * index // count for index in range(count + 1)]
    means = [fmean(values[start:end]) for start, end in pairwise(cuts)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[len(BARS) // 2 - 1] * count
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / (high - low) * len(BARS)))] for mean in means)


def seconds_left(run: StoredRun) -> float | None:
    """Return the estimated seconds until the last step, without evaluations; None if unknown."""
    durations = [row["step_time"] for row in run.steps if "step_time" in row][-RECENT_STEPS:]
    step, steps = run.status.get("step"), run.status.get("steps")
    if not durations or not isinstance(step, int) or not isinstance(steps, int) or step >= steps:
        return None
    return fmean(durations) * (steps - step)


def silent_for(run: StoredRun, now: datetime) -> float | None:
    """Return the seconds since a running run last updated its status; None for other runs."""
    if run.status.get("state") != "running":
        return None
    try:
        updated = datetime.fromisoformat(str(run.status.get("updated")))
    except ValueError:
        return None
    return (now - updated).total_seconds() if updated.tzinfo is not None else None


def frame(run: StoredRun, width: int, now: datetime) -> RenderableType:
    """Render the current state of a run.

    Args:
        run: the run as read.
        width: width of the terminal in characters.
        now: the time, with time zone.
    """
    parts: list[RenderableType] = [_heading(run, now)]
    step, steps = run.status.get("step"), run.status.get("steps")
    if isinstance(step, int) and isinstance(steps, int) and steps > 0:
        bar = Table.grid()  # a bare bar does not end its line
        bar.add_row(ProgressBar(total=steps, completed=step, width=min(60, max(10, width - 4))))
        parts.append(bar)
    parts.append(_curves(run, width))
    groups, problems = read_groups(run)
    if groups:
        parts.append(_samples(groups[-1], width))
    parts += [Text(problem, style="yellow") for problem in (*run.problems, *problems)]
    return Group(*parts)


def _heading(run: StoredRun, now: datetime) -> Text:
    status = run.status
    state = str(status.get("state", "no status yet"))
    text = Text.assemble((run.name, "bold"), "  ", (state, _STATES.get(state, "")))
    if "step" in status:
        text.append(f"  step {status['step']} of {status.get('steps')}")
    left = seconds_left(run)
    if left is not None and state == "running":
        text.append(f"  about {duration(left)} left")
    elif left is not None:
        text.append(f"  {duration(left)} of training left")
    if status.get("best_accuracy") is not None:
        text.append(f"  best {100 * float(status['best_accuracy']):.1f} % at step {status.get('best_step')}")
    if status.get("reason"):
        text.append(f"\n{printable(str(status['reason']))}", style="yellow")
    silence = silent_for(run, now)
    if silence is not None and silence > SILENT_SECONDS:
        text.append(
            f"\nNo update for {duration(silence)}: the run may have been killed. See train.log.", style="yellow"
        )
    return text


def _curves(run: StoredRun, width: int) -> Table:
    """Each logged metric with its curve, its first and its last value."""
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    table.add_column("")
    for name in ("first", "curve", "last"):
        table.add_column(name, justify="left" if name == "curve" else "right", no_wrap=True)
    curve_width = max(8, min(60, width - 52))
    for panel in (REWARD, *find_panels(name for row in run.metrics for name in row)):
        for line in (MEAN_LENGTH, *panel.lines) if panel == LENGTH else panel.lines:
            values = series_of(run.metrics, line.metric)[1].tolist()
            if values:
                label = f"{panel.title}, {line.label}" if line.label else panel.title
                first, last = (
                    f"{100 * value:.1f} %" if panel.is_share else f"{value:.3g}" for value in (values[0], values[-1])
                )
                table.add_row(escape(label), first, Text(sparkline(values, curve_width), style="cyan"), last)
    if not table.row_count:
        table.add_row("No step is logged yet.")
    return table


def printable(text: str) -> str:
    """Text on one line without what would steer the terminal; a model can write any character."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def _samples(group: StoredGroup, width: int) -> Panel:
    """The completions of the latest stored group, best first, each truncated to two lines."""
    body = Text(printable(group.question))
    for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", group.options):
        body.append(f"  {letter}: {printable(option)}", style="bold" if group.gold.partition(":")[0] == letter else "")
    if not group.options:
        body.append(f"  gold: {printable(group.gold)}", style="bold")
    room = max(20, 2 * (width - 8) - 24)
    for item in sorted(group.completions, key=lambda item: -item.advantage)[:4]:
        outcome = "correct" if item.is_correct else "wrong" if item.has_answer else "no answer"
        text = printable(item.text)
        text = text if len(text) <= room else text[: room - 1] + "…"
        body.append(f"\n{outcome:<9} {item.advantage:+.2f}  ", style="green" if item.is_correct else "red")
        body.append(text)
    return Panel(body, title=f"step {group.step}", title_align="left", border_style="dim")


def watch(
    path: Path,
    *,
    once: bool = False,
    interval: float = 2.0,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> StoredRun:
    """Show a run until it ends.

    Args:
        path: the run folder.
        once: print the current state and return.
        interval: seconds between updates.
        console: defaults to the terminal.
        sleep: waits between updates.

    Returns:
        The run as last read.

    Raises:
        ValueError: the folder is not a run.
    """
    shown = TerminalConsole() if console is None else console
    run = read_run(path)
    if once:
        shown.print(frame(run, shown.width, datetime.now(UTC)))
        return run
    with Live(console=shown, auto_refresh=False, transient=False) as live:
        while True:
            live.update(frame(run, shown.width, datetime.now(UTC)), refresh=True)
            if run.status.get("state") not in ("running", None):
                return run
            sleep(interval)
            run = read_run(path)
