"""Divide a table into train, val and test, so that no image and no patient is in two splits. Imports no torch."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import first_few, normalise, number_of, printable
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.fingerprints import ImageFacts, measure
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.overlap import twins
from medvqa_rl.data.patients import as_patient, patient_column, unused_columns
from medvqa_rl.data.reading.cells import image_cells
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.issues import NO_IMAGE, TableReport
from medvqa_rl.data.reading.records import Standard
from medvqa_rl.data.reading.rows import Unusable, find_images
from medvqa_rl.data.reading.tables import is_saved, read_table, write_table
from medvqa_rl.data.reading.unpack import name_of, store_image, unpacked_images
from medvqa_rl.data.splits import SPLITS, Split, connected

COLUMN = "split"
"""Name of the output column."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Division:
    """A divided table."""

    rows: tuple[Row, ...]
    """The rows as they are in the table."""
    splits: tuple[Split, ...]
    """The split of every row."""
    groups: int
    """Number of groups of rows that had to stay together."""

    def counts(self) -> dict[Split, int]:
        """Number of rows of every split."""
        found = Counter(self.splits)
        return {split: found[split] for split in SPLITS}


class Entry(NamedTuple):
    """A row of a table that can be divided."""

    number: int
    """The row as the spreadsheet counts it."""
    row: Row
    """The row as it is in the table."""
    fields: Row
    """Its fields under our names."""
    images: tuple[str, ...]
    """Paths of its images below the image folder; the names in the table if no folder is given."""

    @property
    def key(self) -> str:
        """Its first image, or its question: rows with the same stay in one split."""
        return self.images[0] if self.images else f"question {normalise(str(self.fields.get('question') or ''))}"


@dataclass(frozen=True)
class Whole:
    """A table with all its rows."""

    path: Path
    entries: tuple[Entry, ...]
    about: str
    """What the table was recognised as."""
    bad: Mapping[int, tuple[str, str]]
    """Number of each row that cannot be used -> reason and detail."""

    def without(self, bad: Mapping[int, tuple[str, str]]) -> Whole:
        """The table without further bad rows."""
        entries = tuple(entry for entry in self.entries if entry.number not in bad)
        return replace(self, entries=entries, bad={**bad, **self.bad})

    def checked(self, max_dropped: float) -> Whole:
        """The table itself, unless too large a share of its rows is bad.

        Raises:
            ValueError: it is, or no row is left; the message lists the bad rows.
        """
        total = len(self.entries) + len(self.bad)
        if len(self.bad) > max_dropped * total:
            share = math.ceil(100 * len(self.bad) / total) / 100
            leave_out = f", or leave them out with --max-dropped {share:g}" if share <= 0.5 else ""
            if any(reason == NO_IMAGE for reason, _ in self.bad.values()):
                leave_out += ", or keep those without an image with --allow-text-only"
            raise ValueError(
                "\n".join(
                    [
                        f"{len(self.bad):,} of {number_of(total, 'row')} of {self.path} cannot be used:",
                        *self.complaints(),
                        f"Fix or remove them{leave_out}.",
                    ]
                )
            )
        return self

    def complaints(self) -> list[str]:
        """The bad rows by reason, such as ``rows 5 (a.png), 9 (b.png): missing image``, at most 20 rows in a line."""
        by_reason: dict[str, list[str]] = {}
        for number, (reason, detail) in sorted(self.bad.items()):
            by_reason.setdefault(reason, []).append(f"{number}{f' ({detail})' if detail else ''}")
        lines = []
        for reason, rows in by_reason.items():
            for start in range(0, min(len(rows), LISTED), 20):
                some = rows[start : start + 20]
                lines.append(f"{'row' if len(some) == 1 else 'rows'} {', '.join(some)}: {reason}")
            if len(rows) > LISTED:
                lines.append(f"{number_of(len(rows) - LISTED, 'more row')}: {reason}")
        return lines


LISTED = 400
"""So many bad rows are listed for each reason."""


def read_whole(
    path: Path,
    images: Path | None = None,
    given: Mapping[str, str] = MappingProxyType({}),
    cache_dir: Path | None = None,
    *,
    allow_text_only: bool = False,
) -> Whole:
    """Read all rows of a table and find their images.

    Args:
        path: the table.
        images: the image folder; without it, images are not looked up.
        given: our name -> column of the table, as the user gives them.
        cache_dir: where to write images that the table holds; without it, they are only told apart.
        allow_text_only: keep rows without an image.

    Raises:
        ValueError: the table cannot be read, is empty, or lacks a column.
    """
    report, standard = TableReport(path.name), Standard(path, given)
    folder = None if images is None else ImageFolder(images)
    entries: list[Entry] = []
    bad: dict[int, tuple[str, str]] = {}
    for position, row in read_table(path, report):
        number = report.number(position)
        try:
            fields = standard(row)
            cells = image_cells(fields, {}, may_lack=allow_text_only)
            names = [_image_name(cell, folder, cache_dir) for cell in cells]
        except Unusable as problem:
            bad[number] = problem.reason, printable(problem.detail, 60)
            continue
        entries.append(Entry(number, row, fields, tuple(names)))
    bad |= {issue.number: (issue.reason, "") for issue in report.issues if issue.action == "dropped"}
    if not report.total:
        raise ValueError(f"The table {path} has no rows: add your questions.")
    standard.check(() if allow_text_only else ("image",))
    return Whole(path, tuple(entries), standard.about(report), bad)


