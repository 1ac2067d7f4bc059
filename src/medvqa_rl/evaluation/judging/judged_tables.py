"""Tables and sentences from ``judged.json``, the judges' results on an evaluation. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import format_p, format_points
from medvqa_rl.evaluation.statistics.tables import KAPPA_NOTE, format_interval, format_kappa


def judged_tables(results: Mapping[str, Any]) -> list[TextTable]:
    """Tables of the results; empty ones are left out."""
    judges = results["judges"]
    about = results["evaluation"]
    title = f"{about['dataset']} ({about['template']}): {about['judged']:,} answers about {about['images']:,} images"
    tables = [
        TextTable(
            f"{title}, reasoning from 0 to 3",
            ("judge", "mean", "of right answers", "of wrong answers", "0 / 1 / 2 / 3", "unscored"),
            [
                (
                    row["judge"]["name"],
                    format_interval(part["mean"], 1, 2),
                    format_interval(part["of_right"], 1, 2),
                    format_interval(part["of_wrong"], 1, 2),
                    " / ".join(str(count) for count in part["scores"].values()),
                    str(part["unscored"]),
                )
                for row in judges
                if (part := row["reasoning"])
            ],
            drop=("0 / 1 / 2 / 3", "unscored"),
        ),
        TextTable(
            "Answers that mean the same as the reference, in percent",
            ("judge", "right", "unscored", "questions", "scorer says", "agrees", "kappa", "false yes", "false no"),
            [
                (
                    row["judge"]["name"],
                    format_interval(part["right"], 100, 1),
                    str(part["unscored"]),
                    f"{name} ({found['n']:,})",
                    format_points(found["label_yes_rate"]) or "-",
                    format_interval(found["accuracy"], 100, 1),
                    format_kappa(found["kappa"]),
                    format_interval(found["false_yes_rate"], 100, 1),
                    format_interval(found["false_no_rate"], 100, 1),
                )
                for row in judges
                if (part := row["correctness"])
                for name, found in part["against_scorer"].items()
            ],
            drop=("scorer says", "unscored", "questions", "false yes", "false no", "agrees"),
        ),
        TextTable(
            "Agreement of the two judges",
            ("of", "answers", "same, %", "kappa"),
            [
                (of, str(row["n"]), format_interval(row["same"], 100, 1), format_kappa(row["kappa"]))
                for of, row in (results["agreement"] or {}).items()
            ],
        ),
        TextTable(
            "What moves the judges: the same case edited, in percent of cases",
            ("judge", "edit", "cases", "changed", "raised", "lowered", "p", "unscored"),
            [
                (
                    row["judge"]["name"],
                    f"{check['of']}: {check['check']}",
                    str(check["n"]),
                    format_interval(check["changed"], 100, 0),
                    format_interval(check["raised"], 100, 0),
                    format_interval(check["lowered"], 100, 0),
                    format_p(check["p"]) or "-",
                    str(check["unscored"]),
                )
                for row in judges
                for check in (row["bias"] or {"checks": ()})["checks"]
            ],
            drop=("unscored", "cases", "changed"),
            prose={"edit"},
        ),
    ]
    return [table for table in tables if table.rows]


def notes(results: Mapping[str, Any]) -> list[str]:
    """Notes on the tables: warnings, judges, and what was not checked."""
    lines = [
        f"{row['judge']['name']}: weights {row['judge']['fingerprint']}, strictness {row['judge']['strictness']:g}, "
        + ", ".join(f"rubric {of} {digits}" for of, digits in row["judge"]["rubrics"].items())
        + "."
        for row in results["judges"]
    ]
    lines += dict.fromkeys(line for row in results["judges"] for line in (row["bias"] or {"left_out": ()})["left_out"])
    return [
        *results["warnings"],
        *lines,
        "95 % intervals resample images; p is the exact test of raised against lowered. An unbiased judge does not "
        "raise its grade for a longer or more confident text, nor change it for the other edits. " + KAPPA_NOTE,
    ]


def in_short(results: Mapping[str, Any]) -> list[str]:
    """A sentence per judge, then the warnings."""
    found = []
    for row in results["judges"]:
        parts = []
        if row["reasoning"]:
            parts.append(f"reasoning {format_interval(row['reasoning']['mean'], 1, 2)} of 3")
        if row["correctness"]:
            parts.append(f"{format_interval(row['correctness']['right'], 100, 1)} % of answers right")
        unscored = sum(row[of]["unscored"] for of in ("reasoning", "correctness") if row[of])
        rubrics = ", ".join(f"{of} {digits}" for of, digits in row["judge"]["rubrics"].items())
        found.append(
            f"Judged by {row['judge']['name']} (rubric {rubrics}; strictness {row['judge']['strictness']:g}): "
            f"{', '.join(parts)}; {unscored} unscored."
        )
    return [*found, *results["warnings"]]
