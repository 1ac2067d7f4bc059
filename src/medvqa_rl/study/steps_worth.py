"""How many RL steps a supervised warm-up is worth. Imports no torch.

The worth of a warm-up is the number of steps that RL without it takes to reach the accuracy that the warm-up starts RL
with, on the same validation questions. The definition is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.optimize import isotonic_regression

from medvqa_rl.evaluation.statistics.intervals_and_tests import LEVELS, Interval
from medvqa_rl.report.runs import Row

Curve = Mapping[int, float]
"""Step -> accuracy."""


@dataclass(frozen=True)
class Worth:
    """A warm-up in units of RL steps."""

    accuracy: float
    """Of the validation questions after the warm-up, before RL; the mean over seeds."""
    steps: Interval
    """RL steps without the warm-up to that accuracy, with an interval over seeds; infinite if never reached."""
    longest: int
    """Steps of RL without the warm-up."""


def accuracy_curve(rows: Sequence[Row]) -> Curve:
    """The validation accuracies in a run's metrics.jsonl; empty without ``train.eval_steps``."""
    return {int(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over seeds at the steps that all of them have."""
    shared = set.intersection(*(set(curve) for curve in curves))
    return {step: fmean(curve[step] for curve in curves) for step in sorted(shared)}


def steps_to_reach(curve: Curve, target: float) -> float:
    """The step at which a training curve reaches an accuracy; infinite if it does not.

    The curve is made monotone first (least squares, pool adjacent violators), because the maximum of noisy points
    would be reached too early. Between two of its steps it is linear.

    Args:
        curve: at least one step.
        target: accuracy.
    """
    steps = sorted(curve)
    fitted = isotonic_regression([curve[step] for step in steps]).x
    if fitted[0] >= target:
        return float(steps[0])
    for index in range(1, len(steps)):
        low, high = float(fitted[index - 1]), float(fitted[index])
        if high >= target:
            return steps[index - 1] + (steps[index] - steps[index - 1]) * (target - low) / (high - low)
    return math.inf


def steps_worth(
    warmed: Sequence[Curve], reference: Sequence[Curve], *, resamples: int = 2000, seed: int = 0
) -> Worth | None:
    """Express a warm-up in RL steps; None if a curve has no point.

    Args:
        warmed: RL after the warm-up, one curve per seed; only the first point of each is used.
        reference: RL without it, with the same seeds in the same order.
        resamples: bootstrap resamples of the seeds, those of both drawn together.
        seed: of NumPy's PCG64 generator.
    """
    if not warmed or not all(warmed) or not all(reference) or not (whole := mean_curve(reference)):
        return None
    starts = [curve[min(curve)] for curve in warmed]
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.integers(len(warmed), size=(resamples, len(warmed)))
    found = [
        steps_to_reach(mean_curve([reference[index] for index in row]), fmean(starts[index] for index in row))
        for row in drawn.tolist()
    ]
    # Interpolation between infinite values is undefined, so bounds are values of the resamples.
    low, high = np.quantile(found, LEVELS, method="inverted_cdf")
    estimate = steps_to_reach(whole, fmean(starts))
    return Worth(fmean(starts), Interval(estimate, float(low), float(high)), max(whole))
