"""Matplotlib figures of a run: training curves, and accuracy before and after. Imports no torch.

The suffix of the file chooses its format: PNG, or PDF and SVG for papers. Everything is plotted from
``metrics.jsonl`` and ``results.json``.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter

from medvqa_rl.core.files import write_whole
from medvqa_rl.data.images.fonts import choose_lettering, code_points
from medvqa_rl.report.figures.panels import (
    Panel,
    find_panels,
    intervals_of,
    moving_average,
    series_of,
    smoothing_window,
)
from medvqa_rl.report.figures.style import Palette, Theme, percent, spread, styled
from medvqa_rl.report.runs import is_evaluation

Row = Mapping[str, Any]
"""A line of metrics.jsonl."""
Results = Mapping[str, Any]
"""The content of a results.json, or what :func:`medvqa_rl.evaluation.statistics.summary.summarise` returns."""


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure without a display, without pyplot's global state and without a date."""
    FigureCanvasAgg(figure)
    _use_fonts_with_glyphs(figure)
    dates: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), metadata=dates.get(path.suffix))
    with write_whole(path, durable=False) as partial:
        partial.write_bytes(content.getvalue())
    return path


def _use_fonts_with_glyphs(figure: Figure) -> None:
    """Draw names in any script: with another installed font, or else as escapes."""
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and not text.get_text().isascii()]
    if not texts:
        return
    default = code_points(Path(findfont("DejaVu Sans")))
    lettering = choose_lettering((text.get_text() for text in texts), default)
    if lettering.file is not None:
        fontManager.addfont(lettering.file)
    for text in texts:
        text.set_text(lettering.drawable(text.get_text()))
        if lettering.file is not None:
            text.set_fontfamily(["DejaVu Sans", FontProperties(fname=lettering.file).get_name()])
            text.set_fontweight("normal")  # the font may have no other


# --- training curves -----------------------------------------------------------------------------------------------


TITLE_WIDTH = 26
"""Characters in a line of a panel's title; longer lines reach into the next panel."""


def plot_training(metrics: Sequence[Row], path: Path, *, theme: Theme = "print") -> Path:
    """Plot the training curves of a run, one panel each (:mod:`medvqa_rl.report.figures.panels`).

    Thin lines are single steps, thick lines moving averages over a tenth of the run. Greedy evaluations are points
    with their 95 % intervals.

    Args:
        metrics: lines of ``metrics.jsonl``, each with ``step``.
        path: file to write (.png, .pdf or .svg); its folder is created.
        theme: light, dark or print.

    Raises:
        ValueError: there is no training step to plot.
    """
    panels = find_panels(name for row in metrics for name in row)
    if all(is_evaluation(row) for row in metrics):
        raise ValueError("There is nothing to plot: metrics.jsonl holds no training step.")
    columns = 4 if len(panels) % 4 in (0, 3) else 3
    rows = math.ceil(len(panels) / columns)
    with styled(theme) as palette:
        figure = Figure(figsize=(3.0 * columns, 2.7 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.12)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, panels):
            _draw_panel(axis, panel, metrics, palette)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis in axes[max(0, len(panels) - columns) : len(panels)]:
            axis.set_xlabel("step")
        return save_figure(figure, path)


def _draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row], palette: Palette) -> None:
    """Draw each line and label it at its right end."""
    axes.set_title(textwrap.fill(panel.title, TITLE_WIDTH))
    ends: list[tuple[str, float, float, str]] = []
    for line in panel.lines:
        steps, values = series_of(rows, line.metric)
        if not len(steps):
            continue
        color = palette.series[line.color]
        if line.is_greedy:
            for step, low, high in intervals_of(rows, line.metric):
                axes.vlines(step, low, high, color=color, linewidth=1.2, alpha=0.5)
            axes.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=4)
        else:
            window = smoothing_window(len(values))
            if window > 1:
                axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            values = moving_average(values, window)
            axes.plot(steps, values, color=color, linewidth=1.8)
        ends.append((line.label, steps[-1], values[-1], color))
    axes.locator_params(axis="both", nbins=4)
    axes.margins(x=0.02, y=0.12)
    if axes.dataLim.ymin >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if len(panel.lines) > 1 and ends:
        low, high = axes.get_ylim()
        right = max(step for _, step, _, _ in ends)
        gap = (high - low) / max(10, len(ends) - 1)
        heights = spread([height for _, _, height, _ in ends], gap, low, high)
        for (label, _, _, color), height in zip(ends, heights):
            axes.annotate(
                label,
                (right, height),
                xytext=(6, 0),
                textcoords="offset points",
                color=color,
                fontsize=8.5 * min(1.0, 12 / len(ends)),
                va="center",
                annotation_clip=False,
            )


# --- before and after ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Rows under one heading: name, summary before, summary after."""

    title: str
    rows: list[tuple[str, Results, Results]]


def plot_before_after(
    before: Results,
    after: Results,
    path: Path,
    *,
    keys: Sequence[str] = ("modality", "family"),
    names: tuple[str, str] = ("before", "after"),
    theme: Theme = "print",
) -> Path:
    """Plot accuracy before and after training with 95 % intervals, overall and by group.

    A short tick marks the majority baseline: the accuracy of always giving the most frequent answer.

    Args:
        before: results of the first evaluation.
        after: results of the second, of the same questions.
        path: file to write (.png, .pdf or .svg); its folder is created.
        keys: groupings of ``results["by"]`` to plot, if present.
        names: of the two in the legend.
        theme: light, dark or print.
    """
    blocks = [_Block("Accuracy", [("all questions", before, after)])]
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
"""Height of a block's heading and axis, in units of rows."""


def _height(blocks: Sequence[_Block]) -> float:
    return sum(len(block.rows) + _HEADING for block in blocks)


def _columns(blocks: list[_Block]) -> tuple[list[_Block], list[_Block]]:
    """Split the blocks, in order, into two columns of similar height."""
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
    """Draw the legend on one line above the figure."""
    figure.suptitle(" ", fontsize=9)  # reserves the space
    handles = [
        *(
            Line2D([], [], color=color, marker="o", markersize=5, linewidth=1.6, label=name)
            for name, color in zip(names, (palette.before, palette.after))
        ),
        Line2D([], [], color=palette.muted, marker="|", markersize=8, linewidth=0, label="majority baseline"),
    ]
    figure.legend(handles=handles, loc="upper right", ncols=3, frameon=False, fontsize=9, labelcolor="linecolor")
