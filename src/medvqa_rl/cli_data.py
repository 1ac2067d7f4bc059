"""The verbs ``medvqa-rl data ...``: look at data before anything is trained on it. Imports no torch.

Exit codes of ``check``: 0 nothing is wrong, 1 something is, 2 settings or data that cannot be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli_common import ConfigPath, Debug, Overrides, Split, told_plainly

data_app = typer.Typer(help="Look at data, check it, split it and export it.", no_args_is_help=True)

PartOf = Annotated[Split, typer.Option(help="Which questions.")]


@data_app.command("list")
def data_list(debug: Debug = False) -> None:
    """Name the data sets that can be read: splits, columns, terms, and where to get them."""
    with told_plainly(debug):
        from medvqa_rl.data_commands import run_list

        run_list()


@data_app.command("check")
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at so many samples of each split at most.")] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Decode no images: shared ones are found by name only.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 also for what is only to be looked at.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the findings as one HTML page.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode; one per processor, at most 8.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Check every question and every image of all splits. Exits with 1 where something is wrong."""
    with told_plainly(debug):
        from medvqa_rl.settings import load_config

        loaded = load_config(config, overrides or (), purpose="eval")
        from medvqa_rl.data_commands import run_check

        is_right = run_check(
            loaded.config, limit=limit, decode=not no_images, strict=strict, html=html, workers=workers
        )
    if not is_right:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    config: ConfigPath,
    overrides: Overrides = None,
    split: PartOf = "train",
    count: Annotated[int, typer.Option(min=1, max=200, help="How many samples.")] = 12,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
    debug: Debug = False,
) -> None:
    """Draw a contact sheet: images with their questions and gold answers."""
    with told_plainly(debug):
        from medvqa_rl.settings import load_config

        loaded = load_config(config, overrides or (), purpose="eval")
        from medvqa_rl.data_commands import run_show

        run_show(loaded.config, split=split, count=count, output=output)
