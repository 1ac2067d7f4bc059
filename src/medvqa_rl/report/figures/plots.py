"""Figures of a run: training curves, and accuracy before and after. Imports no torch.

The name of the file says what it is: PNG for pages, PDF or SVG for papers.

Everything is drawn from ``metrics.jsonl`` and ``results.json``; nothing is computed here that is not in them, except
moving averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from medvqa_rl.report.figures.style import Palette, Theme, percent, spread, styled

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""
Results = Mapping[str, Any]
"""The content of a results.json, or what :func:`medvqa_rl.evaluation.statistics.summary.summarise` returns."""

Points = NDArray[np.float64]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write without a display and without the global state of pyplot."""
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    dates: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    figure.savefig(path, metadata=dates.get(path.suffix))
    return path


# --- training curves -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    label: str
    key: str
    color: str


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: list[_Line]
    is_share: bool = False
    """Values from 0 to 1, shown as percentages."""
    greedy: Sequence[Row] = ()
    """Greedy evaluations to mark as points."""


def series_of(rows: Sequence[Row], key: str) -> tuple[Points, Points]:
    """Steps and values of one metric, where it is finite."""
    pairs = [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    array = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def moving_average(values: Points, window: int) -> Points:
    """(N,) means over the window around each value, as far as there are values on either side."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, end = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    means: Points = (sums[end] - sums[start]) / (end - start)
    return means


def plot_training(
    metrics: Sequence[Row], path: Path, *, evals: Sequence[Row] | None = None, theme: Theme = "light"
) -> Path:
    """Draw the course of a training run: reward parts, accuracy, lengths, KL (the loss where beta
    is 0), entropy, gradient and lost signal.

    Thin lines are single steps, thick ones moving averages over a tenth of the run. Greedy evaluations are points
    with their 95 % intervals.

    Args:
        metrics: lines of ``metrics.jsonl``, each with ``step``; a metric that is not logged leaves its panel empty.
        path: file to write (.png, .pdf or .svg); its folder is made.
        evals: lines with ``eval/accuracy`` and its bounds; None takes those among metrics.
        theme: light, dark or print.

    Raises:
        ValueError: there is no training step to draw.
    """
    rows = [row for row in metrics if row.get("reward") is not None]
    if not rows:
        raise ValueError("There is nothing to plot: metrics.jsonl holds no training step with a reward.")
    greedy = [row for row in (metrics if evals is None else evals) if row.get("eval/accuracy") is not None]
    window = len(rows) // 10 if len(rows) >= 20 else 1
    with styled(theme) as palette:
        figure = Figure(figsize=(12.0, 5.4), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(2, 4).ravel()
        for place, panel in zip(axes, _panels(rows, greedy, palette)):
            _draw_panel(place, panel, rows, window, palette)
        for place in axes[4:]:
            place.set_xlabel("step")
        return save_figure(figure, path)


def _panels(rows: Sequence[Row], greedy: Sequence[Row], palette: Palette) -> list[_Panel]:
    """What is drawn, in reading order."""
    keys = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    blue, orange, purple, _, grey, _ = palette.series
    parts = [
        _Line(key.split("/")[1], key, palette.series[index % len(palette.series)]) for index, key in enumerate(keys)
    ]
    lengths = [
        _Line("right", "completions/mean_length_correct", palette.right),
        _Line("wrong", "completions/mean_length_wrong", palette.wrong),
    ]
    unusable = [
        _Line("no answer", "no_answer_rate", palette.wrong),
        _Line("cut off", "completions/clipped_ratio", orange),
    ]
    has_reference = any(row.get("kl") is not None for row in rows)
    return [
        _Panel("Reward parts", parts),
        _Panel("Accuracy", [_Line("sampled", "rewards/correctness/mean", grey)], is_share=True, greedy=greedy),
        _Panel("Length in tokens", lengths),
        _Panel("KL from the start", [_Line("", "kl", purple)])
        if has_reference
        else _Panel("Loss", [_Line("", "loss", purple)]),
        _Panel("Entropy, nats per token", [_Line("", "entropy", purple)]),
        _Panel("Gradient norm", [_Line("", "grad_norm", blue)]),
        _Panel("Groups without signal", [_Line("", "frac_reward_zero_std", orange)], is_share=True),
        _Panel("Unusable completions", unusable, is_share=True),
    ]


def _draw_panel(axes: Axes, panel: _Panel, rows: Sequence[Row], window: int, palette: Palette) -> None:
    """Every step thin, the moving average thick, each line named at its end."""
    axes.set_title(panel.title)
    ends: list[tuple[str, float, float, str]] = []
    for line in panel.lines:
        steps, values = series_of(rows, line.key)
        if len(steps):
            smooth = moving_average(values, window)
            if window > 1:
                axes.plot(steps, values, color=line.color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=line.color, linewidth=1.8)
            ends.append((line.label, steps[-1], smooth[-1], line.color))
    if panel.greedy:
        steps, values = series_of(panel.greedy, "eval/accuracy")
        for row in panel.greedy:
            if row.get("eval/accuracy_low") is not None:
                bounds = row["eval/accuracy_low"], row["eval/accuracy_high"]
                axes.vlines(row["step"], *bounds, color=palette.after, linewidth=1.2, alpha=0.5)
        axes.plot(steps, values, color=palette.after, linewidth=1.2, marker="o", markersize=4)
        ends.append(("greedy", steps[-1], values[-1], palette.after))
    if not ends:
        axes.set_axis_off()
        axes.text(0.0, 0.5, "not logged", transform=axes.transAxes, color=palette.muted)
        return
    axes.locator_params(axis="both", nbins=4)
    axes.margins(x=0.02, y=0.12)
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(panel.lines) > 1 or panel.greedy:
        low, high = axes.get_ylim()
        right = max(step for _, step, _, _ in ends)
        heights = spread([height for _, _, height, _ in ends], 0.1 * (high - low), low, high)
        for (label, _, _, color), height in zip(ends, heights):
            axes.annotate(
                label,
                (right, height),
                xytext=(6, 0),
                textcoords="offset points",
                color=color,
                fontsize=8.5,
                va="center",
                annotation_clip=False,
            )


# --- before and after ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Rows of the figure under one heading: name, summary before, summary after."""

    title: str
    rows: list[tuple[str, Results, Results]]


def plot_before_after(
    before: Results,
    after: Results,
    path: Path,
    *,
    overall: Mapping[str, tuple[Results, Results]] | None = None,
    keys: Sequence[str] = ("modality", "family"),
    names: tuple[str, str] = ("before", "after"),
    theme: Theme = "light",
) -> Path:
    """Draw accuracy before and after training with 95 % intervals, overall and by group.

    A short tick on a row marks the majority baseline: the accuracy of always giving the most frequent answer.

    Args:
        before: results of the first evaluation.
        after: results of the second, of the same questions.
        path: file to write (.png, .pdf or .svg); its folder is made.
        overall: results to compare as a whole, by name, such as the scanners; None compares before and after.
        keys: groups to break before and after down by, as in ``results["by"]``; those that are absent are left out.
        names: what the two are called in the legend.
        theme: light, dark or print.
    """
    whole = {"all questions": (before, after)} if overall is None else overall
    blocks = [_Block("Accuracy", [(name, one, other) for name, (one, other) in whole.items()])]
    for key in keys:
        values = before["by"].get(key, {})
        rows = [
            (value, values[value], summary) for value, summary in after["by"].get(key, {}).items() if value in values
        ]
        if rows:
            blocks.append(_Block(f"By {key.replace('_', ' ')}", sorted(rows, key=lambda row: -percent(row[2]))))
    left, right = _columns(blocks)
    with styled(theme) as palette:
        tallest = max(_height(left), _height(right))
        figure = Figure(figsize=(12.0 if right else 6.4, 0.62 + 0.285 * tallest), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.16, h_pad=0.06)  # type: ignore[union-attr, call-arg]
        columns = figure.subfigures(1, 2 if right else 1, squeeze=False)[0]
        for column, shown in zip(columns, (left, right)):
            ratios = [len(block.rows) + _HEADING for block in shown]
            free = tallest - sum(ratios)
            if free > 0:
                ratios.append(free)
            places = column.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
            for axes, block in zip(places, shown):
                _draw_block(axes, block, palette)
            for axes in places[len(shown) :]:
                axes.set_axis_off()
        _draw_legend(figure, names, palette)
        return save_figure(figure, path)


_HEADING = 1.9
"""Height of a block's heading and axis, in rows."""


def _height(blocks: Sequence[_Block]) -> float:
    return sum(len(block.rows) + _HEADING for block in blocks)


def _columns(blocks: list[_Block]) -> tuple[list[_Block], list[_Block]]:
    """Blocks in two columns of heights as equal as their order allows."""
    cuts = range(1, len(blocks) + 1)
    cut = min(cuts, key=lambda cut: max(_height(blocks[:cut]), _height(blocks[cut:])))
    return blocks[:cut], blocks[cut:]


def _draw_block(axes: Axes, block: _Block, palette: Palette) -> None:
    axes.set_title(block.title)
    axes.grid(False)
    axes.grid(True, axis="x")
    axes.set_xlim(0, 100)
    axes.set_ylim(len(block.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(block.rows)), [f"{name}  ({after['num_scored']})" for name, _, after in block.rows])
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.tick_params(axis="y", labelcolor=palette.text)
    axes.text(109, -0.75, "points", ha="right", va="bottom", color=palette.muted, fontsize=8.5)
    for height, (_, before, after) in enumerate(block.rows):
        gain = percent(after) - percent(before)
        shown = "" if math.isnan(gain) else f"{gain:+.0f}"
        axes.text(109, height, shown, ha="right", va="center", color=palette.text, clip_on=False)
        for summary, color, offset in ((before, palette.before, -0.16), (after, palette.after, 0.16)):
            low, high = percent(summary, "accuracy_low"), percent(summary, "accuracy_high")
            axes.hlines(height + offset, low, high, color=color, linewidth=1.6, alpha=0.55)
            axes.plot(percent(summary), height + offset, "o", color=color, markersize=5)
        baseline = percent(after, "majority_baseline")
        axes.vlines(baseline, height - 0.34, height + 0.34, color=palette.muted, linewidth=1.0)


def _draw_legend(figure: Figure, names: tuple[str, str], palette: Palette) -> None:
    """One line above the figure that names the marks."""
    figure.suptitle(" ", fontsize=9)  # keeps room for it
    handles = [
        *(
            Line2D([], [], color=color, marker="o", markersize=5, linewidth=1.6, label=name)
            for name, color in zip(names, (palette.before, palette.after))
        ),
        Line2D([], [], color=palette.muted, marker="|", markersize=8, linewidth=0, label="majority answer"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=3, frameon=False, fontsize=9, labelcolor="linecolor")
