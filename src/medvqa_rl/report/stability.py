"""Stability of a training curve: its largest drop and its abrupt changes, with their steps. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Drop:
    """The maximum drawdown of the moving average."""

    size: float
    """At least 0."""
    top: float
    """Last step of the window it fell from; NaN if the average never fell."""
    bottom: float
    """Last step of the window it fell to."""


@dataclass(frozen=True)
class Change:
    """A jump between two adjacent windows of a curve."""

    step: float
    """First step of the later window."""
    change: float
    """Mean of the later window minus mean of the earlier one."""
    deviations: float
    """Size in pooled standard deviations within the windows; infinite if those are 0."""


def window_for(count: int) -> int:
    """Return the window for a curve of ``count`` steps: a twentieth, between 10 and 100."""
    return min(100, max(10, count // 20))


def largest_drop(steps: Sequence[float], values: Sequence[float], window: int) -> Drop:
    """Return max over s < t of mean(s) - mean(t), where mean(t) is over the ``window`` values that end at step t.

    Args:
        steps: training step of each value.
        values: at least ``window`` values.
        window: number of values in each mean.
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
    """Return the differences between means of adjacent windows, and their sizes in pooled standard deviations."""
    windows = sliding_window_view(np.asarray(values, dtype=np.float64), window)
    means, variances = windows.mean(axis=1), windows.var(axis=1, ddof=1)
    changes: Floats = means[window:] - means[:-window]
    spreads = np.sqrt((variances[window:] + variances[:-window]) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes: Floats = np.where(np.abs(changes) > 1e-9, np.abs(changes) / spreads, 0.0)
    return changes, sizes


def largest_change(steps: Sequence[float], values: Sequence[float], window: int) -> Change:
    """Return the change between adjacent windows that is largest in standard deviations.

    Args:
        steps: training step of each value.
        values: at least twice ``window`` values.
        window: number of values per window, at least 2.
    """
    assert len(steps) == len(values) >= 2 * window >= 4
    changes, sizes = _sizes(values, window)
    index = int(sizes.argmax())
    return Change(float(steps[index + window]), float(changes[index]), float(sizes[index]))


def abrupt_changes(steps: Sequence[float], values: Sequence[float], window: int, limit: float) -> list[Change]:
    """Return changes of more than ``limit`` standard deviations, in order.

    Changes closer than a window overlap; only the largest of them counts.
    """
    assert len(steps) == len(values) >= 2 * window >= 4
    changes, sizes = _sizes(values, window)
    found: list[int] = []
    for index in np.argsort(-sizes, kind="stable"):
        if sizes[index] <= limit:
            break
        if all(abs(int(index) - other) >= window for other in found):
            found.append(int(index))
    return [
        Change(float(steps[index + window]), float(changes[index]), float(sizes[index])) for index in sorted(found)
    ]
