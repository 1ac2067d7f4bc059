"""The figure of a trend: measures against a number, one line per series. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medvqa_rl.report.figures.plots import save_figure
from medvqa_rl.report.figures.style import Theme, styled
from medvqa_rl.study.trend_tables import METRICS
from medvqa_rl.study.trends import Point, TrendResult


def plot_trend(found: TrendResult, path: Path, theme: Theme = "light") -> Path:
    """Plot each metric against the number, with 95 % intervals; differences, if any, in a second row.

    Numbers are evenly spaced, because they often grow by factors and begin at 0. No difference looks like a series.
    """
    metrics, rows = found.trend.metrics, [found.points, *([found.differences] if found.differences else [])]
    with styled(theme) as palette:
        figure = Figure(figsize=(1.0 + 3.1 * len(metrics), 0.6 + 3.1 * len(rows)), layout="constrained")
        names = list(dict.fromkeys(point.series for points in rows for point in points))
        looks = {name: palette.look(index) for index, name in enumerate(names)}
        for part, points in zip(figure.subfigures(len(rows), 1, squeeze=False).ravel(), rows):
            panels = part.subplots(1, len(metrics), squeeze=False).ravel()
            for axes, metric in zip(panels, metrics):
                _panel(axes, points, metric, looks)
                if points is found.differences:
                    axes.set_title(f"{METRICS[metric].title}, difference")
                    axes.axhline(0.0, color=palette.muted, linewidth=1.0, zorder=0)
                axes.set_xlabel(found.trend.x)
            handles, labels = panels[0].get_legend_handles_labels()
            part.legend(handles, labels, loc="outside lower center", ncols=len(metrics), frameon=False, fontsize=8.5)
        return save_figure(figure, path)


def _panel(axes: Axes, points: Sequence[Point], metric: str, looks: Mapping[str, tuple[str, str]]) -> None:
    shown = METRICS[metric]
    axes.set_title(shown.title)
    numbers = sorted({point.x for point in points})
    names = list(dict.fromkeys(point.series for point in points))
    for index, name in enumerate(names):
        own = [point for point in points if point.series == name and not math.isnan(point.values[metric].estimate)]
        # Series are moved apart, so that their intervals do not hide each other.
        places = [numbers.index(point.x) + 0.08 * (index - (len(names) - 1) / 2) for point in own]
        values, (color, marker) = [point.values[metric] for point in own], looks[name]
        axes.vlines(
            places,
            [shown.scale * value.low for value in values],
            [shown.scale * value.high for value in values],
            color=color,
            linewidth=1.4,
            alpha=0.6,
        )
        heights = [shown.scale * value.estimate for value in values]
        axes.plot(places, heights, marker=marker, markersize=4.5, color=color, linewidth=1.4, label=name)
    axes.set_xticks(range(len(numbers)), [f"{number:,g}" for number in numbers])
