"""Run the cells of a study as subprocesses, and forecast the remaining time. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from threading import Event, Lock

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter
from rich.console import Console

from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.files import read_json, read_json_lines, write_text
from medvqa_rl.core.machine import PARENT, SHARE, ProcessLock, own_share
from medvqa_rl.core.progress import INTERVAL, duration, heartbeat
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import number_of
from medvqa_rl.data import load_dataset
from medvqa_rl.study.plan.recipe import Cell, Recipe, Test


@dataclass(frozen=True)
class Failure:
    """A cell that failed."""

    cell: Cell
    command: Sequence[str]
    """Empty if nothing was started."""
    code: int
    last_line: str


class _Status(BaseModel):
    """What is read of a cell's status.json; it has more."""

    state: str
    step: int


class _Row(BaseModel):
    """What is read of a line of metrics.jsonl."""

    step_time: float | None = None


_STATUS, _ROW = TypeAdapter(_Status), TypeAdapter(_Row)


def steps_done(cell: Cell) -> int:
    """Completed training steps according to the cell's status; 0 for builds."""
    status = _status(cell)
    return 0 if status is None else status.step


def is_trained(cell: Cell) -> bool:
    """Whether a cell's training is finished, or it needs none."""
    if cell.arm.verb == "build":
        return (cell.folder / "build.json").is_file()  # written last
    return cell.arm.verb == "none" or ((status := _status(cell)) is not None and status.state == "finished")


def is_tested(test: Test) -> bool:
    """Whether an evaluation is complete; its results are written last."""
    return (test.folder / "results.json").is_file()


def is_finished(cell: Cell) -> bool:
    """Whether a cell is trained and tested."""
    return is_trained(cell) and all(map(is_tested, cell.tests))


def _status(cell: Cell) -> _Status | None:
    """What a cell's training wrote last; None if it has not started."""
    path = cell.folder / "status.json"
    return read_json(_STATUS, path, f"remove the folder {cell.folder} to run it again") if path.is_file() else None


# --- forecast ------------------------------------------------------------------------------------------------------


def step_seconds(recipe: Recipe) -> dict[str, float]:
    """Seconds per step of each arm: measured in its finished cells, else the recipe's for this arm, else measured in
    cells of its verb, else the recipe's for the verb."""
    by_arm: dict[str, list[float]] = {}
    by_verb: dict[str, list[float]] = {}
    for cell in recipe.cells:
        if cell.arm.is_run and is_trained(cell):
            times = _step_times(cell)
            by_arm.setdefault(cell.arm.name, []).extend(times)
            by_verb.setdefault(cell.arm.verb, []).extend(times)
    rates = {}
    for arm in recipe.arms:
        stated = recipe.forecast.seconds_per_step
        measured = by_arm.get(arm.name) or ([] if arm.name in stated else by_verb.get(arm.verb))
        rates[arm.name] = fmean(measured) if measured else stated.get(arm.name, stated.get(arm.verb, 0.0))
    return rates


def _step_times(cell: Cell) -> list[float]:
    path = cell.folder / "metrics.jsonl"
    remedy = f"restore the file, or remove the folder {cell.folder} to run it again"
    return [row.step_time for row in read_json_lines(_ROW, path, remedy) if row.step_time is not None]


def forecast(recipe: Recipe) -> dict[Cell, float]:
    """Remaining seconds of each cell."""
    rates = step_seconds(recipe)
    left: dict[Cell, float] = {}
    sizes: dict[str, int] = {}
    for cell in recipe.cells:
        seconds = 0.0
        if not is_trained(cell):
            seconds += recipe.forecast.seconds_per_start
            seconds += recipe.forecast.seconds_per_build.get(cell.arm.size or "", 0.0)
            if cell.arm.is_run:
                seconds += (cell.config.train.steps - steps_done(cell)) * rates[cell.arm.name]
        if not all(map(is_tested, cell.tests)):
            seconds += recipe.forecast.seconds_per_start
        for test in cell.tests:
            if not is_tested(test):
                if test.name not in sizes:
                    size = len(load_dataset(test.config.data, "test"))
                    sizes[test.name] = min(size, test.config.eval.max_samples or size)
                seconds += sizes[test.name] * recipe.forecast.seconds_per_question
        left[cell] = seconds
    return left


