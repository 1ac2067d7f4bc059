"""Dividing one's own table into train, val and test, so that no image and no patient is in two of them. No torch."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.core.randomness import address
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.fingerprints import ImageFacts, measure
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.overlap import twins
from medvqa_rl.data.reading.tables import Report, read_table
from medvqa_rl.data.splits import Split, connected

IMAGE_COLUMNS = ("image", "images")
COLUMN = "split"
"""The column that is written."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Division:
    """A table divided."""

    rows: tuple[Row, ...]
    places: tuple[Split, ...]
    """The split of every row."""
    groups: int
    """What stays together, by connected images and values."""

    def counts(self) -> dict[Split, int]:
        """Rows of every split."""
        found = Counter(self.places)
        return {split: found[split] for split in ("train", "val", "test")}


def read_whole(path: Path) -> tuple[Row, ...]:
    """All rows of a table in CSV, JSON Lines, JSON or parquet.

    Raises:
        ValueError: the table or any of its rows cannot be read, or it has none.
    """
    report = Report(path.name)
    rows = tuple(fields for _, fields in read_table(path, report))
    bad = [issue for issue in report.issues if issue.action == "dropped"]
    if bad:
        places = ", ".join(f"row {issue.row} ({issue.reason})" for issue in bad[:5])
        raise ValueError(
            f"{len(bad)} rows of {path} cannot be read: {places}{' and others' if len(bad) > 5 else ''}; rows are "
            "counted from 0. Repair or remove them, so that none is lost."
        )
    if not rows:
        raise ValueError(f"The table {path} has no rows: give one that has.")
    return rows


def images_in(row: Row, number: int, path: Path) -> tuple[str, ...]:
    """The image paths of a row: a list, a JSON list, or parts between bars.

    Raises:
        ValueError: there is none; the message names the row.
    """
    for column in IMAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        parts = value.split("|") if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        names = tuple(str(part).strip() for part in parts if str(part).strip())
        if names:
            return names
    raise ValueError(
        f"Row {number} of {path} names no image: fill its column image (or images), or remove the row; rows are "
        "counted from 0."
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
    """Divide rows so that what shares an image, or a value of a column, stays together, directly or through others.

    Whole groups are taken in the order of a hash of (seed, the group's first image by name) until test, then val, has
    its share of the rows, as nearly as groups allow; the rest is train. Neither the order of the rows nor the machine
    matters.

    Args:
        rows: the table.
        path: the table's file, for messages.
        by: ``image``, or a column such as patient whose equal values stay together too.
        val: share of the rows for validation.
        test: share of the rows for testing.
        seed: another seed, another division.
        equal: images that are the same under several names.

    Raises:
        ValueError: shares that leave nothing to train on, a missing or empty column, a row without an image, or so
            few groups that a split would be empty.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val = {val:g} and test = {test:g} leave nothing to train on: their sum must be below 1.")
    links: list[tuple[str, Hashable]] = []
    first_images: list[str] = []
    for number, row in enumerate(rows):
        names = images_in(row, number, path)
        first_images.append(names[0])
        links += [(name, ("row", number)) for name in names]
        links += [(name, ("file", split_fragment(name)[0])) for name in names]  # slices of a volume are one image
        if by != "image":
            value = str(row[by] if row.get(by) is not None else "").strip()
            if by not in row or not value:
                raise ValueError(
                    f"Row {number} of {path} has no {by}, but the table is to be split by it: fill the column, or "
                    "split by image; rows are counted from 0."
                )
            links.append((names[0], (by, value)))
    known = {name for name, _ in links}
    links += [(name, ("equal", group[0])) for group in equal for name in group if name in known]
    together = connected(links)
    groups: dict[str, list[str]] = {}
    for name, representative in together.items():
        groups.setdefault(representative, []).append(name)
    named = {representative: min(names) for representative, names in groups.items()}
    sizes = Counter(named[together[name]] for name in first_images)
    place_of = _fill(sizes, {"test": test * len(rows), "val": val * len(rows)}, seed)
    division = Division(tuple(rows), tuple(place_of[named[together[name]]] for name in first_images), len(sizes))
    wanted: dict[Split, float] = {"train": 1.0 - val - test, "val": val, "test": test}
    counts = division.counts()
    if empty := [split for split, share in wanted.items() if share and not counts[split]]:
        raise ValueError(
            f"The {len(rows):,} rows of {path} fall into {len(sizes)} groups that stay together, too few for a "
            f"{empty[0]} split: split by image instead of {by}, or change --val and --test."
        )
    return division


def _fill(sizes: Mapping[str, int], wanted: Mapping[Split, float], seed: int) -> dict[str, Split]:
    """Put groups into splits: each split takes groups in the order of their hashes, leaving out those that would take
    it further beyond its share than it is short of it. Where all would, it takes the smallest."""
    order = sorted(sizes, key=lambda group: (address("divide", seed, group), group))
    places: dict[str, Split] = {}
    for split, share in wanted.items():
        count = 0.0
        for group in order:
            if group not in places and count + sizes[group] / 2 < share:
                places[group] = split
                count += sizes[group]
        rest = [group for group in order if group not in places]
        if share and not count and rest:
            places[min(rest, key=lambda group: sizes[group])] = split
    return {group: places.get(group, "train") for group in order}


def equal_images(
    rows: Sequence[Row], path: Path, folder: Path, *, workers: int, progress: Callable[[int, int], None]
) -> list[tuple[str, ...]]:
    """Decode every image of a table and find those with equal pixels under several names.

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
    """Write the rows with the column ``split``, atomically: CSV, JSON Lines or parquet by the file's ending.

    Raises:
        ValueError: the ending is none of these, the file exists, or pyarrow is not installed.
    """
    if out.exists():
        raise ValueError(f"The file {out} exists already: name another with --output, or move it away.")
    rows = [{**row, COLUMN: place} for row, place in zip(division.rows, division.places)]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    match out.suffix.lower():
        case ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        case ".csv":
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        case ".parquet":
            _write_parquet(partial, rows)
        case suffix:
            raise ValueError(f"The file {out} ends in {suffix!r}: end its name in .jsonl, .csv or .parquet.")
    os.replace(partial, out)


def _cell(value: Any) -> Any:
    """A value as CSV holds it: lists as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'medvqa-rl[hub]', or write .jsonl or .csv.") from error
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
