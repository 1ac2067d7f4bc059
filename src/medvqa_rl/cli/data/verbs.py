"""The verbs ``medvqa-rl data ...``: inspect, check, split and export data. Imports no torch.

``check`` exits with 0 if nothing is wrong, 1 if something is, and 2 if the settings or the data cannot be used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import (
    Columns,
    ConfigPath,
    Overrides,
    Split,
    TextOnly,
    Verbs,
    read_columns,
    read_settings,
    verb,
)

data_app = Verbs(help="Inspect, check, split and export data.", no_args_is_help=True)


@data_app.command("list")
@verb
def data_list() -> None:
    """List the supported data sets with their splits, columns, terms of use and sources."""
    from medvqa_rl.cli.data.show import run_list

    run_list()


@data_app.command("check")
@verb
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Check at most this many samples per split.")] = None,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Do not decode images; shared images are then found by name only.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also exit with 1 on findings that need a look but may be fine.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the findings to this HTML file.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads. Default: one per CPU, at most 8.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="YAML file whose data section names another data set to search for shared images; repeatable."
        ),
    ] = None,
) -> None:
    """Check every question and image of all splits. Exits with 1 if something is wrong."""
    loaded = read_settings(config, overrides or (), purpose="eval")
    further = [read_settings(path, (), purpose="eval").config.data for path in data or ()]
    if further and no_images:
        raise ValueError(
            "--data and --no-images cannot be combined: images of different data sets are compared by pixels, not "
            "by name. Leave one of them out."
        )
    from medvqa_rl.cli.data.check import run_check

    passed = run_check(
        loaded.config,
        limit=limit,
        decode=not no_images,
        strict=strict,
        html=html,
        workers=workers,
        further=further,
    )
    if not passed:
        raise typer.Exit(1)


@data_app.command("show")
@verb
def data_show(
    config: ConfigPath,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="Split to draw.")] = "train",
    count: Annotated[int, typer.Option(min=1, max=200, help="Number of samples.")] = 12,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
) -> None:
    """Draw a contact sheet of images with their questions and gold answers."""
    loaded = read_settings(config, overrides or (), purpose="eval")
    from medvqa_rl.cli.data.show import run_show

    run_show(loaded.config, split=split, count=count, output=output)


@data_app.command("split")
@verb
def data_split(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="Your questions: CSV, Excel, JSON Lines, JSON or parquet.")
    ],
    by: Annotated[
        str | None,
        typer.Option(
            help="Keep rows with the same value in one split: image, or a column (and image). Default: the column of "
            "patients, such as patient_id or MRN, if there is one, else image."
        ),
    ] = None,
    val: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows for validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows for testing.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the random assignment.")] = 0,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the images; if given, images with equal pixels stay in one split too."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Table to write. Default: data.* beside TABLE.")] = None,
    columns: Columns = None,
    allow_text_only: TextOnly = False,
    max_dropped: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Largest share of unusable rows to leave out."),
    ] = 0.0,
) -> None:
    """Add a column with train, val or test to your table, so that no image and no patient is in two splits."""
    from medvqa_rl.cli.data.write import run_split

    run_split(
        table,
        output=output,
        by=by,
        val=val,
        test=test,
        seed=seed,
        images=images,
        columns=read_columns(columns),
        allow_text_only=allow_text_only,
        max_dropped=max_dropped,
    )


@data_app.command("export")
@verb
def data_export(
    config: ConfigPath,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("export"),
    split: Annotated[Split | None, typer.Option(help="Split to export. Default: all of them.")] = None,
    form: Annotated[
        Literal["jsonl", "parquet", "csv"],
        typer.Option(
            "--format", help="jsonl with image files, parquet with embedded images, or csv for data.name=own."
        ),
    ] = "jsonl",
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Downscale larger images to this many pixels.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Write at most this many samples per split.")] = None,
    keep_metadata: Annotated[
        bool,
        typer.Option(
            "--keep-metadata",
            help="Copy the bytes of plain PNG and JPEG files, with EXIF, comments and whatever else is in them.",
        ),
    ] = False,
) -> None:
    """Export a data set with TRL's columns (prompt, images, solution), or as a CSV table."""
    loaded = read_settings(config, overrides or (), purpose="eval")
    from medvqa_rl.cli.data.write import run_export

    run_export(
        loaded.config,
        output=output,
        split=split,
        form=form,
        max_pixels=max_pixels,
        limit=limit,
        keep_metadata=keep_metadata,
    )
