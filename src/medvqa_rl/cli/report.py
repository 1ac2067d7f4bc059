"""The verb ``medvqa-rl report``, which reads run folders. It never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import verb
from medvqa_rl.core.text import size_of


@verb
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    card: Annotated[
        bool, typer.Option("--card", help="Write the model cards of the runs' checkpoints instead of the page.")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="Write figures for a paper, as PDF and SVG, to this folder instead.")
    ] = None,
    evals: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of evaluations outside the run, before or after training. May be repeated."),
    ] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave out the images of the questions.")] = False,
) -> None:
    """Write a self-contained page about one or more runs: comparisons, curves, health checks and samples."""
    if card:
        from medvqa_rl.report.card import write_cards

        for run in runs:
            for path in write_cards(run):
                print(path)
        return
    if figures is not None:
        from medvqa_rl.report.figures.figures import write_figures

        for path in write_figures(runs, figures):
            print(path)
        return
    from medvqa_rl.report.pages.report import write_report

    path = write_report(runs, output, images=not no_images, evals=evals or ())
    print(f"Written: {path} ({size_of(path)})")
