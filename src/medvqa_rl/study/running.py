"""Running the cells of a study with the verbs of the command, and forecasting how long it takes. Imports no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Event, Lock

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.data import load_dataset
from medvqa_rl.study.plan.recipe import Cell, Recipe, Test


@dataclass(frozen=True)
class Failure:
    """A cell that did not end well."""

    cell: Cell
    command: Sequence[str]
    """Empty where nothing could be started."""
    code: int
    last_line: str


def steps_done(cell: Cell) -> int:
    """Training steps that a cell's status tells of; 0 before the first."""
    step = _status(cell).get("step")
    return step if isinstance(step, int) else 0


def is_trained(cell: Cell) -> bool:
    """Whether a cell's training has ended, or needs none."""
    return cell.arm.verb == "none" or _status(cell).get("state") == "finished"


def is_tested(test: Test) -> bool:
    """Whether an evaluation is complete: its results are written last."""
    return (test.folder / "results.json").is_file()


def is_finished(cell: Cell) -> bool:
    """Whether nothing is left to do."""
    return is_trained(cell) and all(map(is_tested, cell.tests))


def _status(cell: Cell) -> Mapping[str, object]:
    path = cell.folder / "status.json"
    if not path.is_file():
        return {}
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {path} is damaged ({error}): remove the folder of this cell.") from error
    return status if isinstance(status, dict) else {}


# --- forecast ------------------------------------------------------------------------------------------------------


