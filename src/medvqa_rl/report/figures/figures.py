"""Figures for papers: curves and comparisons of runs as PDF and SVG. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.report.comparisons import compare
from medvqa_rl.report.figures.plots import plot_before_after, plot_training
from medvqa_rl.report.runs import read_run

FORMATS = ("pdf", "svg")


def write_figures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Draw the curves of each run that logged a reward, and every comparison with its intervals.

    Returns:
        The files: ``training-RUN.pdf``, ``accuracy-NAME.pdf``, and the same as SVG.

    Raises:
        ValueError: a folder is not that of a run, or there is nothing to draw.
    """
    runs = [read_run(path) for path in paths]
    written: list[Path] = []
    for run in runs:
        if any("reward" in row for row in run.metrics):
            for kind in FORMATS:
                path = folder / f"training-{_slug(run.name)}.{kind}"
                written.append(plot_training(run.metrics, path, theme="print"))
    for item in compare(runs)[0]:
        for kind in FORMATS:
            path = folder / f"accuracy-{_slug(item.name)}.{kind}"
            written.append(plot_before_after(item.before, item.after, path, names=item.names, theme="print"))
    if not written:
        raise ValueError(
            f"There is nothing to draw in {', '.join(run.name for run in runs)}: no step with a reward is logged, and "
            "no two evaluations of the same questions are stored."
        )
    return written


def _slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
