"""Training curves as SVG inside a page: several runs in one picture, colours from the page's theme. Imports no torch.

Thin lines are single steps, thick ones moving averages over a tenth of the run; dots are greedy evaluations with
their 95 % intervals. With one run colours tell lines apart; with several they tell runs apart and dashes the lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from medvqa_rl.report.figures.plots import moving_average
from medvqa_rl.report.runs import StoredRun

NUM_COLORS = 6
"""Classes c0 to c5 of the page's style."""
MAX_POINTS = 200
"""Points of a line; longer curves are thinned by means, which keeps the page small."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340.0, 190.0, 40.0, 16.0, 8.0, 22.0

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A line of a chart."""

    label: str
    color: int
    steps: Points
    values: Points
    is_dashed: bool = False
    bounds: Sequence[tuple[float, float, float]] = ()
    """Step, low and high of the intervals of an evaluation."""
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A titled picture of some curves."""

    title: str
    curves: Sequence[Curve]
    is_share: bool = False

    @property
    def legend(self) -> list[tuple[str, Markup]]:
        """Label and mark of each line, where there is more than one or it has a name."""
        return [(curve.label, _mark(curve)) for curve in self.curves if curve.label]

    @property
    def svg(self) -> Markup:
        """The picture; its label says where each curve begins and ends."""
        return _svg(self)


@dataclass(frozen=True)
class _Line:
    label: str
    metric: str
    is_greedy: bool = False


_PANELS: tuple[tuple[str, bool, tuple[_Line, ...]], ...] = (
    ("Accuracy", True, (_Line("sampled", "rewards/correctness/mean"), _Line("greedy", "eval/accuracy", True))),
    (
        "Length in tokens",
        False,
        (_Line("right", "completions/mean_length_correct"), _Line("wrong", "completions/mean_length_wrong")),
    ),
    ("Loss", False, (_Line("", "loss"),)),
    ("KL from the start", False, (_Line("", "kl"),)),
    ("Entropy, nats per token", False, (_Line("", "entropy"),)),
    ("Gradient norm", False, (_Line("", "grad_norm"),)),
    ("Groups without signal", True, (_Line("", "frac_reward_zero_std"),)),
    (
        "Unusable completions",
        True,
        (_Line("no answer", "no_answer_rate"), _Line("cut off", "completions/clipped_ratio")),
    ),
)


_FAMILIES = (
    ("rewards", "mean", "Reward parts", "Reward", False),
    (
        "rewards",
        "corr_correctness",
        "Correlation of parts with right answers",
        "Correlation with right answers",
        False,
    ),
    ("prompts", "reward", "Reward by prompt", "Reward, prompt", False),
    ("prompts", "correct", "Right answers by prompt", "Right answers, prompt", True),
    ("prompts", "format", "Requested form by prompt", "Requested form, prompt", True),
)
"""Metrics called root/name/kind, whose names are not known before: root, kind, title of the picture of all, beginning
of the title of a picture of one, and whether the values are shares."""


def charts(runs: Sequence[StoredRun]) -> list[Chart]:
    """The charts of some runs; what no run logged is left out."""
    names = sorted({name for run in runs for row in run.steps for name in row})
    panels: list[tuple[str, bool, tuple[_Line, ...]]] = []
    for root, kind, title, short, is_share in _FAMILIES:
        parts = [
            _Line(name.split("/")[1], name)
            for name in names
            if name.startswith(f"{root}/") and name.endswith(f"/{kind}")
        ]
        if len(runs) == 1 and parts:
            panels.append((title, is_share, tuple(parts)))
        else:  # one picture each, or colours for runs and dashes for parts would not do
            panels += [(f"{short}: {part.label}", is_share, (_Line("", part.metric),)) for part in parts]
    drawn = []
    for title, is_share, lines in (*panels, *_PANELS):
        curves = [
            _curve(run, line, index if len(runs) == 1 else number, index > 0, len(runs) > 1)
            for number, run in enumerate(runs)
            for index, line in enumerate(lines)
        ]
        if shown := [curve for curve in curves if len(curve.steps)]:
            drawn.append(Chart(title, shown, is_share))
    return drawn


def _curve(run: StoredRun, line: _Line, color: int, is_dashed: bool, is_one_of_many: bool) -> Curve:
    rows = [row for row in run.metrics if line.metric in row]
    label = " ".join(word for word in (run.name if is_one_of_many else "", line.label) if word)
    return Curve(
        label,
        color % NUM_COLORS,
        np.array([row["step"] for row in rows], dtype=np.float64),
        np.array([row[line.metric] for row in rows], dtype=np.float64),
        is_dashed=is_dashed and is_one_of_many and not line.is_greedy,
        bounds=[
            (row["step"], row[f"{line.metric}_low"], row[f"{line.metric}_high"])
            for row in rows
            if line.is_greedy and f"{line.metric}_low" in row and f"{line.metric}_high" in row
        ],
        has_dots=line.is_greedy,
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high at distances of 1, 2 or 5 times a power of ten, about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def thin(steps: Points, values: Points, limit: int = MAX_POINTS) -> tuple[Points, Points]:
    """At most so many points: means of neighbouring ones."""
    if len(values) <= limit:
        return steps, values
    cuts = np.linspace(0, len(values), limit + 1).astype(int)
    sizes = np.diff(cuts)
    return np.add.reduceat(steps, cuts[:-1]) / sizes, np.add.reduceat(values, cuts[:-1]) / sizes


def _svg(chart: Chart) -> Markup:
    steps = np.concatenate([curve.steps for curve in chart.curves])
    values = np.concatenate([curve.values for curve in chart.curves])
    edges = [bound for curve in chart.curves for _, low, high in curve.bounds for bound in (low, high)]
    low, high = min([float(values.min()), *edges]), max([float(values.max()), *edges])
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    low, high = (low if low == 0 else low - margin), high + margin
    if chart.is_share:
        low, high = max(0.0, low), min(1.0, high) if values.max() < 1 else 1.02
    first, last = float(steps.min()), float(max(steps.max(), steps.min() + 1))

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def path(xs: Points, ys: Points) -> str:
        return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(*thin(xs, ys)))

    marks: list[str] = []
    for tick in nice_ticks(low, high):
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        label = escape(_label(tick, chart.is_share))
        marks.append(f'<text x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in nice_ticks(first, last):
        if tick == round(tick):
            marks.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{tick:.0f}</text>')
    for curve in chart.curves:
        kind = f"c{curve.color}{' dashed' if curve.is_dashed else ''}"
        window = len(curve.values) // 10 if len(curve.values) >= 20 and not curve.has_dots else 1
        if window > 1:
            marks.append(f'<path class="{kind} raw" d="{path(curve.steps, curve.values)}"/>')
        marks.append(f'<path class="{kind}" d="{path(curve.steps, moving_average(curve.values, window))}"/>')
        marks += [
            f'<line class="{kind} bound" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{y(top):.1f}" y2="{y(end):.1f}"/>'
            for step, end, top in curve.bounds
        ]
        if curve.has_dots or len(curve.values) == 1:
            marks += [
                f'<circle class="{kind}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>'
                for step, value in zip(curve.steps, curve.values)
            ]
    described = "; ".join(
        f"{curve.label or chart.title} from {_label(curve.values[0], chart.is_share)} at step {curve.steps[0]:.0f} to "
        f"{_label(curve.values[-1], chart.is_share)} at step {curve.steps[-1]:.0f}"
        for curve in chart.curves
    )
    label = escape(f"{chart.title}: {described}")
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">{"".join(marks)}</svg>'
    )


def _mark(curve: Curve) -> Markup:
    """The piece of line that a legend shows."""
    kind = f"c{curve.color}{' dashed' if curve.is_dashed else ''}"
    dot = f'<circle class="{kind}" cx="10" cy="5" r="3"/>' if curve.has_dots else ""
    return Markup(
        f'<svg class="mark" viewBox="0 0 20 10" aria-hidden="true"><path class="{kind}" d="M0 5L20 5"/>{dot}</svg>'
    )


def _label(value: float, is_share: bool) -> str:
    return (f"{100 * value:.0f} %" if is_share else f"{value:.3g}").replace("-", "−")
