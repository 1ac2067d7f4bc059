"""Comparisons of evaluations with the same questions, within a run and between runs. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.config.sharing import shareable
from medvqa_rl.evaluation.statistics.compare import is_same_model
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.report.runs import StoredEvaluation, StoredRun

SELECTION = "The first and the last evaluation are compared; neither was chosen by its accuracy."


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions."""

    name: str
    before: Mapping[str, Any]
    """The content of ``results.json``."""
    after: Mapping[str, Any]
    gain: Mapping[str, Any]
    """What :func:`medvqa_rl.evaluation.statistics.summary.paired_gain` returns."""
    note: str = ""
    """A sentence below the numbers."""
    names: tuple[str, str] = ("before", "after")
    """What the two are called."""

    def breakdown(self) -> list[dict[str, Any]]:
        """Return a table of accuracy for each grouping that both evaluations have, the largest groups first."""
        tables = []
        for key in ("modality", "family", "answer_type"):
            before, after = self.before["by"].get(key, {}), self.after["by"].get(key, {})
            rows = [(value, before[value], after[value]) for value in before if value in after]
            if rows:
                rows.sort(key=lambda row: -row[2]["num_scored"])
                tables.append({"title": f"By {key.replace('_', ' ')}", "rows": rows})
        return tables


@dataclass(frozen=True)
class Pair:
    """Two evaluations that should have the same questions."""

    name: str
    names: tuple[str, str]
    before: StoredEvaluation
    after: StoredEvaluation
    note: str = ""


def last_of(run: StoredRun) -> StoredEvaluation | None:
    """Return the evaluation after the last evaluated step."""
    steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
    return steps[-1] if steps else None


def pairs(runs: Sequence[StoredRun]) -> Iterator[Pair]:
    """Yield before and after within each run, then every run against the first."""
    for run in runs:
        label = f"{run.name}: " if len(runs) > 1 else ""
        steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
        if len(steps) > 1:
            note = f"Step {steps[0].step} and step {steps[-1].step}. {SELECTION}"
            yield Pair(f"{label}{_data_name(steps[-1])}", ("before", "after"), steps[0], steps[-1], note)
        named = {evaluation.name: evaluation for evaluation in run.evaluations}
        for name, after in named.items():
            before = named.get("before_" + name.removeprefix("after_"))
            if name.startswith("after_") and before is not None:
                yield Pair(f"{label}{name.removeprefix('after_')}", ("before", "after"), before, after)
        yield from _standalone(run, label)
    for run in runs[1:]:
        first, other = last_of(runs[0]), last_of(run)
        names = (runs[0].name, run.name)
        if first is not None and other is not None:
            yield Pair(f"{run.name} against {runs[0].name}", names, first, other, "After the last step of each.")
        own = {evaluation.name: evaluation for evaluation in runs[0].evaluations if evaluation.step is None}
        for evaluation in run.evaluations:
            if evaluation.step is None and evaluation.name in own and not evaluation.name.startswith("before_"):
                yield Pair(
                    f"{run.name} against {runs[0].name}: {evaluation.name}", names, own[evaluation.name], evaluation
                )


def _standalone(run: StoredRun, label: str) -> Iterator[Pair]:
    """Yield evaluations of the run's initial model beside those of its checkpoints, on the same questions."""
    initial = {name: run.config.get("model", {}).get(name) for name in ("path", "adapter")}
    before: dict[tuple[object, ...], StoredEvaluation] = {}
    own = []
    for evaluation in run.evaluations:
        model = evaluation.results.get("model")
        if evaluation.step is not None or not isinstance(model, dict):
            continue
        if {name: model.get(name) for name in initial} == initial:
            before[_questions(evaluation)] = evaluation
        elif _is_checkpoint(Path(model.get("adapter") or model.get("path") or "."), run.path):
            own.append(evaluation)
    for after in own:
        if earlier := before.get(_questions(after)):
            same = is_same_model(earlier.results, after.results)
            note = "Both are evaluations of the same weights." if same else _average_note(after)
            yield Pair(f"{label}{_data_name(after)}, {after.name}", ("before", "after"), earlier, after, note)


def _average_note(evaluation: StoredEvaluation) -> str:
    """Say whose average was evaluated; empty for weights as they are."""
    model = evaluation.results["model"]
    if not model.get("average_with"):
        return ""
    other = shareable({"model": {"average_with": model["average_with"]}})["model.average_with"]
    return f"After: {model['average_weight']:g} of the trained weights, the rest of {other}."


def _questions(evaluation: StoredEvaluation) -> tuple[object, ...]:
    """What two evaluations must share to be compared: questions, prompt and data set."""
    dataset, settings = evaluation.results.get("dataset", {}), evaluation.results.get("settings", {})
    return dataset.get("name"), dataset.get("questions"), settings.get("template")


def _is_checkpoint(model: Path, run: Path) -> bool:
    """Whether a model is a checkpoint of the run; a moved run keeps its name."""
    folder = model.parent if model.name == "best" else model.parent.parent
    return model.name.startswith(("best", "step_")) and folder.name == (run.name or run.resolve().name)


def _data_name(evaluation: StoredEvaluation) -> str:
    dataset = evaluation.results.get("dataset")
    return str(dataset["name"]) if isinstance(dataset, dict) and "name" in dataset else "validation"


def compare(runs: Sequence[StoredRun]) -> tuple[list[Comparison], list[str]]:
    """Return all comparisons with paired intervals, and a sentence for each that is not possible."""
    made, problems = [], []
    for pair in pairs(runs):
        try:
            gain = paired_gain(pair.before.records(), pair.after.records(), EvalConfig())
        except (ValueError, TypeError) as error:
            problems.append(f"{pair.name} cannot be compared: {error}")
        else:
            made.append(Comparison(pair.name, pair.before.results, pair.after.results, gain, pair.note, pair.names))
    return made, problems


def accuracy_rows(runs: Sequence[StoredRun], *, every: bool = False) -> list[tuple[str, str, StoredEvaluation]]:
    """Return run, name and evaluation for a table of results.

    Args:
        every: all evaluations during training, not only the first and the last.
    """
    rows = []
    for run in runs:
        steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
        shown = {evaluation.name for evaluation in (steps if every else (*steps[:1], *steps[-1:]))}
        for evaluation in sorted(run.evaluations, key=_before_first):
            if evaluation.step is None or evaluation.name in shown:
                name = evaluation.name if evaluation.step is None else f"step {evaluation.step}"
                rows.append((run.name, f"{name} ({_data_name(evaluation)})", evaluation))
    return rows


def _before_first(evaluation: StoredEvaluation) -> tuple[int, str, bool]:
    """Sort evaluations of steps by step, then the others by name, each ``before_x`` in front of its ``after_x``."""
    if evaluation.step is not None:
        return evaluation.step, "", False
    name = evaluation.name.removeprefix("before").removeprefix("after")
    return sys.maxsize, name, evaluation.name.startswith("after")
