"""The live view shows what the folder holds, follows the run, and ends with it.

Run: pytest tests/report/test_watch.py
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from synthetic import make_run, step_row, write, write_lines
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.report.runs import StoredRun, read_run
from medvqa_rl.report.watch import BARS, frame, seconds_left, silent_for, sparkline, watch

NOW = datetime(2026, 1, 1, 0, 0, 30, tzinfo=UTC)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "one")


def set_status(run: Path, **changes: Any) -> None:
    write(run / "status.json", json.loads((run / "status.json").read_text()) | changes)


def shown(run: Path, width: int = 100, now: datetime = NOW) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frame(read_run(run), width, now))
    return console.export_text()


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, BARS),
        ([7, 0], 8, "█▁"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([3, 3, 3], 8, "▄▄▄"),
        ([], 8, ""),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_sparklines(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=100), st.integers(1, 40))
def test_sparklines_fit(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(width, len(values)) and set(line) <= set(BARS)


def test_time_left_is_that_of_the_last_steps() -> None:
    rows = [step_row(step, step_time=100.0 if step < 30 else 3.0) for step in range(1, 51)]
    run = StoredRun(Path("x"), status={"state": "running", "step": 50, "steps": 70}, metrics=rows)  # type: ignore[arg-type]
    assert seconds_left(run) == 3.0 * 20
    assert seconds_left(StoredRun(Path("x"), status={"step": 70, "steps": 70}, metrics=run.metrics)) is None
    assert seconds_left(StoredRun(Path("x"), status=run.status)) is None


def test_contents_of_the_live_view(run: Path) -> None:
    set_status(run, state="running", step=30, steps=40)
    text = shown(run)
    assert "one  running  step 30 of 40  about 20 s left  best 70.0 % at step 40" in text
    assert "No update" not in text
    (kl,) = (line for line in text.splitlines() if line.strip().startswith("KL"))
    first, curve, last = kl.split()[-3:]
    assert first == "0.001" and last == "0.04" and curve == "".join(sorted(curve))
    assert "Accuracy, greedy" in text and "50.0 %" in text and "70.0 %" in text
    assert "Reward parts, format" in text
    lengths = [line.split()[3:5] for line in text.splitlines() if line.strip().startswith("Length in tokens")]
    assert lengths == [["all", "30"], ["correct", "29"], ["wrong", "31"]]
    assert "correct   +0.50  <think>It is clear.</think>" in text and "no answer" in text
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("width", [20, 40, 200])
def test_any_width_will_do(run: Path, width: int) -> None:
    assert all(len(line) <= width for line in shown(run, width).splitlines())


def test_the_end_of_a_run_is_reported(run: Path) -> None:
    set_status(run, state="failed", reason="Step 7: the loss is [nan].")
    text = shown(run)
    assert "failed" in text and "Step 7: the loss is [nan]." in text and "left" not in text
    set_status(run, state="running", step=39)
    assert "No update for 2.0 h: the run may have been killed." in shown(run, now=NOW + timedelta(hours=2))
    assert silent_for(read_run(run), NOW) == 30.0
    set_status(run, updated="yesterday")
    assert silent_for(read_run(run), NOW) is None


def test_a_completion_cannot_steer_the_terminal(run: Path) -> None:
    path = run / "samples" / "step_000040.jsonl"
    path.write_text(path.read_text().replace("I give up", "\\u001b[2J\\u0007\\r[red]I give up"))
    text = shown(run)
    assert "\ufffd[2J\ufffd" in text and "[red]I give up" in text
    assert not {"\x1b", "\x07", "\r", "\ud800"} & set(text)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    write(tmp_path / "status.json", {"state": "running", "step": 0, "steps": 10})
    text = shown(tmp_path)
    assert "step 0 of 10" in text and "No step is logged yet." in text and "metrics.jsonl is missing" in text


def test_it_follows_the_run_and_ends_with_it(run: Path) -> None:
    set_status(run, state="running", step=1)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        write_lines(run / "metrics.jsonl", [step_row(step) for step in range(1, len(waited) + 2)])
        set_status(run, step=len(waited) + 1, state="finished" if len(waited) == 3 else "running")

    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
    last = watch(run, interval=0.5, console=console, sleep=sleep)
    assert waited == [0.5] * 3 and last.status["state"] == "finished" and len(last.metrics) == 4
    assert "finished  step 4 of 40" in console.export_text()


def test_the_command_shows_one_picture_without_torch(run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert result.exit_code == 0, result.output
    assert "one  finished  step 40 of 40" in result.output
    assert CliRunner().invoke(app, ["watch", str(run)]).exit_code == 0  # it has ended
    result = CliRunner().invoke(app, ["watch", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "There is no folder" in result.output
    code = (
        "import sys; from pathlib import Path; from medvqa_rl.report.watch import watch; "
        f"watch(Path({str(run)!r}), once=True); assert not {{'torch', 'matplotlib'}} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_report_is_written_without_torch(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medvqa_rl.report.pages.report import write_report; "
        f"write_report([Path({str(run)!r})], Path({str(run / 'x.html')!r})); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
