"""The trends of a study as rows of text. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medvqa_rl.core.tables import as_csv
from medvqa_rl.evaluation.statistics.intervals_and_tests import SeededInterval
from medvqa_rl.evaluation.statistics.tables import format_number
from medvqa_rl.study.trends import Point, TrendResult

CHANGE_NOTE = "The value at the largest number minus that at the smallest, paired by seed and question."
NOTES = {
    "": "In brackets 95 % intervals over seeds and images; differences are paired by seed and question.",
    "length_bias": "Length bias: mean tokens of wrong minus right answers.",
    "entropy": "Entropy: nats per token over the last fifth of the steps, with intervals over seeds only.",
}
"""By the metric that needs the remark."""
WORTH_NOTE = (
    "RL steps: those that {reference} takes to the validation accuracy with which {series} starts, on its mean curve "
    "made monotone; in brackets 95 % intervals over seeds."
)


class Shown(NamedTuple):
    """How a metric is shown."""

    title: str
    scale: float
    spec: str


METRICS = {
    "accuracy": Shown("accuracy, %", 100.0, ".1f"),
    "faithfulness": Shown("true claims, %", 100.0, ".1f"),
    "distinct_truths": Shown("true claims per reasoning", 1.0, ".2f"),
    "thinking": Shown("thinking reward, of 2", 1.0, ".2f"),
    "length": Shown("length, tokens", 1.0, ".1f"),
    "length_bias": Shown("length bias, tokens", 1.0, ".1f"),
    "format": Shown("in form, %", 100.0, ".1f"),
    "entropy": Shown("entropy, nats", 1.0, ".3f"),
}


def trend_rows(found: TrendResult) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for each point and difference."""
    titles = ["series", found.trend.x, *(METRICS[name].title for name in found.trend.metrics)]
    return titles, [
        *(_row(found, point, "") for point in found.points),
        *(_row(found, point, "+") for point in found.differences),
    ]


def change_rows(found: TrendResult) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for the change of each series and difference."""
    titles = ["series", found.trend.x, *(METRICS[name].title for name in found.trend.metrics)]
    return titles, [
        [change.series, f"{change.first:,g} to {change.last:,g}", *_cells(found, change.values, "+")]
        for change in found.changes
    ]


def _row(found: TrendResult, point: Point, sign: str) -> list[str]:
    return [point.series, f"{point.x:,g}", *_cells(found, point.values, sign)]


def _cells(found: TrendResult, values: Mapping[str, SeededInterval], sign: str) -> list[str]:
    cells = []
    for name in found.trend.metrics:
        value, (_, scale, spec) = values[name], METRICS[name]
        numbers = [format_number(scale * one, sign + spec) for one in (value.estimate, value.low, value.high)]
        cells.append(_with_interval(*numbers))
    return cells


def _with_interval(estimate: str, low: str, high: str) -> str:
    return f"{estimate} [{low}, {high}]" if low and high else estimate


def trend_csv(found: TrendResult) -> str:
    """All numbers of a trend, unrounded and in the units of the table: one line for each point and metric."""
    body = [
        [point.series, f"{point.x:g}", name, *(format_number(METRICS[name].scale * one, ".6g") for one in numbers)]
        for point in (*found.points, *found.differences)
        for name in found.trend.metrics
        for numbers in [(point.values[name].estimate, point.values[name].low, point.values[name].high)]
    ]
    return as_csv(["series", found.trend.x, "metric", "value", "low", "high"], body)


def trend_note(found: TrendResult) -> str:
    """The remark below the table."""
    return " ".join(NOTES[name] for name in ("", *found.trend.metrics) if name in NOTES)


def worth_rows(found: TrendResult) -> tuple[list[str], list[list[str]]]:
    """Column names, and a row for each number with its worth in RL steps."""
    titles = [found.trend.x, "validation accuracy before RL, %", "worth in RL steps", "RL steps each"]
    body = []
    for x, worth in found.worths.items():

        def steps(value: float, limit: int = worth.longest) -> str:
            return f"{value:.0f}" if math.isfinite(value) else f"over {limit}"

        interval = [steps(value) for value in (worth.steps.estimate, worth.steps.low, worth.steps.high)]
        each = format_number(min(worth.steps.estimate, worth.longest) / x, ".3g")
        is_bound = math.isinf(worth.steps.estimate)
        body.append(
            [f"{x:,g}", f"{100 * worth.accuracy:.1f}", _with_interval(*interval), f"over {each}" if is_bound else each]
        )
    return titles, body


def worth_note(found: TrendResult) -> Sequence[str]:
    """The remark below the table of worths."""
    asked = found.trend.steps_worth
    return [WORTH_NOTE.format(reference=asked.reference, series=asked.series)] if asked else []
