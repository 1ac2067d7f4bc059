"""The panels of training curves, shared by pages and figures for papers. Imports no torch.

Every value comes from ``metrics.jsonl``; only moving averages are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One metric in a panel."""

    label: str
    metric: str
    color: int = 0
    """Index into the series colours of a theme."""
    is_greedy: bool = False
    """Greedy evaluations, drawn as points with intervals."""


@dataclass(frozen=True)
class Panel:
    """A titled plot of one or more metrics against the step."""

    title: str
    lines: tuple[Line, ...]
    is_share: bool = False
    """Values from 0 to 1, shown as percentages."""


_BLUE, _ORANGE, _PURPLE, _GREEN, _GREY, _RED = range(6)
NUM_COLORS = 6

PANELS = (
    Panel(
        "Accuracy",
        (
            Line("sampled", "rewards/correctness/mean", _GREY),
            Line("greedy", "eval/accuracy", _BLUE, is_greedy=True),
        ),
        is_share=True,
    ),
    Panel(
        "Length in tokens",
        (
            Line("correct", "completions/mean_length_correct", _GREEN),
            Line("wrong", "completions/mean_length_wrong", _RED),
        ),
    ),
    Panel("Loss", (Line("", "loss", _PURPLE),)),
    Panel("KL to the initial model", (Line("", "kl", _PURPLE),)),
    Panel("Entropy, nats per token", (Line("", "entropy", _PURPLE),)),
    Panel("Gradient norm", (Line("", "grad_norm", _BLUE),)),
    Panel("Groups with equal rewards", (Line("", "frac_reward_zero_std", _ORANGE),), is_share=True),
    Panel(
        "Unusable completions",
        (Line("no answer", "no_answer_rate", _RED), Line("truncated", "completions/clipped_ratio", _ORANGE)),
        is_share=True,
    ),
)

_FAMILIES = (
    ("rewards", "mean", "Reward parts", "Reward", False),
    (
        "rewards",
        "corr_correctness",
        "Correlation of reward parts with correctness",
        "Correlation with correctness",
        False,
    ),
    ("prompts", "reward", "Reward by prompt", "Reward, prompt", False),
    ("prompts", "correct", "Correct answers by prompt", "Correct answers, prompt", True),
    ("prompts", "format", "Correct format by prompt", "Correct format, prompt", True),
)
"""Metrics named root/NAME/kind, whose names depend on the settings: root, kind, title of one panel with all of them,
title prefix of a panel with one of them, and whether the values are shares."""


def find_panels(metrics: Iterable[str], *, one_each: bool = False) -> list[Panel]:
    """Return the panels of which at least one metric was logged, reward parts first.

    Args:
        metrics: names in ``metrics.jsonl``.
        one_each: draw each reward part and prompt in its own panel, because colours tell runs apart.
    """
    names = sorted(set(metrics))
    panels: list[Panel] = []
    for root, kind, title, prefix, is_share in _FAMILIES:
        found = [name for name in names if name.startswith(f"{root}/") and name.endswith(f"/{kind}")]
        lines = [Line(name.split("/")[1], name, index % NUM_COLORS) for index, name in enumerate(found)]
        if one_each:
            panels += [Panel(f"{prefix}: {line.label}", (Line("", line.metric),), is_share) for line in lines]
        elif lines:
            panels.append(Panel(title, tuple(lines), is_share))
    return panels + [panel for panel in PANELS if any(line.metric in names for line in panel.lines)]


def series_of(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[Points, Points]:
    """Return the steps and values of a metric, where it is finite."""
    pairs = [(float(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]
    array = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def intervals_of(rows: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float, float]]:
    """Return step, low and high of the intervals logged with a metric."""
    low, high = f"{metric}_low", f"{metric}_high"
    return [(row["step"], row[low], row[high]) for row in rows if None not in (row.get(low), row.get(high))]


def smoothing_window(count: int) -> int:
    """Return the window of the moving average for this many values: a tenth of them, or 1 below 20 values."""
    return count // 10 if count >= 20 else 1


def moving_average(values: Points, window: int) -> Points:
    """Return (N,) means over a window centred on each value, truncated at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    means: Points = (sums[end] - sums[start]) / (end - start)
    return means
