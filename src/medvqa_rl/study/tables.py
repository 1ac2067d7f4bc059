"""The tables of a study as rows of text, and in LaTeX. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from medvqa_rl.core.tables import as_csv
from medvqa_rl.core.text import format_detectable, format_p, format_points, format_range
from medvqa_rl.evaluation.statistics.tables import MEASURES, format_number
from medvqa_rl.study.collect import ArmResult
from medvqa_rl.study.plan.contrasts import Contrast, ContrastRow
from medvqa_rl.study.plan.factors import METRICS, FactorTable, Metric, Published

PUBLISHED = "published, other data and model"
NOTES = (
    "Accuracy in percent, differences in percentage points, both averaged over seeds. 95 % intervals resample images "
    "and seeds together; three seeds are few, so each is listed. McNemar's exact test is computed per seed and treats "
    "questions as independent; Holm adjusts it for the arms of a table. Detectable: the true difference detected with "
    "80 % power. Length: tokens of the reasoning. Completions: the number that one seed was trained on (references "
    "for supervised arms)."
)
SECONDARY = (
    "* reported by secondary sources and not checked against the paper's tables; figures without a star are of the "
    "paper's own summary. In brackets the change from the baseline, for accuracy with its 95 % interval."
)


def _mean(results: Sequence[Mapping[str, Any]], *path: str) -> float:
    """Mean over seeds of a number in results.json; NaN if a seed lacks it."""
    found = []
    for value in results:
        number: Any = value
        for key in path:
            number = number.get(key) if isinstance(number, Mapping) else None
        found.append(math.nan if number is None else float(number))
    return fmean(found)


def _by(results: Sequence[Mapping[str, Any]], section: str) -> str | None:
    """The instrument of a section; None if nothing was measured, or by several instruments."""
    names = {value.get(section, {}).get("by") for value in results}
    return names.pop() if len(names) == 1 else None


def rows(arms: Iterable[ArmResult], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Column names and a row for each arm. Empty columns are left out; every instrument has its own column."""
    arms = list(arms)
    cells: list[dict[str, str]] = []
    for arm in arms:
        row = {
            "arm": arm.name,
            "completions": f"{arm.budget.completions:,}" if arm.budget.steps else "",
            "optimizer steps": f"{arm.budget.steps:,}" if arm.budget.steps else "",
            "accuracy": format_points(arm.accuracy.estimate),
            "95 % interval": format_range(arm.accuracy.low, arm.accuracy.high),
            "seeds": ", ".join(map(format_points, arm.accuracies)),
            f"minus {baseline}": "" if arm.gain is None else format_points(arm.gain.estimate, "+"),
            "its interval": "" if arm.gain is None else format_range(arm.gain.low, arm.gain.high, "+"),
            "McNemar p": ", ".join(format_p(test.mcnemar.p_value) for test in arm.tests),
            "Holm p": ", ".join(format_p(test.holm_p) for test in arm.tests),
            "detectable": format_detectable(arm.detectable),
            "format": format_points(_mean(arm.results, "format_rate")),
            "length, right": format_number(_mean(arm.results, "lengths", "think", "right", "mean"), ".0f"),
            "length, wrong": format_number(_mean(arm.results, "lengths", "think", "wrong", "mean"), ".0f"),
            "true claims": format_points(_mean(arm.results, "faithfulness", "value")),
            "true claims per reasoning": format_number(_mean(arm.results, "faithfulness", "distinct_truths"), ".2f"),
        }
        for section, key, title, spec in MEASURES:
            if by := _by(arm.results, section):
                row[f"{title} ({by})"] = format_number(_mean(arm.results, section, key), spec)
        row[PUBLISHED] = "" if arm.published is None else f"{arm.published:g}"
        cells.append(row)
    titles = [*dict.fromkeys(title for row in cells for title in row if title != PUBLISHED), PUBLISHED]
    shown = [title for title in titles if any(row.get(title) for row in cells)]
    return shown, [[row.get(title, "") for title in shown] for row in cells]


def contrast_table(contrast: Contrast, found: Iterable[ContrastRow]) -> tuple[list[str], list[list[str]]]:
    """Column names and a row for each arm, or each test: both accuracies and their difference."""
    titles = [
        "test" if contrast.of_arms else "arm",
        contrast.of,
        contrast.minus,
        "difference",
        "95 % interval",
        "seeds",
    ]
    body = [
        [
            row.name,
            format_points(row.of),
            format_points(row.minus),
            format_points(row.difference.estimate, "+"),
            format_range(row.difference.low, row.difference.high, "+"),
            ", ".join(format_points(value, "+") for value in row.differences),
        ]
        for row in found
    ]
    return titles, body