def _image_name(cell: str | bytes, folder: ImageFolder | None, cache_dir: Path | None) -> str:
    if isinstance(cell, bytes):
        return name_of(cell) if cache_dir is None else store_image(cell, unpacked_images(cache_dir, "own"))
    return cell.replace("\\", "/") if folder is None else find_images([cell], folder, {})[0]


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
    table: Whole,
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
        table: the rows.
        by: ``image``, or a column, such as patient, whose equal values also stay together.
        val: share of the rows for validation.
        test: share of the rows for testing.
        seed: seed of the division.
        equal: groups of image names with equal pixels.

    Raises:
        ValueError: the shares leave nothing to train on, a value of the column is missing, or there are too few groups
            to fill every split.
    """
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"val = {val:g} and test = {test:g} leave nothing to train on: their sum must be below 1.")
    links: list[tuple[str, Hashable]] = []
    entries = table.entries
    without: list[int] = []
    for place, entry in enumerate(entries):
        links += [(name, ("row", place)) for name in entry.images or (entry.key,)]
        links += [(name, ("file", split_fragment(name)[0])) for name in entry.images]  # slices of a volume
        if by != "image":
            value = as_patient(entry.row.get(by, entry.fields.get(by)))
            if not value:
                without.append(entry.number)
            links.append((entry.key, (by, value)))
    if without:
        raise ValueError(
            f"{number_of(len(without), 'row')} of {table.path} {'has' if len(without) == 1 else 'have'} no {by}, but "
            f"the table is to be split by it: {'row' if len(without) == 1 else 'rows'} {first_few(without, 20)}. "
            "Fill the column (with a value of its own where it is unknown), or divide the table with `medvqa-rl data "
            "split --by image`."
        )
    known = {name for name, _ in links}
    links += [(name, ("equal", names[0])) for names in equal for name in names if name in known]
    components = connected(links)
    smallest: dict[str, str] = {}
    for name, component in components.items():
        smallest[component] = min(name, smallest.get(component, name))
    groups = [smallest[components[entry.key]] for entry in entries]
    sizes = Counter(groups)
    split_of_group = _fill(sizes, {"test": test * len(entries), "val": val * len(entries)}, seed)
    division = Division(
        tuple(entry.row for entry in entries), tuple(split_of_group[group] for group in groups), len(sizes)
    )
    shares = {"train": 1.0, "val": val, "test": test}
    for split, count in division.counts().items():
        if shares[split] and not count:
            other, value = ("", "") if by == "image" else (f" and other values of {by}", f", or a value of {by},")
            raise ValueError(
                f"Rows that share an image or equal pixels{value} stay in one split. The {len(entries):,} rows of "
                f"{table.path} form {number_of(len(sizes), 'such group')}, too few for a {split} split: add rows of "
                f"other images{other}, or divide the table with `medvqa-rl data split` and other --by, --val and "
                "--test."
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
    table: Whole, folder: Path, *, workers: int, progress: Callable[[int, int], None]
) -> tuple[Whole, list[tuple[str, ...]]]:
    """Decode every image of a table.

    Returns:
        The table without the rows whose images cannot be decoded, and groups of image names with equal pixels.
    """
    names = dict.fromkeys(name for entry in table.entries for name in entry.images)
    facts: dict[str, ImageFacts] = {}
    damaged: dict[str, str] = {}
    sources = [FileImage(name, folder) for name in names]
    for done, (source, measured) in enumerate(measure(sources, workers=workers), 1):
        if isinstance(measured, str):
            damaged[source.key] = measured
        else:
            facts[source.key] = measured
        progress(done, len(names))
    bad = {
        entry.number: (next(damaged[name] for name in entry.images if name in damaged), "")
        for entry in table.entries
        if any(name in damaged for name in entry.images)
    }
    return table.without(bad), twins(names, facts)


def output_suffix(path: Path) -> str:
    """The suffix of the table that is written from another one: CSV from spreadsheets, parquet from Arrow."""
    suffix = path.suffix.lower()
    if is_saved(path) or suffix == ".parquet":
        return ".parquet"
    return ".jsonl" if suffix in (".json", ".jsonl") else ".csv"


def write_divided(division: Division, out: Path) -> None:
    """Write the rows with the column ``split``, as CSV, JSON Lines or parquet depending on the suffix.

    Raises:
        ValueError: the suffix is none of these, the file exists, or pyarrow is not installed.
    """
    rows = [{**row, COLUMN: split} for row, split in zip(division.rows, division.splits)]
    write_table(out, rows, list(dict.fromkeys(column for row in rows for column in row)))
