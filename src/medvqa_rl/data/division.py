"""Divide a table into train, val and test, so that no image and no patient is in two splits. Imports no torch."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import first_few, number_of
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.fingerprints import ImageFacts, measure
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.overlap import twins
from medvqa_rl.data.patients import as_patient, patient_column, unused_columns
from medvqa_rl.data.reading.rows import Unusable
from medvqa_rl.data.reading.tables import TableReport, read_table, write_table
from medvqa_rl.data.sets.own import image_names
from medvqa_rl.data.splits import SPLITS, Split, connected

COLUMN = "split"
"""Name of the output column."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Division:
    """A divided table."""

    rows: tuple[Row, ...]
    splits: tuple[Split, ...]
    """The split of every row."""
    groups: int
    """Number of groups of rows that had to stay together."""

    def counts(self) -> dict[Split, int]:
        """Number of rows of every split."""
        found = Counter(self.splits)
        return {split: found[split] for split in SPLITS}


def read_whole(path: Path) -> tuple[Row, ...]:
    """Read all rows of a table in CSV, JSON Lines, JSON or parquet.

    Raises:
        ValueError: the table or any of its rows cannot be read, or it is empty.
    """
    report = TableReport(path.name)
    rows = tuple(fields for _, fields in read_table(path, report))
    if bad := [f"row {issue.row} ({issue.reason})" for issue in report.issues if issue.action == "dropped"]:
        raise ValueError(
            f"{number_of(len(bad), 'row')} of {path} cannot be read: {first_few(bad, 5)}; rows are counted from 0. "
            "Fix or remove them."
        )
    if not rows:
        raise ValueError(f"The table {path} has no rows: add your questions.")
    return rows


def images_in(row: Row, number: int, path: Path) -> tuple[str, ...]:
    """The image names of a row.

    Raises:
        ValueError: there is none; the message names the row.
    """
    try:
        return tuple(image_names(row, {}))
    except Unusable as problem:
        raise ValueError(
            f"Row {number} of {path} names no image ({problem.reason}): fill its column image (or images), or remove "
            "the row; rows are counted from 0."
        ) from problem


def choose_column(rows: Sequence[Row]) -> tuple[str, str]:
    """What to divide a table by, and a sentence on columns that look like patients and were not used, or ""."""
    by = patient_column(rows) or "image"
    unused = unused_columns(rows) if by == "image" else []
    if not unused:
        return by, ""
    return by, (
        f"Warning: {first_few(unused)} may identify patients, but rows with the same value were not kept in one "
        f"split: if it does, divide the table with `medvqa-rl data split --by {shlex.quote(unused[0])}`."
    )


def divide(
    rows: Sequence[Row],
    path: Path,
    *,
    by: str = "image",
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    equal: Iterable[tuple[str, ...]] = (),
) -> Division:
    """Divide rows so that rows that share an image or a value of a column, directly or through others, stay together.

    Groups of such rows are ordered by a hash of (seed, the group's first image by name). Test, then val, takes groups
    until it has its share of the rows, as nearly as whole groups allow; the rest is train. The result does not depend
    on the order of rows.

    Args:
        rows: the table.
        path: path of the table, for messages.
        by: ``image``, or a column, such as patient, whose equal values also stay together.
        val: share of the rows for validation.
        test: share of the rows for testing.
        seed: seed of the division.
        equal: groups of image names with equal pixels.

    Raises:
        ValueError: the shares leave nothing to train on, a value of the column or an image is missing, or there are
            too few groups to fill every split.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val = {val:g} and test = {test:g} leave nothing to train on: their sum must be below 1.")
    links: list[tuple[str, Hashable]] = []
    first_images: list[str] = []
    for number, row in enumerate(rows):
        names = images_in(row, number, path)
        first_images.append(names[0])
        links += [(name, ("row", number)) for name in names]
        links += [(name, ("file", split_fragment(name)[0])) for name in names]  # slices of a volume stay together
        if by != "image":
            value = as_patient(row.get(by))
            if not value:
                raise ValueError(
                    f"Row {number} of {path} has no {by}, but the table is to be split by it: fill the column (with a "
                    "value of its own where it is unknown), or divide the table with `medvqa-rl data split --by "
                    "image`; rows are counted from 0."
                )
            links.append((names[0], (by, value)))
    known = {name for name, _ in links}
    links += [(name, ("equal", names[0])) for names in equal for name in names if name in known]
    components = connected(links)
    smallest: dict[str, str] = {}
    for name, component in components.items():
        smallest[component] = min(name, smallest.get(component, name))
    groups = [smallest[components[name]] for name in first_images]
    sizes = Counter(groups)
    split_of_group = _fill(sizes, {"test": test * len(rows), "val": val * len(rows)}, seed)
    division = Division(tuple(rows), tuple(split_of_group[group] for group in groups), len(sizes))
    shares = {"train": 1.0, "val": val, "test": test}
    for split, count in division.counts().items():
        if shares[split] and not count:
            raise ValueError(
                f"Rows that share an image or equal pixels{'' if by == 'image' else f', or a value of {by},'} stay in "
                f"one split. The {len(rows):,} rows of {path} form {number_of(len(sizes), 'such group')}, too few for "
                f"a {split} split: add rows of other images{'' if by == 'image' else f' and other values of {by}'}, "
                "or divide the table with `medvqa-rl data split` and other --by, --val and --test."
            )
    return division


def _fill(sizes: Mapping[str, int], wanted: Mapping[Split, float], seed: int) -> dict[str, Split]:
    """Assign groups to splits.

    Each split takes groups in the order of their hashes, skipping those that would overshoot its number of rows by
    more than it now falls short. If that skips all groups, it takes the smallest.
    """
    order = sorted(sizes, key=lambda group: (address("divide", seed, group), group))
    splits: dict[str, Split] = {}
    for split, number in wanted.items():
        count = 0.0
        for group in order:
            if group not in splits and count + sizes[group] / 2 < number:
                splits[group] = split
                count += sizes[group]
        rest = [group for group in order if group not in splits]
        if number and not count and rest:
            splits[min(rest, key=lambda group: sizes[group])] = split
    return {group: splits.get(group, "train") for group in order}


def equal_images(
    rows: Sequence[Row], path: Path, folder: Path, *, workers: int, progress: Callable[[int, int], None]
) -> list[tuple[str, ...]]:
    """Decode every image of a table and group the names of images with equal pixels.

    Raises:
        ValueError: an image cannot be decoded; the message names it.
    """
    names = dict.fromkeys(name for number, row in enumerate(rows) for name in images_in(row, number, path))
    facts: dict[str, ImageFacts] = {}
    for done, (source, measured) in enumerate(
        measure([FileImage(name, folder) for name in names], workers=workers), 1
    ):
        if isinstance(measured, str):
            raise ValueError(measured)
        facts[source.key] = measured
        progress(done, len(names))
    return twins(names, facts)


def write_divided(division: Division, out: Path) -> None:
    """Write the rows with the column ``split``, as CSV, JSON Lines or parquet depending on the suffix.

    Raises:
        ValueError: the suffix is none of these, the file exists, or pyarrow is not installed.
    """
    rows = [{**row, COLUMN: split} for row, split in zip(division.rows, division.splits)]
    write_table(out, rows, list(dict.fromkeys(column for row in rows for column in row)))