def step_seconds(recipe: Recipe) -> dict[str, float]:
    """Seconds of a step of each arm: measured in its finished cells, else in those of its verb, else as stated."""
    by_arm: dict[str, list[float]] = {}
    by_verb: dict[str, list[float]] = {}
    for cell in recipe.cells:
        if cell.arm.verb != "none" and is_trained(cell):
            rows = [json.loads(line) for line in (cell.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
            times = [row["step_time"] for row in rows if row.get("step_time") is not None]
            by_arm.setdefault(cell.arm.name, []).extend(times)
            by_verb.setdefault(cell.arm.verb, []).extend(times)
    rates = {}
    for arm in recipe.arms:
        measured = by_arm.get(arm.name) or by_verb.get(arm.verb)
        rates[arm.name] = fmean(measured) if measured else recipe.forecast.seconds_per_step.get(arm.verb, 0.0)
    return rates


def forecast(recipe: Recipe) -> dict[str, float]:
    """Seconds that are left of each cell, by the name of its folder's path."""
    rates, left = step_seconds(recipe), {}
    sizes: dict[str, int] = {}
    for cell in recipe.cells:
        seconds = 0.0
        if not is_trained(cell):
            seconds += recipe.forecast.seconds_per_start
            seconds += (cell.config.train.steps - steps_done(cell)) * rates[cell.arm.name]
        if not all(map(is_tested, cell.tests)):
            seconds += recipe.forecast.seconds_per_start
        for test in cell.tests:
            if not is_tested(test):
                if test.name not in sizes:
                    size = len(load_dataset(test.config.data, "test"))
                    sizes[test.name] = min(size, test.config.eval.max_samples or size)
                seconds += sizes[test.name] * recipe.forecast.seconds_per_question
        left[str(cell.folder)] = seconds
    return left


def plan_table(recipe: Recipe) -> Table:
    """Every cell with its state and what is left of it."""
    left = forecast(recipe)
    table = Table(title=f"{recipe.title}: {len(recipe.cells)} cells", title_justify="left")
    has_starts = any(cell.start for cell in recipe.cells)
    from_title = ["from"] if has_starts else []
    for name in ("cell", *from_title, "verb", "steps", "tests", "state", "minutes left", "folder"):
        table.add_column(name, justify="right" if name in ("steps", "minutes left") else "left", overflow="fold")
    for cell in recipe.cells:
        done = steps_done(cell) if cell.arm.verb != "none" else 0
        tested = sum(map(is_tested, cell.tests))
        state = "finished" if is_finished(cell) else "begun" if done or tested else "not begun"
        table.add_row(
            cell.label,
            *([cell.start.label if cell.start else ""] if has_starts else []),
            "" if cell.arm.verb == "none" else cell.arm.verb,
            "" if cell.arm.verb == "none" else f"{done}/{cell.config.train.steps}",
            f"{tested}/{len(cell.tests)}",
            state,
            f"{left[str(cell.folder)] / 60:.1f}",
            str(cell.folder),
        )
    table.caption = f"{sum(left.values()) / 60:.0f} minutes are left, one cell after the other."
    return table


# --- running -------------------------------------------------------------------------------------------------------


def commands(cell: Cell, configs: Path) -> list[list[str]]:
    """What is left to do for a cell, as commands; their settings are written to the folder ``configs``.

    All tests are one command: on small models a process takes longer to start than to answer a hundred questions.
    """
    todo = []
    name = f"{cell.arm.name}-{cell.folder.name}"
    if not is_trained(cell):
        path = _write(configs / f"{name}.yaml", cell.config.model_dump(mode="json"))
        resume = ["--resume"] if (cell.folder / "status.json").is_file() else []
        todo.append([cell.arm.verb, str(path), *resume])
    if left := {str(test.folder): test.config.model_dump(mode="json") for test in cell.tests if not is_tested(test)}:
        checkpoint = None if cell.checkpoint is None else str(cell.checkpoint)
        path = _write(configs / f"{name}-tests.yaml", {"checkpoint": checkpoint, "tests": left})
        todo.append(["study", "answer", str(path)])
    return todo


def _write(path: Path, settings: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(dict(settings)), encoding="utf-8")
    return path


def run_study(recipe: Recipe, output: Path, *, jobs: int = 1, processes: int = 1, console: Console) -> list[Failure]:
    """Do what is left of every cell, ``jobs`` cells at a time. One that fails stops those that start from it, and no
    others.

    More than one of ``processes`` share the work of a command, a GPU each, started by ``accelerate launch``. What a
    cell prints goes to a log beside its folder. Ctrl-C reaches the commands too, which save a checkpoint.

    Returns:
        The cells that failed.

    Raises:
        ValueError: the study is run by another process, or cells at a time would share GPUs.
    """
    if jobs > 1 and processes > 1:
        raise ValueError(
            f"--jobs is {jobs} and --processes {processes}, but cells that run at a time would take the same "
            f"{processes} GPUs: leave one of the two at 1."
        )
    launcher = ["accelerate.commands.launch", "--num_processes", str(processes), "-m"] if processes > 1 else []
    program = [sys.executable, "-m", *launcher, "medvqa_rl"]
    output.mkdir(parents=True, exist_ok=True)
    stop, printing = Event(), Lock()

    def say(text: str) -> None:
        with printing:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    # Starts come first, so whoever waits for one waits for a cell that is worked on already.
    unfinished = sorted((cell for cell in recipe.cells if not is_finished(cell)), key=lambda cell: len(cell.starts))
    has_trained = {cell: Event() for cell in unfinished if not is_trained(cell)}

    def work(cell: Cell) -> Failure | None:
        try:
            return wait(cell) or do(cell)
        finally:
            if cell in has_trained:
                has_trained[cell].set()

    def wait(cell: Cell) -> Failure | None:
        """Until the start is trained; its failure if it never will be."""
        if cell.start is None:
            return None
        if cell.start in has_trained:
            has_trained[cell.start].wait()
        if stop.is_set() or is_trained(cell.start):
            return None
        say(f"{cell.label}: not begun, for {cell.start.label}, which it starts from, is not trained")
        return Failure(cell, (), 1, f"not begun, for {cell.start.label}, which it starts from, is not trained")

    def do(cell: Cell) -> Failure | None:
        for words in commands(cell, output / "configs"):
            if stop.is_set():
                return None
            say(f"{cell.label}: medvqa-rl {' '.join(words)}")
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            log = cell.folder.with_name(f"{cell.folder.name}.log")
            with log.open("ab") as file:
                code = subprocess.call([*program, *words], stdout=file, stderr=file)
            if code:
                lines = log.read_text("utf-8", "replace").splitlines() or [""]
                say(f"{cell.label}: failed with exit code {code}, see {log}")
                return Failure(cell, words, code, lines[-1])
            if cell in has_trained:
                has_trained[cell].set()  # by its first command; what follows are its tests
        say(f"{cell.label}: done")
        return None

    lock = FileLock(output / ".study.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"The study in {output} is being run by another process: wait for it, or choose another --output."
        ) from None
    with lock, ThreadPoolExecutor(jobs) as pool:
        try:
            return [failure for failure in pool.map(work, unfinished) if failure is not None]
        except KeyboardInterrupt:
            stop.set()
            raise