def plan_table(recipe: Recipe) -> TextTable:
    """Table of all cells with their state and remaining time."""
    left = forecast(recipe)
    has_starts = any(cell.start for cell in recipe.cells)
    from_title = ["from"] if has_starts else []
    rows = []
    for cell in recipe.cells:
        done = steps_done(cell) if cell.arm.is_run else 0
        tested = sum(map(is_tested, cell.tests))
        is_started = done or tested or (cell.arm.verb == "build" and cell.folder.exists())
        state = "finished" if is_finished(cell) else "started" if is_started else "not started"
        rows.append(
            (
                cell.label,
                *([cell.start.label if cell.start else ""] if has_starts else []),
                "" if cell.arm.verb == "none" else cell.arm.verb,
                f"{done}/{cell.config.train.steps}" if cell.arm.is_run else "",
                f"{tested}/{len(cell.tests)}",
                state,
                f"{left[cell] / 60:.1f}",
                str(cell.folder),
            )
        )
    return TextTable(
        f"{recipe.title}: {number_of(len(recipe.cells), 'cell')}",
        ("cell", *from_title, "verb", "steps", "tests", "state", "minutes left", "folder"),
        rows,
        drop=("folder", "verb", *from_title, "tests"),
        prose=(*from_title, "verb", "state", "folder"),
        notes=[f"{number_of(round(sum(left.values()) / 60), 'minute')} left, one cell after the other."],
    )


def progress_line(cell: Cell, log: Path, first_step: int, seconds: float) -> str:
    """Where a running cell is: its training step and the time left, or the tests that are done. Empty if nothing is
    due: a line is printed after ten seconds, then every minute.

    Args:
        log: of the cell.
        first_step: completed steps when its command was started.
        seconds: since then.
    """
    if seconds >= 1.5 * INTERVAL and seconds // INTERVAL % 6:
        return ""
    if is_trained(cell):
        return f"{cell.label}: {sum(map(is_tested, cell.tests))} of {len(cell.tests)} tests done, see {log}"
    if cell.arm.verb == "build":
        return f"{cell.label}: building, see {log}"
    done, steps = steps_done(cell), cell.config.train.steps
    left = f", {duration(seconds / (done - first_step) * (steps - done))} left" if done > first_step else ""
    return f"{cell.label}: step {done} of {steps}{left}, see {log}"


# --- running -------------------------------------------------------------------------------------------------------


def commands(cell: Cell, configs: Path) -> list[list[str]]:
    """Return the commands that complete a cell; their settings are written to the folder ``configs``.

    All tests are one command: with small models a process takes longer to start than to answer a hundred questions.
    """
    todo = []
    name = f"{cell.arm.name}-{cell.folder.name}"
    if not is_trained(cell) and cell.arm.size is not None:
        todo.append(["phantom", "build", "--size", cell.arm.size, "--output", str(cell.folder), "--resume"])
    elif not is_trained(cell):
        path = _write(configs / f"{name}.yaml", cell.config.model_dump(mode="json"))
        resume = ["--resume"] if (cell.folder / "status.json").is_file() else []
        todo.append([cell.arm.verb, str(path), *resume])
    if left := {str(test.folder): test.config.model_dump(mode="json") for test in cell.tests if not is_tested(test)}:
        checkpoint = None if cell.checkpoint is None else str(cell.checkpoint)
        path = _write(configs / f"{name}-tests.yaml", {"checkpoint": checkpoint, "tests": left})
        todo.append(["study", "answer", str(path)])
    return todo


def _write(path: Path, settings: Mapping[str, object]) -> Path:
    return write_text(path, write_yaml(dict(settings)))


