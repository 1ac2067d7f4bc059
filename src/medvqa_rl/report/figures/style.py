"""Colours, fonts and helpers shared by all figures. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Theme = Literal["light", "dark", "print"]
"""print is for papers: white, in colours that colour-blind readers can tell apart."""
_MARKERS = "osD^v"


@dataclass(frozen=True)
class Palette:
    """The colours of a theme."""

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
    """For any other lines, in order of use."""

    def look(self, index: int) -> tuple[str, str]:
        """Colour and marker of the line with this index: the next marker is used whenever all colours are."""
        again, color = divmod(index, len(self.series))
        return self.series[color], _MARKERS[again % len(_MARKERS)]


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
"""Twice matplotlib's 100, for sharp text on high-density displays."""


@contextmanager
def styled(theme: Theme) -> Iterator[Palette]:
    """Apply a theme inside the block, and restore the caller's matplotlib settings afterwards."""
    import matplotlib as mpl  # slow, and pages need only the palettes and helpers

    palette = PALETTES[theme]
    settings: Any = {
        "figure.facecolor": palette.background,
        "axes.facecolor": palette.background,
        "savefig.facecolor": palette.background,
        "savefig.dpi": DPI,
        "font.family": "DejaVu Sans",
        "pdf.fonttype": 42,  # TrueType, which journals require
        "svg.hashsalt": "medvqa-rl",  # makes files reproducible
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
    """Return a number of ``results.json``, with NaN for null."""
    return math.nan if value is None else float(value)


def percent(summary: Mapping[str, Any], name: str = "accuracy") -> float:
    """Return a rate of a summary in percent; NaN if undefined."""
    return 100 * number(summary[name])


def spread(positions: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until neighbours are at least ``gap`` apart, in the same order and, if they fit,
    between low and high."""
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
