"""The figures of a study: accuracies, training curves, length against accuracy, and correlations of reward parts.
Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from medvqa_rl.report.figures.panels import Points, moving_average, series_of
from medvqa_rl.report.figures.plots import save_figure
from medvqa_rl.report.figures.style import Palette, Theme, number, spread, styled
from medvqa_rl.report.runs import Row
from medvqa_rl.study.collect import ArmResult, Collected
from medvqa_rl.study.trend_figure import plot_trend

ROW = 0.36
"""Height of an arm in a list of arms, in inches."""
ACROSS = 4
"""Maximal number of tests side by side."""
_SEED: dict[str, Any] = {"markersize": 4, "markerfacecolor": "none", "markeredgewidth": 0.9}
_DASHED: Any = (0, (3, 3))


def write_figures(collected: Collected, folder: Path, theme: Theme = "light", suffix: str = "") -> dict[str, Path]:
    """Draw all figures that the study has data for, as ``NAME{suffix}.png``.

    Returns:
        Files by title, in reading order.
    """
    drawn = {"Accuracy": plot_accuracy(collected, folder / f"accuracy{suffix}.png", theme)}
    for index, found in enumerate(collected.trends, start=1):
        drawn[found.trend.title] = plot_trend(found, folder / f"trend-{index}{suffix}.png", theme)
    if any("reward" in row for runs in collected.curves.values() for rows in runs for row in rows):
        drawn["Training"] = plot_curves(collected, folder / f"curves{suffix}.png", theme)
    drawn["Length and accuracy"] = plot_lengths(collected, folder / f"length{suffix}.png", theme)
    if any(collected.correlations.values()):
        drawn["Reward parts and correctness"] = plot_correlations(
            collected, folder / f"correlations{suffix}.png", theme
        )
    return drawn


# --- accuracy ------------------------------------------------------------------------------------------------------


def plot_accuracy(collected: Collected, path: Path, theme: Theme = "light") -> Path:
    """Plot the accuracy of every arm on every test: the mean with its 95 % interval, and each seed as a circle."""
    recipe, tests = collected.recipe, collected.tests
    with styled(theme) as palette:
        rows = max(map(len, tests.values()))
        lines = math.ceil(len(tests) / ACROSS)
        columns = math.ceil(len(tests) / lines)
        size = (2.0 + 4.2 * columns, 0.6 + lines * (0.55 + ROW * rows))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for axes in panels[len(tests) :]:
            axes.remove()
        for axes, (name, arms) in zip(panels, tests.items()):
            _accuracy_panel(axes, f"{name}, {arms[0].num_questions} questions", arms, recipe.baseline, palette)
        handles = [
            Line2D([], [], color=palette.after, marker="o", linewidth=1.8, label="mean and 95 % interval"),
            Line2D([], [], color=palette.muted, marker="o", linewidth=0, label="seed", **_SEED),
            Line2D([], [], color=palette.muted, linewidth=1.0, linestyle=_DASHED, label=recipe.baseline),
        ]
        figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=8.5)
        return save_figure(figure, path)


def _accuracy_panel(axes: Axes, title: str, arms: Sequence[ArmResult], baseline: str, palette: Palette) -> None:
    axes.set_title(title)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.tick_params(axis="y", labelcolor=palette.text)
    axes.xaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    for height, arm in enumerate(arms):
        color = palette.after if arm.name == baseline else palette.text
        accuracy = arm.accuracy
        axes.hlines(height, 100 * accuracy.low, 100 * accuracy.high, color=color, linewidth=1.8, alpha=0.6)
        axes.plot(100 * accuracy.estimate, height, "o", color=color, markersize=6)
        if len(arm.accuracies) > 1:
            seeds = [100 * value for value in arm.accuracies]
            axes.plot(seeds, [height + 0.27] * len(seeds), "o", color=palette.muted, **_SEED)
        if arm.name == baseline:
            axes.axvline(100 * accuracy.estimate, color=palette.muted, linewidth=1.0, linestyle=_DASHED, zorder=0)


# --- training ------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    title: str
    key: str
    is_share: bool = False


_PANELS = (
    _Panel("Reward", "reward"),
    _Panel("Correct", "rewards/correctness/mean", True),
    _Panel("Completion, tokens", "completions/mean_length"),
    _Panel("Well-formed", "rewards/format/mean", True),
)


_SUPERVISED = (_Panel("", "loss"), *_PANELS[1:])


def plot_curves(collected: Collected, path: Path, theme: Theme = "light") -> Path:
    """Plot training curves, one row per arm: seeds as thin lines, their mean thick, the baseline's mean grey.

    Every line is a moving average over a twentieth of the run. Supervised arms sample nothing, so their first panel
    shows the loss.
    """
    baseline = collected.curves.get(collected.recipe.baseline, ())
    with styled(theme) as palette:
        arms = collected.curves
        figure = Figure(figsize=(12.0, 0.7 + 1.15 * len(arms)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.05)  # type: ignore[union-attr, call-arg]
        panels = figure.subplots(len(arms), len(_PANELS), squeeze=False, sharex=True)
        for line, (name, runs) in zip(panels, arms.items()):
            for axes, panel in zip(line, _PANELS if _finite(runs, "reward") else _SUPERVISED):
                others = () if name == collected.recipe.baseline or panel.key == "loss" else baseline
                _curve_panel(axes, panel, runs, others, palette)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", color=palette.text, fontweight="bold")
        for axes, panel in zip(panels[0], _PANELS):
            axes.set_title(panel.title)
        for column in range(len(_PANELS)):
            _share_limits([axes for axes, runs in zip(panels[:, column], arms.values()) if _finite(runs, "reward")])
        for axes in panels[-1]:
            axes.set_xlabel("step")
        return save_figure(figure, path)


def _finite(runs: Iterable[Sequence[Row]], key: str) -> bool:
    return any(key in row for rows in runs for row in rows)


def _share_limits(panels: Sequence[Axes]) -> None:
    """Give the panels of a column one scale, so that arms can be compared."""
    if panels:
        low, high = (pick(axes.get_ylim()[side] for axes in panels) for pick, side in ((min, 0), (max, 1)))
        for axes in panels:
            axes.set_ylim(low, high)


def _curve_panel(
    axes: Axes, panel: _Panel, runs: Sequence[Sequence[Row]], baseline: Sequence[Sequence[Row]], palette: Palette
) -> None:
    axes.locator_params(axis="both", nbins=4)
    if panel.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if not _finite(runs, panel.key):
        axes.tick_params(labelleft=False)
        axes.grid(False)
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, color=palette.muted, ha="center", fontsize=8.5)
        return
    if _finite(baseline, panel.key):
        axes.plot(*_mean_curve([_smooth(rows, panel.key) for rows in baseline]), color=palette.before, linewidth=1.2)
    if panel.key == "loss":
        axes.text(0.98, 0.9, "loss", transform=axes.transAxes, color=palette.muted, ha="right", fontsize=8.5)
    smooth = [_smooth(rows, panel.key) for rows in runs]
    for steps, values in smooth:
        axes.plot(steps, values, color=palette.after, linewidth=0.8, alpha=0.45)
    axes.plot(*_mean_curve(smooth), color=palette.after, linewidth=2.0)


def _smooth(rows: Sequence[Row], key: str) -> tuple[Points, Points]:
    """Steps, and moving averages over a twentieth of the run."""
    steps, values = series_of(rows, key)
    return steps, moving_average(values, max(1, len(values) // 20))


def _mean_curve(curves: Sequence[tuple[Points, Points]]) -> tuple[list[float], list[float]]:
    """Mean over the seeds that logged a step."""
    by_step: dict[float, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(steps.tolist(), values.tolist()):
            by_step.setdefault(step, []).append(value)
    return sorted(by_step), [fmean(by_step[step]) for step in sorted(by_step)]


# --- length and accuracy -------------------------------------------------------------------------------------------


def _lengths(arm: ArmResult) -> list[tuple[float, float]]:
    """Mean completion length in tokens and accuracy in percent per seed. (Truncated reasoning has length 0.)"""
    lengths = [number(result["lengths"]["total"]["all"]["mean"]) for result in arm.results]
    return [(length, 100 * accuracy) for length, accuracy in zip(lengths, arm.accuracies)]


def plot_lengths(collected: Collected, path: Path, theme: Theme = "light") -> Path:
    """Plot completion length against accuracy on the primary test: a hollow marker per seed, a filled one per mean."""
    recipe = collected.recipe
    with styled(theme) as palette:
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"Length and accuracy, {recipe.primary}")
        axes.grid(True, axis="x")
        axes.set_xlabel("mean completion length, tokens")
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        named: list[tuple[str, float, float, Any]] = []
        for index, arm in enumerate(collected.tests[recipe.primary]):
            points = _lengths(arm)
            color, marker = palette.look(index)
            x, y = (fmean(values) for values in zip(*points))
            for length, accuracy in points:
                axes.plot([x, length], [y, accuracy], color=color, linewidth=0.7, alpha=0.5)
                axes.plot(length, accuracy, marker, color=color, **(_SEED | {"markersize": 5}))
            axes.plot(x, y, marker, color=color, markersize=7)
            named.append((arm.name, x, y, color))
        axes.margins(x=0.08, y=0.1)
        low, high = axes.get_ylim()
        right = axes.get_xlim()[1]
        heights = spread([y for _, _, y, _ in named], 0.055 * (high - low), low, high)
        for (name, x, y, color), height in zip(named, heights):
            axes.annotate(
                name,
                (x, y),
                xytext=(right, height),
                textcoords="data",
                color=color,
                fontsize=8.5,
                va="center",
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.35},
            )
        return save_figure(figure, path)


# --- reward parts --------------------------------------------------------------------------------------------------


def plot_correlations(collected: Collected, path: Path, theme: Theme = "light") -> Path:
    """Plot the correlation of each reward part with correctness: Pearson's r within a step, averaged over the first
    half of the steps (grey) and the second (blue); a circle per seed and a bar for their mean."""
    rows = [(arm, part) for arm, parts in collected.correlations.items() for part in parts]
    with styled(theme) as palette:
        figure = Figure(figsize=(6.6, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Correlation of reward parts with correctness")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.axvline(0.0, color=palette.muted, linewidth=1.0)
        axes.set_xlim(-1.02, 1.02)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [f"{arm}: {part.part}" for arm, part in rows])
        axes.tick_params(axis="y", labelcolor=palette.text)
        for height, (_, part) in enumerate(rows):
            for values, color, offset in ((part.first, palette.before, -0.17), (part.last, palette.after, 0.17)):
                finite = [value for value in values if not math.isnan(value)]
                axes.plot(finite, [height + offset] * len(finite), "o", color=color, markersize=3.5, alpha=0.6)
                if finite:
                    mean = fmean(finite)
                    axes.vlines(mean, height + offset - 0.16, height + offset + 0.16, color=color, linewidth=2.2)
        handles = [
            Line2D([], [], color=color, marker="o", markersize=3.5, linewidth=2.2, label=label)
            for color, label in ((palette.before, "first half of the steps"), (palette.after, "second half"))
        ]
        figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=8.5)
        return save_figure(figure, path)
