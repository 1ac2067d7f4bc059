"""Which evaluations of some runs are of the same questions, and how they differ. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medvqa_rl.config import EvalConfig
from medvqa_rl.evaluation.statistics.summary import paired_gain
from medvqa_rl.report.pages.page import Comparison
from medvqa_rl.report.runs import StoredEvaluation, StoredRun

SELECTION = "Steps are compared as they came; none was chosen by its accuracy."


@dataclass(frozen=True)
class Pair:
    """Two evaluations that ought to be of the same questions."""

    name: str
    names: tuple[str, str]
    before: StoredEvaluation
    after: StoredEvaluation
    note: str = ""


def last_of(run: StoredRun) -> StoredEvaluation | None:
    """The evaluation after the last step that was evaluated."""
    steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
    return steps[-1] if steps else None


def pairs(runs: Sequence[StoredRun]) -> Iterator[Pair]:
    """Before and after within each run, then every run against the first one."""
    for run in runs:
        label = f"{run.name}: " if len(runs) > 1 else ""
        steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
        if len(steps) > 1:
            note = f"Step {steps[0].step} against step {steps[-1].step}. {SELECTION}"
            yield Pair(f"{label}{_data_name(steps[-1])}", ("before", "after"), steps[0], steps[-1], note)
        named = {evaluation.name: evaluation for evaluation in run.evaluations}
        for name, after in named.items():
            before = named.get("before_" + name.removeprefix("after_"))
            if name.startswith("after_") and before is not None:
                yield Pair(f"{label}{name.removeprefix('after_')}", ("before", "after"), before, after)
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


def _data_name(evaluation: StoredEvaluation) -> str:
    dataset = evaluation.results.get("dataset")
    return str(dataset["name"]) if isinstance(dataset, dict) and "name" in dataset else "validation"


def compare(runs: Sequence[StoredRun]) -> tuple[list[Comparison], list[str]]:
    """All comparisons with their paired intervals, and a sentence for each that cannot be made."""
    made, problems = [], []
    for pair in pairs(runs):
        try:
            gain = paired_gain(pair.before.records(), pair.after.records(), EvalConfig())
        except (ValueError, TypeError) as error:
            problems.append(f"{pair.name} cannot be compared: {error}")
        else:
            made.append(Comparison(pair.name, pair.before.results, pair.after.results, gain, pair.note, pair.names))
    return made, problems


def accuracy_rows(runs: Sequence[StoredRun]) -> list[tuple[str, str, StoredEvaluation]]:
    """Run, name and evaluation of what a table of results shows: of the evaluations after steps the first and last."""
    rows = []
    for run in runs:
        steps = [evaluation for evaluation in run.evaluations if evaluation.step is not None]
        shown = {evaluation.name for evaluation in (*steps[:1], *steps[-1:])}
        for evaluation in run.evaluations:
            if evaluation.step is None or evaluation.name in shown:
                name = evaluation.name if evaluation.step is None else f"step {evaluation.step}"
                rows.append((run.name, f"{name} ({_data_name(evaluation)})", evaluation))
    return rows
