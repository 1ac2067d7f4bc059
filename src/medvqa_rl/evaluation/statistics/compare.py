"""Two or more evaluations of the same questions, compared pair by pair: differences with intervals and tests, by
group, and the questions whose answers turned. Imports no torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.files import write_json
from medvqa_rl.core.progress import open_console
from medvqa_rl.core.text import format_p, format_points
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.statistics.stats import holm
from medvqa_rl.evaluation.statistics.summary import by_group, pair, paired_gain, summarise
from medvqa_rl.evaluation.statistics.tables import measured_table

Cell = tuple[str, str]
"""Data set and template."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation as it is on disk."""

    name: str
    folder: Path
    records: Sequence[EvalRecord]

    @property
    def cell(self) -> Cell:
        first = self.records[0]
        return (first.dataset, first.template)


def read_evaluations(path: Path) -> list[Evaluated]:
    """The evaluations in a folder: its own, or those in the folders below it.

    Raises:
        ValueError: there are none, one is not finished, or its records cannot be read.
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
        records = read_records(file)
        if not records:
            raise ValueError(f"The file {file} holds no records: evaluate again.")
        found.append(Evaluated(str(file.parent), file.parent, records))
    return found


def match(paths: Sequence[Path]) -> list[list[Evaluated]]:
    """What is to be compared with what: one list per data set and template that all runs have, in the order of the
    paths. Where every path holds a single evaluation, these are compared whatever their templates.

    Raises:
        ValueError: fewer than two paths, nothing in common, or two evaluations of the same in one path.
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
        told = "; ".join(
            f"{path} has {', '.join(' with '.join(cell) for cell in cells)}" for path, cells in zip(paths, by_cell)
        )
        raise ValueError(f"The runs have no evaluation of the same data with the same template in common: {told}.")
    return [[cells[cell] for cells in by_cell] for cell in shared]


def compare(
    runs: Sequence[Evaluated], config: EvalConfig = EvalConfig(), *, every_pair: bool = False
) -> dict[str, Any]:
    """Compare every run with the first one, or every two of them, on the same questions.

    Args:
        every_pair: compare each run with all before it, not with the first alone.

    Returns:
        ``baseline``, its name; ``dataset``; ``runs``: for each ``name``, ``template``, ``n``, ``accuracy`` with its
        interval, ``detectable_difference`` and what :func:`measured_summary` returns;
        ``pairs``: for each pair ``baseline`` and ``run``, their names, what
        :func:`paired_gain` returns, ``holm_p`` and ``mcnemar_holm_p`` (the p-values of
        the permutation test and of McNemar's adjusted for the number of pairs, Holm 1979), ``by`` (the same by group,
        adjusted for the values of a key) and ``flipped``, the questions that got better or worse.

    Raises:
        ValueError: the runs are of different questions.
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
        row["by"] = _gains_by_group(first.records, run.records, config)
        turned = [both for both in pair(first.records, run.records) if both[0].is_correct != both[1].is_correct]
        row["flipped"] = [_flip(one, other) for one, other in turned]
    return {"baseline": baseline.name, "dataset": baseline.cell[0], "runs": overall, "pairs": pairs}


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row its p-values adjusted for the others."""
    for test, name in (("permutation_p", "holm_p"), ("mcnemar_p", "mcnemar_holm_p")):
        adjusted = holm(dict(enumerate(row[test] for row in rows)))
        for place, row in enumerate(rows):
            row[name] = adjusted[place]


def _gains_by_group(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], config: EvalConfig
) -> dict[str, dict[str, dict[str, Any]]]:
    """Gains by key and value, where a question is scored in both."""
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
        "gold": one.gold,
        "before": one.answer,
        "after": other.answer,
        "groups": dict(one.groups),
    }


def _bounds(low: float, high: float, sign: str = "") -> str:
    return "" if math.isnan(low) else f"{format_points(low, sign)} to {format_points(high, sign)}"


def runs_table(comparison: Mapping[str, Any]) -> Table:
    """Accuracy of every run in percent."""
    table = Table(title=f"{comparison['dataset'] or 'evaluations'}: accuracy in percent", title_justify="left")
    for name in ("run", "prompt", "questions", "images", "accuracy", "95 % interval", "no answer"):
        is_text = name in ("run", "prompt")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in comparison["runs"]:
        table.add_row(
            Text(row["name"]),
            row["template"],
            f"{row['num_scored']:,}",
            f"{row['num_clusters']:,}",
            format_points(row["accuracy"]),
            _bounds(row["accuracy_low"], row["accuracy_high"]),
            format_points(row["no_answer_rate"]),
        )
    return table


def reasoning_table(comparison: Mapping[str, Any]) -> Table:
    """What was measured of the outputs of every run besides right and wrong."""
    titles, rows = measured_table([(row["name"], row) for row in comparison["runs"]])
    table = Table(title="Lengths in tokens (mean ± standard deviation) and reasoning", title_justify="left")
    for title in ("run", *titles):
        table.add_column(title, justify="left" if title == "run" else "right", overflow="fold")
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table