# --- the paper's tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FactorCell:
    """One metric of one arm."""

    arm: str
    metric: str
    instrument: str | None
    """What measured it; None if no instrument is needed."""
    ours: float
    """In the unit of the metric; NaN if not measured."""
    change: float
    """From the baseline, measured by the same instrument; NaN for the baseline itself."""
    interval: tuple[float, float] | None
    """95 % bounds of the change; accuracy only."""
    published: Published | None


def factor_cells(table: FactorTable, arms: Sequence[ArmResult], baseline: str) -> list[FactorCell]:
    """All metrics of the finished arms of a table, arm by arm."""
    by_name = {arm.name: arm for arm in arms}
    cells = []
    for name in table.arms:
        for key in table.metrics:
            if name not in by_name:
                continue
            arm, metric = by_name[name], METRICS[key]
            (ours, by), (before, before_by) = _measured(arm, metric), _measured(by_name[baseline], metric)
            change = ours - before if by == before_by and name != baseline else math.nan
            interval = None
            if key == "accuracy" and arm.gain is not None:
                change, interval = 100 * arm.gain.estimate, (100 * arm.gain.low, 100 * arm.gain.high)
            cells.append(FactorCell(name, key, by, ours, change, interval, table.published.get((name, key))))
    return cells


def _measured(arm: ArmResult, metric: Metric) -> tuple[float, str | None]:
    """Mean over seeds and the instrument; NaN if the seeds were measured by several."""
    if metric.path == ("accuracy",):  # over the questions that are scored in all cells
        return metric.scale * arm.accuracy.estimate, None
    by = None if metric.instrument is None else _by(arm.results, metric.instrument)
    is_known = metric.instrument is None or by is not None
    return (metric.scale * _mean(arm.results, *metric.path) if is_known else math.nan), by


def factor_rows(cells: Sequence[FactorCell]) -> tuple[list[str], list[list[str]]]:
    """Column names and a row for each arm, with two columns per metric: ours with its change, and the paper's."""
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        metric = METRICS[cell.metric]
        form = f".{metric.decimals}f"
        ours = format_number(cell.ours, form)
        if ours and not math.isnan(cell.change):
            bounds = "" if cell.interval is None else ", {:+.1f} to {:+.1f}".format(*cell.interval)
            ours += f" ({round(cell.change, metric.decimals) + 0.0:+{form}}{bounds})"  # never -0
        title = metric.title if cell.instrument is None else f"{metric.title} ({cell.instrument})"
        row = rows.setdefault(cell.arm, {"arm": cell.arm})
        row[title], row[f"{metric.title} ({PUBLISHED})"] = ours, _published(cell.published)
    titles = dict.fromkeys(key for row in rows.values() for key in row)
    shown = [title for title in titles if any(row.get(title) for row in rows.values())]
    return shown, [[row.get(title, "") for title in shown] for row in rows.values()]


def _published(figure: Published | None) -> str:
    if figure is None:
        return ""
    value, change = (
        "" if number is None else f"{number:{sign}g}" + ("" if name in figure.certain else "*")
        for name, number, sign in (("value", figure.value, ""), ("change", figure.change, "+"))
    )
    return f"{value} ({change})" if value and change else value or f"({change})"


def factor_csv(cells: Sequence[FactorCell]) -> str:
    """Format as CSV, one line for each metric of each arm."""
    titles = ["arm", "metric", "by", "ours", "change", "low", "high", "published", "published_change", "certain"]
    body = []
    for cell in cells:
        low, high = cell.interval or (math.nan, math.nan)
        paper = cell.published or Published(None, None, ())
        numbers = [format_number(value, ".6g") for value in (cell.ours, cell.change, low, high)]
        theirs = ["" if value is None else f"{value:g}" for value in (paper.value, paper.change)]
        body.append([cell.arm, cell.metric, cell.instrument or "", *numbers, *theirs, " ".join(paper.certain)])
    return as_csv(titles, body)


# --- formats -------------------------------------------------------------------------------------------------------


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
}


def as_latex(titles: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    """Format a table as LaTeX with booktabs rules."""

    def line(cells: Sequence[str]) -> str:
        return (
            " & ".join("".join(_LATEX.get(character, character) for character in cell) for cell in cells) + " \\\\\n"
        )

    head = "\\begin{table}\n\\centering\n\\begin{tabular}{l" + "r" * (len(titles) - 1) + "}\n\\toprule\n"
    end = "\\bottomrule\n\\end{tabular}\n\\caption{" + line([caption]).removesuffix(" \\\\\n") + "}\n\\end{table}\n"
    return head + line(titles) + "\\midrule\n" + "".join(map(line, body)) + end
