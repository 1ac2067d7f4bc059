"""The verbs ``medvqa-rl data ...``: look at data before anything is trained on it. Imports no torch.

Exit codes of ``check``: 0 nothing is wrong, 1 something is, 2 settings or data that cannot be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import ConfigPath, Debug, Overrides, Split, read_settings, told_plainly

data_app = typer.Typer(help="Look at data, check it, split it and export it.", no_args_is_help=True)

PartOf = Annotated[Split, typer.Option(help="Which questions.")]


@data_app.command("list")
def data_list(debug: Debug = False) -> None:
    """Name the data sets that can be read: splits, columns, terms, and where to get them."""
    with told_plainly(debug):
        from medvqa_rl.cli.data.inspection import run_list

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
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A YAML file whose data section names a set to look for shared images in; once for each."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Check every question and every image of all splits. Exits with 1 where something is wrong."""
    with told_plainly(debug):
        loaded = read_settings(config, overrides or (), purpose="eval")
        further = [read_settings(path, (), purpose="eval").config.data for path in data or ()]
        if further and no_images:
            raise ValueError(
                "--data and --no-images do not go together: images of different data sets are compared by their "
                "pixels, not by their names. Leave one of them out."
            )
        from medvqa_rl.cli.data.inspection import run_check

        is_right = run_check(
            loaded.config,
            limit=limit,
            decode=not no_images,
            strict=strict,
            html=html,
            workers=workers,
            further=further,
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
        loaded = read_settings(config, overrides or (), purpose="eval")
        from medvqa_rl.cli.data.inspection import run_show

        run_show(loaded.config, split=split, count=count, output=output)


@data_app.command("split")
def data_split(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Your questions: CSV, JSON Lines, JSON or parquet.")],
    by: Annotated[
        str, typer.Option(help="What must not be in two splits: image, or a column such as patient (and images too).")
    ] = "image",
    val: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows for validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows for testing.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; those with equal pixels then stay together too.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The table to write; data.* beside TABLE.")] = None,
    debug: Debug = False,
) -> None:
    """Write your table again with a column that says train, val or test, no image in two of them."""
    with told_plainly(debug):
        from medvqa_rl.cli.data.files import run_split

        run_split(table, output=output, by=by, val=val, test=test, seed=seed, images=images)


@data_app.command("export")
def data_export(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("export"),
    split: Annotated[Split | None, typer.Option(help="Which questions; without it, all three splits.")] = None,
    form: Annotated[
        Literal["jsonl", "parquet", "csv"],
        typer.Option("--format", help="jsonl with image files, parquet with all inside, or csv as for data.name=own."),
    ] = "jsonl",
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Shrink larger images to this area.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Write so many samples of each split at most.")] = None,
    debug: Debug = False,
) -> None:
    """Write a data set with the columns that TRL reads (prompt, images, solution), or as a table of one's own."""
    with told_plainly(debug):
        loaded = read_settings(config, overrides or (), purpose="eval")
        from medvqa_rl.cli.data.files import run_export

        run_export(loaded.config, output=output, split=split, form=form, max_pixels=max_pixels, limit=limit)
