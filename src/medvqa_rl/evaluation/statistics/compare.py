"""Compare evaluations of the same questions in pairs: differences with intervals and tests, overall and by group, and
the questions that flipped. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.files import write_json
from medvqa_rl.core.progress import open_console, print_line
from medvqa_rl.core.text import is_unicode, shown
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.results import read_origin
from medvqa_rl.evaluation.statistics.comparison_tables import show
from medvqa_rl.evaluation.statistics.intervals_and_tests import holm
from medvqa_rl.evaluation.statistics.summary import by_group, pair, paired_gain, summarise

Cell = tuple[str, str]
"""Data set and template."""


@dataclass(frozen=True)
class Evaluated:
    """A stored evaluation."""

    name: str
    folder: Path
    records: Sequence[EvalRecord]

    @property
    def cell(self) -> Cell:
        first = self.records[0]
        return (first.dataset, first.template)


def read_evaluations(path: Path) -> list[Evaluated]:
    """Read the evaluation in a folder, or else all evaluations below it.

    Raises:
        ValueError: there are none, one is unfinished, or its records cannot be read.
    """
    folder = path.parent if path.name == "samples.jsonl" else path
    own = folder / "samples.jsonl"
    files = [own] if own.is_file() else sorted(folder.rglob("samples.jsonl"))
    if not files:
        raise ValueError(f"There is no evaluation in {path}: give a folder that `medvqa-rl eval` wrote.")
    found = []
    for file in files:
        if (file.parent / "evaluation.json").is_file() and not (file.parent / "results.json").is_file():
            raise ValueError(f"The evaluation in {file.parent} is not finished: continue it with eval --resume.")
        if not is_unicode(str(file)):
            raise ValueError(f"The name of the folder {shown(str(file.parent), 300)} is not UTF-8: rename it.")
        records = read_records(file)
        if not records:
            raise ValueError(f"The file {file} holds no records: evaluate again.")
        found.append(Evaluated(str(file.parent), file.parent, records))
    return found


def match(paths: Sequence[Path]) -> list[list[Evaluated]]:
    """Group evaluations to compare: one list per data set and template that all runs have, in the order of the paths.

    If every path holds a single evaluation, these are compared whatever their templates.

    Raises:
        ValueError: fewer than two paths are given, the runs have nothing in common, or one holds two evaluations of
            the same data set with the same template.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} evaluation is given, but comparing needs two or more: name their folders.")
    runs = [read_evaluations(path) for path in paths]
    if all(len(run) == 1 for run in runs):
        return [[run[0] for run in runs]]
    by_cell: list[dict[Cell, Evaluated]] = []
    for path, run in zip(paths, runs):
        cells: dict[Cell, Evaluated] = {}
        for evaluated in run:
            if other := cells.get(evaluated.cell):
                raise ValueError(
                    f"{path} holds two evaluations of {evaluated.cell[0]} with the template {evaluated.cell[1]}, in "
                    f"{other.folder} and {evaluated.folder}: name the one to compare."
                )
            cells[evaluated.cell] = evaluated
        by_cell.append(cells)
    shared = [cell for cell in by_cell[0] if all(cell in cells for cells in by_cell)]
    if not shared:
        found = "; ".join(
            f"{path} has {', '.join(' with '.join(cell) for cell in cells)}" for path, cells in zip(paths, by_cell)
        )
        raise ValueError(f"The runs have no evaluation of the same data with the same template in common: {found}.")
    return [[cells[cell] for cells in by_cell] for cell in shared]


