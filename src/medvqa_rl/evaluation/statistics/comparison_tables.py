"""Comparisons of evaluations as tables for the terminal, and as CSV. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from medvqa_rl.core.files import without_nan
from medvqa_rl.core.tables import TextTable, as_csv
from medvqa_rl.core.text import format_detectable, format_p, format_points, format_range
from medvqa_rl.evaluation.statistics.tables import measured_table

_NOTE = (
    "Intervals and the permutation test resample whole images; McNemar's test treats questions as independent. Holm: "
    "{}. Detect.: the difference detectable with 80 % power; none if these are too few questions to detect any."
)


def runs_table(comparison: Mapping[str, Any]) -> TextTable:
    """Accuracy of each run in percent."""
    header = ("run", "prompt", "questions", "images", "accuracy", "95 % interval", "no answer")
    rows = [
        (
            row["name"],
            row["template"],
            f"{row['num_scored']:,}",
            f"{row['num_clusters']:,}",
            format_points(row["accuracy"]),
            format_range(row["accuracy_low"], row["accuracy_high"]),
            format_points(row["no_answer_rate"]),
        )
        for row in comparison["runs"]
    ]
    title = f"{comparison['dataset'] or 'evaluations'}: accuracy in percent"
    return TextTable(title, header, rows, drop=("images", "prompt", "no answer", "questions"))


def reasoning_table(comparison: Mapping[str, Any]) -> TextTable:
    """Lengths and the other measures of the outputs of each run."""
    titles, rows = measured_table([(row["name"], row) for row in comparison["runs"]])
    return TextTable(
        "Lengths in tokens (mean ± standard deviation) and reasoning",
        ("run", *titles),
        rows,
        drop=[title for title in titles if title.startswith("tokens")],
    )


_DIFFERENCE = ("n", "images", "difference", "95 % interval", "better", "worse", "McNemar p")


def _difference(row: Mapping[str, Any]) -> list[str]:
    """Cells of a pair under ``_DIFFERENCE``."""
    return [
        f"{row['n']:,}",
        f"{row['num_clusters']:,}",
        format_points(row["gain"], "+"),
        format_range(row["gain_low"], row["gain_high"], "+"),
        str(row["improved"]),
        str(row["worsened"]),
        format_p(row["mcnemar_p"]),
    ]


def pair_table(gains: Mapping[str, Any], baseline: str) -> TextTable:
    """Differences between a run and the baseline in points, overall and by group."""
    named: list[tuple[str, Mapping[str, Any]]] = [("all", gains)]
    rules = []
    for key, values in gains["by"].items():
        rules.append(len(named))
        named += [(f"{key.replace('_', ' ')}: {value}", row) for value, row in values.items()]
    rows = [
        (
            name,
            *_difference(row),
            format_p(row["permutation_p"]),
            format_p(row["holm_p"]),
            format_detectable(row["detectable_gain"]),
        )
        for name, row in named
    ]
    return TextTable(
        f"{gains['run']} minus {baseline}, in points",
        ("", *_DIFFERENCE, "permut. p", "Holm p", "detect."),
        rows,
        drop=("images", "detect.", "McNemar p", "n", "permut. p", "worse", "better"),
        rules=rules,
        bold={0},
    )


def pairs_table(comparison: Mapping[str, Any]) -> TextTable:
    """Differences between every two runs in points, one row each."""
    rows = [
        (
            f"{row['run']} minus {row['baseline']}",
            *_difference(row),
            format_p(row["mcnemar_holm_p"]),
            format_p(row["permutation_p"]),
            format_p(row["holm_p"]),
            format_detectable(row["detectable_gain"]),
        )
        for row in comparison["pairs"]
    ]
    return TextTable(
        "Differences between every two, in points",
        ("", *_DIFFERENCE, "McNemar Holm", "permut. p", "permut. Holm", "detect."),
        rows,
        drop=("images", "detect.", "McNemar p", "n", "permut. p", "McNemar Holm", "worse", "better"),
    )


def pairs_csv(comparison: Mapping[str, Any]) -> str:
    """The pairs as CSV, with shares between 0 and 1; NaN is empty."""
    names = [name for name in comparison["pairs"][0] if name not in ("by", "flipped")]
    rows = [[comparison["dataset"], *(row[name] for name in names)] for row in comparison["pairs"]]
    return as_csv(["dataset", *names], without_nan(rows))


def flips_table(gains: Mapping[str, Any], most: int) -> TextTable:
    """The first ``most`` questions that flipped in each direction."""
    flipped = gains["flipped"]
    rows = [
        row
        for direction in ("improved", "worsened")
        for row in [row for row in flipped if row["direction"] == direction][:most]
    ]
    cells = [
        (
            "+" if row["direction"] == "improved" else "-",
            *(row["question"], row["gold"], row["before"] or "(none)", row["after"] or "(none)", row["sample_id"]),
        )
        for row in rows
    ]
    header = ("", "question", "gold", "before", "after", "sample")
    title = f"{len(rows)} of {len(flipped)} questions that flipped"
    return TextTable(title, header, cells, drop=("sample",), prose=header)


def show(comparison: Mapping[str, Any], console: Console, flips: int = 5) -> None:
    """Print the tables of a comparison with the baseline."""
    console.print(runs_table(comparison))
    console.print(reasoning_table(comparison))
    for row in comparison["pairs"]:
        console.print(pair_table(row, comparison["baseline"]))
        if flips and row["flipped"]:
            console.print(flips_table(row, flips))
    console.print(_NOTE.format("the permutation p adjusted for the number of runs, or values of a group"), style="dim")


def show_pairs(comparison: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a comparison of every two runs."""
    console.print(runs_table(comparison))
    console.print(reasoning_table(comparison))
    console.print(pairs_table(comparison))
    console.print(_NOTE.format("the p-value adjusted for the number of pairs"), style="dim")
