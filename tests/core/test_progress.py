"""Formatted durations, and lines that show that a command is still alive."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.table import Table
from rich.text import Text

from medvqa_rl.core import progress
from medvqa_rl.core.progress import TerminalConsole, duration, heartbeat, progress_bar, to_stderr, waiting


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_nothing_is_printed_before_the_first_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("loading the model"), progress_bar("questions") as show:
        show(1, 4)
    assert progress.INTERVAL == 10.0
    assert capsys.readouterr().err == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


@pytest.mark.parametrize(("rank", "expected"), [("0", "Still loading the model (0 s)."), ("1", "")])
def test_a_wait_prints_lines_on_the_first_rank(
    rank: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match="no such model"), waiting("loading the model"):
        time.sleep(0.1)
        raise ValueError("no such model")
    lines = capsys.readouterr().err.splitlines()
    assert set(lines) == ({expected} if expected else set())
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_progress_prints_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with progress_bar("questions") as show:
        show(3, 1200)
        time.sleep(0.1)
        show(1200, 1200)  # finished
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and set(lines) <= {f"questions 3/1,200, {seconds} s" for seconds in (0, 1)}


def test_a_line_takes_the_time_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.02)
    seen: list[str] = []
    with heartbeat(lambda seconds: str(seconds), seen.append):
        time.sleep(0.15)
    times = list(map(float, seen))
    assert times == sorted(times) and times[0] >= 0.02 and times[-1] < 10


def test_text_cannot_steer_the_terminal() -> None:
    """Escape sequences in strings, tables and Text are printed as text; the console's own styles remain."""
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9b1m\rc\u202ed"
    out = io.StringIO()
    console = TerminalConsole(file=out, force_terminal=True, color_system="standard", width=60)
    table = Table("name")
    table.add_row(hostile)
    table.add_row(Text(hostile, style="red"))
    console.print(hostile, markup=False, highlight=False)
    console.print(table)
    console.print("good", style="bold red")
    text = out.getvalue()
    assert "\x1b[1;31mgood\x1b[0m" in text
    assert not any(mark in text for mark in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\r", "\u202e"))
    assert text.count("a[2J]0;titleb1mcd") == 3


def test_plain_lines_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    to_stderr("a\x1b[2Jb\x9b1m\tc")
    assert capsys.readouterr().err == "a[2Jb1m\tc\n"
