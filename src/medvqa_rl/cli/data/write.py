"""The verbs ``data split`` and ``data export``. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from medvqa_rl.config import Config
from medvqa_rl.core.progress import open_console, progress_bar
from medvqa_rl.core.tables import TextTable
from medvqa_rl.core.text import for_terminal, number_of
from medvqa_rl.data import Split, load_dataset, load_splits
from medvqa_rl.data.division import choose_column, divide, equal_images, output_suffix, read_whole, write_divided
from medvqa_rl.data.export import Format, export
from medvqa_rl.data.sets.own import embeds_images


def run_split(
    table: Path,
    *,
    output: Path | None,
    by: str | None,
    val: float,
    test: float,
    seed: int,
    images: Path | None,
    columns: Mapping[str, str] = MappingProxyType({}),
    allow_text_only: bool = False,
    max_dropped: float = 0.0,
) -> None:
    """Assign the rows of a table to splits and write it with a column ``split``.

    Args:
        table: the table, in any format that ``data.name: own`` reads.
        output: the new table; defaults to ``data`` beside the old one.
        by: ``image``, or a column whose values must not be in two splits; None takes the column of patients if
            there is one.
        images: folder of the images; if given, they are decoded and those with equal pixels stay together.
        columns: our name -> column of the table.
        allow_text_only: keep rows without an image.
        max_dropped: largest share of rows that may be left out because they cannot be used.

    Raises:
        ValueError: the table cannot be read or split, or the new one exists.
    """
    out = table.with_name(f"data{output_suffix(table)}") if output is None else output
    if out.exists():
        raise ValueError(f"The file {out} already exists: choose another file with --output, or move this one away.")
    if images is not None and embeds_images(table, columns):
        images = None  # images stored in the table are identified by their bytes
    whole = read_whole(table, images, columns, allow_text_only=allow_text_only)
    print(for_terminal(whole.about))
    equal: list[tuple[str, ...]] = []
    if images is not None:
        with progress_bar("images") as progress:
            whole, equal = equal_images(whole, images, workers=min(8, os.cpu_count() or 1), progress=progress)
    whole.checked(max_dropped)
    warning = ""
    if by is None:
        by, warning = choose_column([entry.fields for entry in whole.entries])
    division = divide(whole, by=by, val=val, test=test, seed=seed, equal=equal)
    write_divided(division, out)
    shown = []
    for split, count in division.counts().items():
        names = {n for entry, place in zip(whole.entries, division.splits) if place == split for n in entry.images}
        shown.append((split, f"{count:,}", f"{100 * count / len(whole.entries):.1f} %", f"{len(names):,}"))
    printer = open_console()
    printer.print(TextTable("", ("split", "rows", "share", "images"), shown))
    printer.print(
        f"{division.groups:,} groups of rows that share an image{'' if by == 'image' else f' or {by}'} stay together."
    )
    if warning:
        printer.print(warning, soft_wrap=True)
    if whole.bad:
        printer.print("\n".join(["Left out:", *whole.complaints()]), soft_wrap=True, markup=False)
    if images is not None:
        renamed = sum(len(group) - 1 for group in equal)
        printer.print(f"{number_of(renamed, 'duplicate')} of another image, under another name.")
    printer.print(f"Written: {out}", soft_wrap=True)
    if out.stem == "data":
        places = [f"data.path={shlex.quote(str(out.parent))}"]
        if images is not None and images.resolve() not in (out.parent.resolve() / "images", out.parent.resolve()):
            places.append(f"data.image_folder={shlex.quote(str(images.absolute()))}")
        places += [f"data.columns.{name}={shlex.quote(column)}" for name, column in columns.items()]
        if allow_text_only:
            places.append("data.allow_text_only=true")
        printer.print(
            f"To use it, add to a command with a config: data.name=own data.split=official {' '.join(places)}",
            soft_wrap=True,
        )
    else:
        printer.print(f"To use it, name it data{out.suffix}: data.name=own reads no other name.", soft_wrap=True)


def run_export(
    config: Config,
    *,
    output: Path,
    split: Split | None,
    form: Format,
    max_pixels: int | None,
    limit: int | None,
    keep_metadata: bool,
) -> None:
    """Write one split, or all of them, with TRL's columns or as a table for ``data.name=own``.

    Raises:
        ValueError: the data cannot be read, or a file already exists.
    """
    printer = open_console()
    datasets = load_splits(config.data) if split is None else {str(split): load_dataset(config.data, split)}
    for name, dataset in datasets.items():
        with progress_bar(name) as progress:
            done = export(
                dataset,
                output,
                name,
                form=form,
                template=config.prompt.template,
                wording=config.prompt.wording,
                max_pixels=max_pixels,
                limit=limit,
                keep_metadata=keep_metadata,
                progress=progress,
            )
        copied = f" ({done.copied:,} copied unchanged, with their metadata)" if keep_metadata else ""
        printer.print(
            f"Written: {done.file}, {number_of(done.rows, 'row')}, {number_of(done.images, 'image')}{copied}",
            soft_wrap=True,
        )
