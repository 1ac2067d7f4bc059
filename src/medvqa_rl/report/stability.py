"""How steady a training curve is: its largest drop and its abrupt changes, with their steps. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drop:
    """The largest fall of the moving mean from a height that it had reached before."""

    size: float
    """At least 0."""
    top: float
    """Step that ends the stretch it fell from; NaN where nothing fell."""
    bottom: float
    """Step that ends the stretch it fell to."""


@dataclass(frozen=True)
class Change:
    """A jump between two neighbouring stretches of a curve."""

    step: float
    """The first step of the later stretch."""
    change: float
    """Mean of the later stretch minus that of the earlier one."""
    deviations: float
    """Its size in standard deviations of the steps within the stretches; infinite where those do not vary."""


def window_for(count: int) -> int:
    """Steps of a stretch for a curve of so many: a twentieth, from 10 to 100."""
    return min(100, max(10, count // 20))


def largest_drop(steps: Sequence[float], values: Sequence[float], window: int) -> Drop:
    """max over s < t of mean(s) - mean(t) for the means of ``window`` values that end at each step (the maximum
    drawdown of the moving average).

    Args:
        steps: of the values.
        values: at least ``window`` of them.
        window: values in a mean.
    """
    assert len(steps) == len(values) >= window >= 1
    means: Floats = sliding_window_view(np.asarray(values, dtype=np.float64), window).mean(axis=1)
    falls = np.maximum.accumulate(means) - means
    bottom = int(falls.argmax())
    if falls[bottom] <= 0:
        return Drop(0.0, float("nan"), float("nan"))
    top = int(means[: bottom + 1].argmax())
    return Drop(float(falls[bottom]), float(steps[top + window - 1]), float(steps[bottom + window - 1]))


def _sizes(values: Sequence[float], window: int) -> tuple[Floats, Floats]:
    """Differences of the means of neighbouring stretches, and their sizes in pooled standard deviations."""
    stretches = sliding_window_view(np.asarray(values, dtype=np.float64), window)
    means, variances = stretches.mean(axis=1), stretches.var(axis=1, ddof=1)
    changes: Floats = means[window:] - means[:-window]
    spreads = np.sqrt((variances[window:] + variances[:-window]) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes: Floats = np.where(np.abs(changes) > 1e-9, np.abs(changes) / spreads, 0.0)
    return changes, sizes


def largest_change(steps: Sequence[float], values: Sequence[float], window: int) -> Change:
    """The change between neighbouring stretches that is largest in standard deviations.

    Args:
        steps: of the values.
        values: at least twice ``window`` of them.
        window: values in a stretch, 2 or more.
    """
    assert len(steps) == len(values) >= 2 * window >= 4
    changes, sizes = _sizes(values, window)
    place = int(sizes.argmax())
    return Change(float(steps[place + window]), float(changes[place]), float(sizes[place]))


def abrupt_changes(steps: Sequence[float], values: Sequence[float], window: int, limit: float) -> list[Change]:
    """Changes of more than ``limit`` standard deviations, the largest of each run of neighbouring ones, in order.

    Two that are closer than a stretch share their steps, so they count as one.
    """
    assert len(steps) == len(values) >= 2 * window >= 4
    changes, sizes = _sizes(values, window)
    found: list[int] = []
    for place in np.argsort(-sizes, kind="stable"):
        if sizes[place] <= limit:
            break
        if all(abs(int(place) - other) >= window for other in found):
            found.append(int(place))
    return [
        Change(float(steps[place + window]), float(changes[place]), float(sizes[place])) for place in sorted(found)
    ]
