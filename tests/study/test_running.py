"""Studies of tiny runs: planned, run, interrupted, resumed and changed.

Run: pytest tests/study/test_running.py
"""

from __future__ import annotations

import csv
import io
import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cells import OUTCOMES, store, write
from rich.console import Console

from medvqa_rl.core import progress
from medvqa_rl.core.machine import SHARE
from medvqa_rl.study import running
from medvqa_rl.study.collect import collect
from medvqa_rl.study.output import write_study
from medvqa_rl.study.plan.recipe import read_recipe
from medvqa_rl.study.running import forecast, is_finished, plan_table, progress_line, run_study
from tests import forking

QUIET = Console(quiet=True)


def test_a_quick_study_runs_once_and_only_what_changed_runs_again(
    given: dict[str, Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    path, output = write(tmp_path / "tiny.yaml", given), tmp_path / "study"
    recipe = read_recipe(path, output, quick=True)
    assert [cell.label for cell in recipe.cells] == ["zero_shot", "sft, seed 0", "grpo, seed 0"]
    # Four questions each at 15 s, and two steps at 30 s and at 60 s.
    assert list(forecast(recipe).values()) == [60.0, 120.0, 180.0]
    assert plan_table(recipe).notes == ["6 minutes left, one cell after the other."]
    alone = replace(recipe, cells=recipe.cells[:1])
    assert plan_table(alone).notes == ["1 minute left, one cell after the other."]
    assert run_study(recipe, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["study", "sft", "study", "train", "study"]
    assert all(map(is_finished, recipe.cells)) and sum(forecast(recipe).values()) == 0
    for cell in recipe.cells[1:]:
        assert json.loads((cell.folder / "status.json").read_text())["state"] == "finished"
        results = json.loads((cell.tests[0].folder / "results.json").read_text())
        assert results["model"]["path"].endswith("step_000002") and results["n"] == 4
    in_process.clear()
    assert run_study(read_recipe(path, output, quick=True), output, console=QUIET) == [] and in_process == []

    given["arms"]["grpo"]["settings"]["rewards"]["ecr"] = 1.0
    changed = read_recipe(write(path, given), output, quick=True)
    assert [is_finished(cell) for cell in changed.cells] == [True, True, False]
    assert run_study(changed, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["train", "study"]
    assert len(list((output / "grpo").glob("seed0-*"))) == 2 + 2  # two folders, and the log of each

    in_process.clear()
    given["settings"]["eval"]["similarity"] = "tfidf"  # another instrument: nothing is trained again
    measured = read_recipe(write(path, given), output, quick=True)
    assert [cell.folder for cell in measured.cells] == [cell.folder for cell in changed.cells]
    assert run_study(measured, output, console=QUIET) == []
    assert [words[0] for words in in_process] == ["study"] * 3

    written = write_study(collect(changed), output / "tables")
    files = {file.name: file.read_text() for file in written if file.suffix != ".png"}
    assert set(files) == {"home.csv", "home.tex", "training.csv", "training.tex", "study.md", "study.html"}
    table = list(csv.DictReader(files["home.csv"].splitlines()))
    assert [row["arm"] for row in table] == ["zero_shot", "sft", "grpo"]
    assert [row["published, other data and model"] for row in table] == ["", "52", "58.04"]
    assert (
        "| zero_shot |" in files["study.md"]
        and "\\toprule" in files["home.tex"]
        and "<td>sft</td>" in files["study.html"]
    )


def test_a_killed_cell_is_resumed(
    given: dict[str, Any], in_process: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given["arms"] = {"grpo": given["arms"]["grpo"]}
    given["seeds"] = [0]
    output = tmp_path / "study"
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), output)
    (cell,) = recipe.cells
    called = in_process

    def killed(command: Sequence[str], **rest: Any) -> int:
        process = forking.Popen(command, **rest)
        while not list(cell.folder.glob("checkpoints/step_*")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        return process.wait()

    with monkeypatch.context() as patch:
        patch.setattr(running.subprocess, "call", killed)
        (failure,) = run_study(recipe, output, console=QUIET)
    assert failure.cell is cell and failure.code == -signal.SIGKILL and not is_finished(cell)
    assert "started" in [row[4] for row in plan_table(recipe).rows]
    assert run_study(recipe, output, console=QUIET) == []
    assert called[0][0] == "train" and called[0][-1] == "--resume"
    rows = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert is_finished(cell)


def test_a_running_cell_shows_where_it_is(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study", quick=True)
    sft, log = recipe.cells[1], Path("sft.log")
    assert progress_line(sft, log, 0, 10.0) == "sft, seed 0: step 0 of 2, see sft.log"
    sft.folder.mkdir(parents=True)
    (sft.folder / "status.json").write_text(json.dumps({"state": "running", "step": 1}))
    # One step took 60 seconds, and one is left.
    assert progress_line(sft, log, 0, 60.1) == "sft, seed 0: step 1 of 2, 60 s left, see sft.log"
    assert progress_line(sft, log, 1, 60.1) == "sft, seed 0: step 1 of 2, see sft.log"  # resumed at step 1
    beats = [10.0 * number + 0.1 for number in range(1, 19)]
    assert [seconds for seconds in beats if progress_line(sft, log, 0, seconds)] == [10.1, 60.1, 120.1, 180.1]
    (sft.folder / "status.json").write_text(json.dumps({"state": "finished", "step": 2}))
    assert progress_line(sft, log, 0, 10.0) == "sft, seed 0: 0 of 1 tests done, see sft.log"

    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    monkeypatch.setattr(running.subprocess, "call", lambda command, **rest: time.sleep(0.1) or 0)
    console = Console(file=io.StringIO(), width=1000)
    run_study(recipe, tmp_path / "study", console=console)
    lines = console.file.getvalue().splitlines()
    grpo = tmp_path / "study" / "grpo" / f"{recipe.cells[2].folder.name}.log"
    (started,) = [line for line in lines if line.startswith("grpo, seed 0: medvqa-rl train ")]
    assert started.endswith(f", log in {grpo}") and grpo.is_file()
    assert f"grpo, seed 0: step 0 of 2, see {grpo}" in lines
    assert lines[-1] == "grpo, seed 0: done, 0 of 3 cells finished"  # nothing was written


def test_damaged_files_of_a_cell_are_named(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", given), tmp_path / "out")
    store(recipe, OUTCOMES)
    cell = next(cell for cell in recipe.cells if cell.arm.name == "sft")
    for name, text, expected in (
        (
            "metrics.jsonl",
            '{"step": 1}\n{"step": 2, "step_time": "fast"}\n',
            "Line 2 of .* has 'fast' under step_time",
        ),
        ("metrics.jsonl", "{\n", "Line 1 of .* is not JSON"),
        ("status.json", '{"state": "finished", "step": "4"}', "has '4' under step"),
        ("status.json", "[]", r"status\.json has \[\]"),
    ):
        before = (cell.folder / name).read_text()
        (cell.folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{expected}.*remove the folder .*{cell.folder.name} to run it again"):
            forecast(recipe)
        (cell.folder / name).write_text(before)
    (cell.tests[0].folder / "results.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match=r"results\.json has no field .*: evaluate again, or restore the file"):
        collect(recipe)


def test_several_processes_share_a_cell(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study", only=["zero_shot"])
    called: list[list[str]] = []
    monkeypatch.setattr(running.subprocess, "call", lambda command, **rest: called.append(list(command)) or 0)
    run_study(recipe, tmp_path / "study", processes=4, console=QUIET)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "4", "-m", "medvqa_rl"]
    assert [command[:7] for command in called] == [launch] * len(called)
    assert [command[7] for command in called[:2]] == ["study", "train"]
    with pytest.raises(ValueError, match="would use the same 4 GPUs: leave one of the two at 1"):
        run_study(recipe, tmp_path / "study", jobs=2, processes=4, console=QUIET)


def test_parallel_cells_share_the_cores(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study", only=["zero_shot"])
    shares: list[str | None] = []
    monkeypatch.setattr(running.subprocess, "call", lambda command, env, **rest: shares.append(env.get(SHARE)) or 0)
    monkeypatch.setattr("medvqa_rl.core.machine.own_cores", lambda: range(8))
    monkeypatch.setattr("medvqa_rl.core.machine.psutil.cpu_count", lambda logical: 8)
    monkeypatch.delenv(SHARE, raising=False)
    run_study(recipe, tmp_path / "study", jobs=3, console=QUIET)
    run_study(recipe, tmp_path / "study", console=QUIET)
    assert set(shares[: len(shares) // 2]) == {"2"} and set(shares[len(shares) // 2 :]) == {None}


def test_a_running_study_is_locked(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    (tmp_path / "study").mkdir()
    with (
        running.FileLock(tmp_path / "study" / ".study.lock"),
        pytest.raises(ValueError, match="is running the study"),
    ):
        run_study(recipe, tmp_path / "study", console=QUIET)


def test_a_cell_waits_for_the_process_that_still_trains_it(
    given: dict[str, Any], in_process: list[list[str]], tmp_path: Path
) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study", quick=True)
    cell = recipe.cells[1]
    cell.folder.mkdir(parents=True)
    lock, out = running.FileLock(cell.folder / ".lock", thread_local=False), io.StringIO()
    lock.acquire()
    threading.Timer(1.5, lock.release).start()
    assert run_study(recipe, tmp_path / "study", console=Console(file=out)) == []
    assert out.getvalue().count("sft, seed 0: waiting for the process that still trains") == 1
    assert is_finished(cell)


def test_the_verbs_of_the_command(given: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.yaml", given)
    command = [sys.executable, "-m", "medvqa_rl", "study"]
    shown = forking.run(
        [*command, "plan", str(path), "train.steps=3", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "0/3" in shown.stdout and "minutes left" in shown.stdout and not (tmp_path / "out").exists()
    wrong = forking.run(
        [*command, "run", str(path), "--arms", "drgrpo"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (
        wrong.returncode == 2 and "has the unknown arm 'drgrpo'" in wrong.stderr and wrong.stderr.count("error:") == 1
    )
