"""Results of an evaluation as tables for the terminal. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import format_points, format_range, number_of
from medvqa_rl.evaluation.measures.protocols import TITLES

MEASURES = (
    ("thinking", "reward", "thinking reward of 2", ".2f"),
    ("perplexity", "value", "perplexity", ".1f"),
    ("similarity", "value", "similarity", ".2f"),
    ("faithfulness", "value", "true claims", ".1%"),
    ("faithfulness", "distinct_truths", "true claims per reasoning", ".2f"),
    ("confidence", "brier", "Brier", ".3f"),
    ("confidence", "ece", "ECE", ".3f"),
    ("confidence", "auroc", "AUROC", ".2f"),
)
"""Section and key in results.json, column title and format of what is measured besides accuracy and length."""


CUT_OFF = 0.1
"""Share of greedy answers at the token limit that needs a look."""
WHY_CUT_OFF = "Greedy decoding can repeat itself where sampling does not"
"""Why a model with sound sampled answers may have such ones."""


def results_table(results: Mapping[str, Any], title: str = "") -> TextTable:
    """Format results, as computed or as read from ``results.json``: percentages with 95 % intervals."""
    named: list[tuple[str, Mapping[str, Any]]] = [("all", results)]
    rules = []
    for key, values in results["by"].items():
        rules.append(len(named))
        named += [(f"{key.replace('_', ' ')}: {value}", summary) for value, summary in values.items()]
    rows = [
        (
            name,
            f"{summary['num_scored']:,}",
            f"{summary['num_clusters']:,}",
            format_points(summary["accuracy"]),
            format_range(summary["accuracy_low"], summary["accuracy_high"]),
            format_points(summary["majority_baseline"]),
            format_points(summary["no_answer_rate"]),
            format_points(summary["format_rate"]),
            format_number(summary["mean_length"], ".0f"),
        )
        for name, summary in named
    ]
    notes = _further(results)
    if (effective := results.get("effective_n")) is not None and not math.isnan(effective):
        number = min(effective, results["num_scored"])
        difference = results["detectable_difference"]
        found = (
            "no difference is detectable"
            if difference is not None and difference > 1
            else f"a true difference of {format_points(difference)} points is detected"
        )
        notes.append(
            f"Equivalent to {number:,.0f} independent questions. If another model answers a quarter of them "
            f"differently, {found} with 80 % power."
        )
    if unscored := results["n"] - results["num_scored"]:
        notes.append(f"{unscored} of {results['n']} questions could not be scored and are excluded.")
    return TextTable(
        title,
        ("", "questions", "images", "accuracy", "95 % interval", "majority", "no answer", "format", "length"),
        rows,
        drop=("images", "length", "format", "majority", "no answer"),
        notes=notes,
        rules=rules,
        bold={0},
    )


def format_number(value: float | None, spec: str) -> str:
    """Format a number; empty for None and NaN."""
    return "" if value is None or math.isnan(value) else f"{value:{spec}}"


def _moments(section: Mapping[str, Any] | None) -> str:
    """Mean and standard deviation of token counts."""
    if section is None or not (mean := format_number(section["mean"], ".0f")):
        return ""
    spread = section["variance"]
    return mean if spread is None or math.isnan(spread) else f"{mean} ± {math.sqrt(spread):.0f}"


def measured_table(named: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """Format the measures of evaluations' outputs: column names, and a row of cells per evaluation.

    Numbers of different instruments never share a column: each language model, similarity and judge has its own.
    Columns without a number are left out.

    Args:
        named: names and results, as computed or as read; older versions may lack some.
    """
    columns: dict[str, list[str]] = {}
    for index, (_, results) in enumerate(named):
        lengths = results.get("lengths", {})
        cells = {
            f"{title}, {outcome}": _moments(lengths.get(kind, {}).get(key))
            for kind, title in (("think", "reasoning"), ("total", "tokens"))
            for key, outcome in (("right", "right"), ("wrong", "wrong"))
        }
        for section, key, title, spec in MEASURES:
            found = results.get(section, {})
            by = found.get("by")
            cells[f"{title} ({by})" if by else title] = format_number(found.get(key), spec)
        for title, cell in cells.items():
            columns.setdefault(title, [""] * len(named))[index] = cell
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    rows = [[name, *(cells[index] for cells in shown.values())] for index, (name, _) in enumerate(named)]
    return list(shown), rows


def _further(results: Mapping[str, Any]) -> list[str]:
    """Lines with the numbers that have no column; results of older versions have fewer."""
    lines = []
    macro = {
        name.removeprefix("macro_").replace("_", " "): format_points(value)
        for name, value in results.get("averages", {}).items()
        if name.startswith("macro_")
    }
    if cells := [f"{name} {value}" for name, value in macro.items() if value]:
        lines.append("Macro-averaged accuracy, over " + ", ".join(cells) + ".")
    if (cut_off := results.get("truncated_rate") or 0.0) >= CUT_OFF:
        remedy = "below" if results.get("sampled") else "(`--samples 4`)"
        lines.append(
            f"{format_points(cut_off)} % of the greedy answers were cut off at the token limit. {WHY_CUT_OFF}: "
            f"compare with the sampled answers {remedy}."
        )
    names = {"exact_match": "exact match", "token_f1": "token F1", "rouge_l": "ROUGE-L"}
    if cells := [f"{name} {value}" for key, name in names.items() if (value := format_points(results.get(key)))]:
        lines.append("Open answers: " + ", ".join(cells) + ".")
    titles, rows = measured_table([("", results)])
    if titles:
        cells = [f"{title} {cell}" for title, cell in zip(titles, rows[0][1:])]
        lines.append("Mean ± standard deviation of token counts, and other measures: " + "; ".join(cells) + ".")
    confidence = results.get("confidence", {})
    for by, found in (("the answer's probability", confidence), ("votes", confidence.get("votes", {}))):
        if at := found.get("accuracy_at"):
            shares = ", ".join(f"{float(share):.0%}".replace("%", " %") for share in at)
            accuracies = ", ".join(map(format_points, at.values()))
            lines.append(
                f"Accuracy of the surest {shares} by {by}: {accuracies} (AUROC {format_decimal(found['auroc'], 2)})."
            )
    if confidence.get("abstained"):
        declined, answered = format_points(confidence["abstained"]), format_points(confidence["accuracy_answered"])
        lines.append(f"Declined to answer: {declined} %; accuracy of the other answers: {answered} %.")
    if sampled := results.get("sampled"):
        values = {name: row["value"] for name, row in sampled.items() if isinstance(row, Mapping)}
        cells = [f"{name.replace('_', ' ')} {format_points(value)}" for name, value in values.items()]
        lines.append(f"Of {sampled['num_samples']} sampled answers: " + ", ".join(cells) + ".")
    return lines


def controls_table(results: Mapping[str, Any]) -> TextTable:
    """Format the bias controls, as computed or as read from ``results.json``."""
    controls = results["controls"]
    rows = [
        (
            f"accuracy, {title}",
            f"{row['n']:,}",
            format_points(row["accuracy"]),
            _range(row, "accuracy"),
            format_points(row["drop"]),
            _range(row, "drop"),
            format_points(row["same_answer_rate"]),
            format_points(row.get("unfounded_claims", math.nan)),
        )
        for name, title in (("blank", "blank image"), ("shuffled", "shuffled images"), ("no_image", "no image"))
        if (row := controls.get(name))
    ]
    majority = f"{results['num_scored']:,}", format_points(results["majority_per_type"])
    rows.append(("accuracy, majority answer", *majority, "", "", "", "", ""))
    rules = []
    if (order := controls.get("option_order")) and order["n"]:
        rules.append(len(rows))
        for key, title in (
            ("consistency", "same option in every order"),
            ("accuracy_all_orders", "correct in every order"),
        ):
            rows.append((title, f"{order['n']:,}", format_points(order[key]), _range(order, key), "", "", "", ""))
    letters = results["letters"]
    shares = [f"{letter} {letters['gold'][letter]}/{letters['given'][letter]}" for letter in letters["gold"]]
    return TextTable(
        "Bias controls, in percent",
        (
            *("", "questions", "value", "95 % interval", "gain from the image", "95 % of the gain", "same answer"),
            "same, yet claims to see",
        ),
        rows,
        drop=("same, yet claims to see", "same answer", "questions"),
        notes=["Letters, gold/given: " + ", ".join(shares)] if shares else [],
        rules=rules,
    )


def protocols_table(results: Mapping[str, Any]) -> TextTable:
    """Format the accuracy by the scoring rules of other harnesses beside ours on the same questions."""
    rows, notes = [], []
    for name, row in results["protocols"].items():
        title, count = TITLES[name], f"{row['num_scored']:,}"
        theirs = format_points(row["accuracy"]), _range(row, "accuracy")
        rows.append((title, count, *theirs, format_points(row["ours"]), f"{row['num_different']:,}"))
        notes += [f"{number_of(count, 'question')} without a rule: {why}" for why, count in row["no_rule"].items()]
        if row["num_different"]:
            notes.append(f"protocol-{name}.jsonl lists each question on which {title} differs, and why.")
    return TextTable(
        "The same answers by the scoring rules of other harnesses, in percent",
        ("", "questions", "accuracy", "95 % interval", "ours", "questions that differ"),
        rows,
        drop=("questions",),
        notes=notes,
    )


def _range(row: Mapping[str, Any], key: str) -> str:
    return format_range(row[f"{key}_low"], row[f"{key}_high"])


def format_decimal(value: float, digits: int) -> str:
    """Format a number with some decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def format_interval(interval: Mapping[str, float] | None, factor: float, digits: int, sign: str = "") -> str:
    """Format ``estimate [low, high]`` times a factor; a dash if unknown."""
    if interval is None or _is_missing(interval["estimate"]):
        return "-"
    estimate, *bounds = (
        "" if _is_missing(value := interval[key]) else f"{factor * value:{sign}.{digits}f}"
        for key in ("estimate", "low", "high")
    )
    return f"{estimate} [{', '.join(bounds)}]" if all(bounds) else estimate


def _is_missing(value: float | None) -> bool:
    return value is None or math.isnan(value)


KAPPA_NOTE = "Kappa is undefined where one side always gives the same verdict."


def format_kappa(interval: Mapping[str, float] | None) -> str:
    """Format a kappa with its interval; undefined if it does not exist, a dash if unknown."""
    is_undefined = interval is not None and _is_missing(interval["estimate"])
    return "undefined" if is_undefined else format_interval(interval, 1, 2)
