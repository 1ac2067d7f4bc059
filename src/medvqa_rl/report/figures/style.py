"""Colours, type and small helpers that all figures share. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl

Theme = Literal["light", "dark", "print"]
"""print is for papers: white, and in colours that the colour-blind tell apart."""


@dataclass(frozen=True)
class Palette:
    """The few colours of a theme."""

    background: str
    text: str
    muted: str
    """Axis labels and notes."""
    faint: str
    """Grid lines and frames."""
    before: str
    after: str
    right: str
    wrong: str
    series: tuple[str, ...]
    """For lines that are neither of these, in order of use."""


PALETTES: dict[Theme, Palette] = {
    "light": Palette(
        background="#ffffff",
        text="#1f2630",
        muted="#5c6672",
        faint="#e3e7ec",
        before="#8b95a1",
        after="#1f6fb2",
        right="#22805a",
        wrong="#bd4b3c",
        series=("#1f6fb2", "#c77a1e", "#7a5aa6", "#22805a", "#8b95a1", "#bd4b3c"),
    ),
    "dark": Palette(
        background="#14181d",
        text="#e8ebef",
        muted="#9aa5b1",
        faint="#2b323a",
        before="#8793a0",
        after="#5aa9e6",
        right="#5cc094",
        wrong="#e5816f",
        series=("#5aa9e6", "#e3a04f", "#b193dd", "#5cc094", "#8793a0", "#e5816f"),
    ),
    "print": Palette(  # Okabe and Ito 2008; right and wrong are its blue and vermilion
        background="#ffffff",
        text="#000000",
        muted="#4d4d4d",
        faint="#e0e0e0",
        before="#7f7f7f",
        after="#0072b2",
        right="#0072b2",
        wrong="#d55e00",
        series=("#0072b2", "#e69f00", "#cc79a7", "#009e73", "#7f7f7f", "#d55e00"),
    ),
}

DPI = 200
"""Twice the usual 100 of a screen figure, for sharp text on dense displays."""


@contextmanager
def styled(theme: Theme) -> Iterator[Palette]:
    """Draw in a theme; the caller's matplotlib settings are back afterwards."""
    palette = PALETTES[theme]
    settings: Any = {
        "figure.facecolor": palette.background,
        "axes.facecolor": palette.background,
        "savefig.facecolor": palette.background,
        "savefig.dpi": DPI,
        "font.family": "DejaVu Sans",
        "pdf.fonttype": 42,  # TrueType, which journals ask for
        "svg.hashsalt": "medvqa-rl",  # the same figure is the same file
        "font.size": 9.0,
        "text.color": palette.text,
        "axes.titlesize": 10.0,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "axes.titlecolor": palette.text,
        "axes.edgecolor": palette.faint,
        "axes.labelcolor": palette.muted,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": palette.faint,
        "grid.linewidth": 0.8,
        "xtick.color": palette.faint,
        "ytick.color": palette.faint,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "ytick.major.size": 0.0,
        "lines.solid_capstyle": "round",
    }
    with mpl.rc_context(settings):
        yield palette


def number(value: Any) -> float:
    """A number of ``results.json``, where null stands for NaN."""
    return math.nan if value is None else float(value)


def percent(summary: Mapping[str, Any], name: str = "accuracy") -> float:
    """A rate of a summary in percent; NaN where it does not apply."""
    return 100 * number(summary[name])


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are at least ``gap`` away, keeping their order and staying within
    low and high where they fit."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    result = [0.0] * len(positions)
    for place, index in zip(placed, order):
        result[index] = place
    return result