def run_study(recipe: Recipe, output: Path, *, jobs: int = 1, processes: int = 1, console: Console) -> list[Failure]:
    """Complete every cell, ``jobs`` at a time. A failed cell stops only the cells that start from it.

    The output of a cell goes to a log beside its folder. Ctrl-C reaches the commands too, which save a checkpoint.

    Args:
        recipe: the study.
        output: folder of the study.
        jobs: number of cells to run in parallel.
        processes: number of processes per command, each on a GPU of its own, started by ``accelerate launch``.
        console: for progress messages.

    Returns:
        The cells that failed.

    Raises:
        ValueError: another process runs the study, or parallel cells would share GPUs.
    """
    if jobs > 1 and processes > 1:
        raise ValueError(
            f"--jobs is {jobs} and --processes {processes}, but parallel cells would use the same "
            f"{processes} GPUs: leave one of the two at 1."
        )
    launcher = ["accelerate.commands.launch", "--num_processes", str(processes), "-m"] if processes > 1 else []
    environment = os.environ | {PARENT: str(os.getpid())} | ({SHARE: str(own_share(jobs))} if jobs > 1 else {})
    output.mkdir(parents=True, exist_ok=True)
    stop, printing = Event(), Lock()

    def report(text: str) -> None:
        with printing:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    # Starts come first, so a cell that waits for its start waits for one that is already running.
    unfinished = sorted((cell for cell in recipe.cells if not is_finished(cell)), key=lambda cell: len(cell.starts))
    has_trained = {cell: Event() for cell in unfinished if not is_trained(cell)}

    def work(cell: Cell) -> Failure | None:
        try:
            return wait(cell) or do(cell)
        finally:
            if cell in has_trained:
                has_trained[cell].set()

    def wait(cell: Cell) -> Failure | None:
        """Wait until the start is trained; returns a failure if its training failed."""
        if cell.start is None:
            return None
        if cell.start in has_trained:
            has_trained[cell.start].wait()
        if stop.is_set() or is_trained(cell.start):
            return None
        reason = f"not started, because training of {cell.start.label}, which it starts from, failed"
        report(f"{cell.label}: {reason}")
        return Failure(cell, (), 1, reason)

    def wait_for_other_process(cell: Cell) -> None:
        """Wait while another process trains in the cell's folder: after a kill of the study, that is saving."""
        lock = FileLock(cell.folder / ".lock")
        if not Path(lock.lock_file).exists():
            return
        is_reported = False
        while not stop.is_set():
            try:
                lock.acquire(timeout=1 if is_reported else 0)
                lock.release()
                return
            except Timeout:
                if not is_reported:
                    report(f"{cell.label}: waiting for the process that still trains in {cell.folder}")
                is_reported = True

    def do(cell: Cell) -> Failure | None:
        wait_for_other_process(cell)
        for words in commands(cell, output / "configs"):
            if stop.is_set():
                return None
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            log = cell.folder.with_name(f"{cell.folder.name}.log")
            report(f"{cell.label}: medvqa-rl {' '.join(words)}, log in {log}")
            line = partial(progress_line, cell, log, steps_done(cell))
            with log.open("ab") as file, heartbeat(line, report):
                prefix = [] if words[0] == "phantom" else launcher  # a build is one process
                program = [sys.executable, "-m", *prefix, "medvqa_rl"]
                code = subprocess.call([*program, *words], stdout=file, stderr=file, env=environment)
            if code:
                lines = log.read_text("utf-8", "replace").splitlines() or [""]
                report(f"{cell.label}: failed with exit code {code}, see {log}")
                return Failure(cell, words, code, lines[-1])
            if cell in has_trained:
                has_trained[cell].set()  # its first command trains, the next one tests
        left = sum(not is_finished(other) for other in recipe.cells)
        report(f"{cell.label}: done, {len(recipe.cells) - left} of {len(recipe.cells)} cells finished")
        return None

    lock = ProcessLock(output / ".study.lock")
    lock.acquire(f"is running the study in {output}: wait for it, or choose another --output.")
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                return [failure for failure in pool.map(work, unfinished) if failure is not None]
            except KeyboardInterrupt:
                stop.set()
                raise
    finally:
        lock.release()
