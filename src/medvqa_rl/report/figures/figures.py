"""Figures for papers: curves and comparisons of runs as PDF and SVG. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.report.comparisons import compare
from medvqa_rl.report.figures.plots import plot_before_after, plot_training
from medvqa_rl.report.runs import read_run

FORMATS = ("pdf", "svg")
MAX_RUNS = 40
"""Each run gives a page of curves and up to two comparisons, in both formats: a few seconds, and up to six files."""


def write_figures(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Plot the training curves of each run, and every comparison with its intervals.

    Returns:
        The files: ``training-RUN.pdf``, ``accuracy-NAME.pdf``, and the same as SVG.

    Raises:
        ValueError: a folder is not a run, two have the same name, there are too many, or there is nothing to plot.
    """
    if len(paths) > MAX_RUNS:
        raise ValueError(
            f"{len(paths)} runs are given, but --figures takes at most {MAX_RUNS}, because it writes up to six files "
            "for each: name those that the paper shows, or compare them in tables and figures of a study "
            "(`medvqa-rl study collect`)."
        )
    runs = [read_run(path) for path in paths]
    names = [_slug(run.name) for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(
            f"Two of the runs are called {twice}, so their figures would have the same file name: rename a folder, or "
            "plot them into two folders."
        )
    written: list[Path] = []
    for run in runs:
        if run.steps:
            for kind in FORMATS:
                path = folder / f"training-{_slug(run.name)}.{kind}"
                written.append(plot_training(run.metrics, path, theme="print"))
    for item in compare(runs)[0]:
        for kind in FORMATS:
            path = folder / f"accuracy-{_slug(item.name)}.{kind}"
            written.append(plot_before_after(item.before, item.after, path, names=item.names, theme="print"))
    if not written:
        raise ValueError(
            f"There is nothing to plot in {', '.join(run.name for run in runs)}: no training step is logged, and no "
            "two evaluations of the same questions are stored."
        )
    return written


def _slug(name: str) -> str:
    """Return a name that is safe in a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