def _difference(row: Mapping[str, Any]) -> list[str]:
    """Questions, images, difference with its interval, better, worse and McNemar's p of a pair, as cells."""
    return [
        f"{row['n']:,}",
        f"{row['num_clusters']:,}",
        format_points(row["gain"], "+"),
        _bounds(row["gain_low"], row["gain_high"], "+"),
        str(row["improved"]),
        str(row["worsened"]),
        format_p(row["mcnemar_p"]),
    ]


def pair_table(gains: Mapping[str, Any], baseline: str) -> Table:
    """Differences of one run from the baseline, overall and by group, in points."""
    table = Table(title=Text(f"{gains['run']} minus {baseline}, in points"), title_justify="left")
    names = ("", "n", "images", "difference", "95 % interval", "better", "worse", "McNemar p", "permut. p", "Holm p")
    for name in (*names, "detect."):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def add(name: str, row: Mapping[str, Any], style: str = "") -> None:
        table.add_row(
            Text(name),
            *_difference(row),
            format_p(row["permutation_p"]),
            format_p(row["holm_p"]),
            format_points(row["detectable_gain"]),
            style=style,
        )

    add("all", gains, "bold")
    for key, values in gains["by"].items():
        table.add_section()
        for value, row in values.items():
            add(f"{key.replace('_', ' ')}: {value}", row)
    return table


def pairs_table(comparison: Mapping[str, Any]) -> Table:
    """Differences of every two runs in points, a row for each."""
    table = Table(title="Differences of every two, in points", title_justify="left")
    names = ("", "n", "images", "difference", "95 % interval", "better", "worse")
    for name in (*names, "McNemar p", "Holm", "permut. p", "Holm", "detect."):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    for row in comparison["pairs"]:
        table.add_row(
            Text(f"{row['run']} minus {row['baseline']}"),
            *_difference(row),
            format_p(row["mcnemar_holm_p"]),
            format_p(row["permutation_p"]),
            format_p(row["holm_p"]),
            format_points(row["detectable_gain"]),
        )
    return table


def pairs_csv(comparison: Mapping[str, Any]) -> str:
    """The same as text in CSV, shares between 0 and 1; what does not apply is empty."""
    names = [name for name in comparison["pairs"][0] if name not in ("by", "flipped")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["dataset", *names])
    for row in comparison["pairs"]:
        cells = [row[name] for name in names]
        is_missing = [isinstance(cell, float) and math.isnan(cell) for cell in cells]
        writer.writerow([comparison["dataset"], *("" if no else cell for no, cell in zip(is_missing, cells))])
    return file.getvalue()


def flips_table(gains: Mapping[str, Any], most: int) -> Table:
    """The first questions whose answers turned, as many in each direction as are asked for."""
    flipped = gains["flipped"]
    rows = [row for way in ("improved", "worsened") for row in [r for r in flipped if r["direction"] == way][:most]]
    table = Table(title=f"{len(rows)} of {len(flipped)} questions that flipped", title_justify="left")
    for name in ("", "question", "gold", "before", "after", "sample"):
        table.add_column(name, overflow="fold")
    for row in rows:
        sign = "+" if row["direction"] == "improved" else "-"
        cells = (row["question"], row["gold"], row["before"] or "(none)", row["after"] or "(none)", row["sample_id"])
        table.add_row(sign, *(Text(cell) for cell in cells))
    return table


def show(comparison: Mapping[str, Any], console: Console, flips: int = 5) -> None:
    """Print the tables of a comparison."""
    console.print(runs_table(comparison))
    console.print(reasoning_table(comparison))
    for row in comparison["pairs"]:
        console.print(pair_table(row, comparison["baseline"]))
        if flips and row["flipped"]:
            console.print(flips_table(row, flips))
    console.print(
        "Intervals and the permutation test take all questions of an image together; McNemar's does not. Holm: "
        "the permutation test adjusted for the number of runs, or of values of a group. Detect.: the difference found "
        "with 80 % power.",
        style="dim",
    )


def show_pairs(comparison: Mapping[str, Any], console: Console) -> None:
    """Print how every two runs differ."""
    console.print(runs_table(comparison))
    console.print(reasoning_table(comparison))
    console.print(pairs_table(comparison))
    console.print(
        "Intervals and the permutation test take all questions of an image together; McNemar's does not. Holm: the "
        "p-value before it, adjusted for the number of pairs. Detect.: the difference found with 80 % power.",
        style="dim",
    )


def write_comparisons(comparisons: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write comparisons as JSON, every flipped question included, as a whole or not at all."""
    write_json(path, {"comparisons": comparisons})


def run_compare(paths: Sequence[Path], *, output: Path | None = None, flips: int = 5) -> None:
    """Print the comparison of two or more runs and write all of it, every flipped question included, if asked.

    Raises:
        ValueError: the runs cannot be compared.
    """
    console = open_console(140)
    comparisons = [compare(runs) for runs in match(paths)]
    for comparison in comparisons:
        show(comparison, console, flips)
    if output is not None:
        write_comparisons(comparisons, output)
        console.print(f"Written: {output}", highlight=False, soft_wrap=True)