def compare(
    runs: Sequence[Evaluated], config: EvalConfig = EvalConfig(), *, every_pair: bool = False
) -> dict[str, Any]:
    """Compare every run with the first one, or every two runs, on the same questions.

    Args:
        runs: the first is the baseline.
        config: of the bootstrap.
        every_pair: compare each run with all before it.

    Returns:
        ``baseline``: its name. ``dataset``. ``runs``: for each ``name``, ``template``, ``n``, ``accuracy`` with its
        interval, ``detectable_difference`` and the output of :func:`measured_summary`. ``pairs``: for each the names
        ``baseline`` and ``run``, the output of :func:`paired_gain`, ``same_weights`` (whether both name the
        same), ``holm_p`` and ``mcnemar_holm_p`` (p-values of the
        permutation test and of McNemar's test adjusted for the number of pairs, Holm 1979), ``by`` (the same by group,
        adjusted for the number of values of a key) and ``flipped``, the questions that improved or worsened.

    Raises:
        ValueError: the runs evaluated different questions.
    """
    baseline, *others = runs
    chosen = list(combinations(runs, 2)) if every_pair else [(baseline, run) for run in others]
    overall = [
        {name: summary[name] for name in ("n", "num_scored", "num_clusters", "effective_n", "detectable_difference")}
        | {name: summary[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "no_answer_rate")}
        | {name: summary[name] for name in ("lengths", "thinking", "perplexity", "similarity", "faithfulness")}
        | {"name": run.name, "template": run.cell[1]}
        for run in runs
        for summary in [summarise(run.records, config)]
    ]
    pairs: list[dict[str, Any]] = [
        {"baseline": first.name, "run": run.name, **paired_gain(first.records, run.records, config)}
        for first, run in chosen
    ]
    _adjust(pairs)
    for row, (first, run) in zip(pairs, chosen):
        row["same_weights"] = is_same_model(read_origin(first.folder), read_origin(run.folder))
        row["by"] = _gains_by_group(first.records, run.records, config)
        shared = pair(first.records, run.records)
        row["flipped"] = [_flip(one, other) for one, other in shared if one.is_correct != other.is_correct]
    return {"baseline": baseline.name, "dataset": baseline.cell[0], "runs": overall, "pairs": pairs}


def is_same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two results.json name the same weights."""
    first, second = (model.get("weights") for model in (one.get("model") or {}, other.get("model") or {}))
    return first is not None and first == second


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row its p-values adjusted for the number of rows."""
    for test, name in (("permutation_p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        adjusted = holm(dict(enumerate(row[test] for row in rows)))
        for index, row in enumerate(rows):
            row[name] = adjusted[index]


def _gains_by_group(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], config: EvalConfig
) -> dict[str, dict[str, dict[str, Any]]]:
    """Gains by key and value, for groups with a question that is scored in both."""
    later = {record.sample_id: record for record in after}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for key, values in by_group(before).items():
        gains: dict[str, dict[str, Any]] = {}
        for value, members in values.items():
            partners = [later[record.sample_id] for record in members]
            if any(one.is_scored and other.is_scored for one, other in zip(members, partners)):
                gains[value] = dict(paired_gain(members, partners, config))
        _adjust(list(gains.values()))
        result[key] = gains
    return result


def _flip(one: EvalRecord, other: EvalRecord) -> dict[str, Any]:
    return {
        "sample_id": one.sample_id,
        "image_key": one.image_key,
        "direction": "improved" if other.is_correct else "worsened",
        "question": one.question,
        "options": list(one.options),
        "gold": "; ".join((one.gold, *one.alternatives)),
        "before": one.answer,
        "after": other.answer,
        "groups": dict(one.groups),
    }


def write_comparisons(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write comparisons with every flipped question as JSON."""
    write_json(path, {"comparisons": comparisons})


def run_compare(paths: Sequence[Path], *, output: Path | None = None, flips: int = 5) -> None:
    """Print the comparison of two or more runs.

    Args:
        paths: folders of evaluations; the first is the baseline.
        output: JSON file for the whole comparison.
        flips: number of flipped questions to print in each direction.

    Raises:
        ValueError: the runs cannot be compared.
    """
    console = open_console()
    comparisons = [compare(runs) for runs in match(paths)]
    for comparison in comparisons:
        show(comparison, console, flips)
        for row in comparison["pairs"]:
            if row["same_weights"]:
                print_line(console, f"{row['baseline']} and {row['run']} are evaluations of the same weights.")
    if output is not None:
        write_comparisons(comparisons, output)
        console.print(f"Written: {output}", highlight=False, soft_wrap=True)
