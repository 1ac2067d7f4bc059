"""Turn the fields of a table row into a question, or say why the row is unusable. Imports no torch."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.issues import RowIssue, TableReport
from medvqa_rl.data.reading.sheets import Fields, from_windows
from medvqa_rl.data.reading.tables import read_table

MAX_TEXT = 20_000
"""Most characters of a question, option or answer; a longer text is damage."""


class Unusable(Exception):
    """Raised by a parser to drop a row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


Repairs = dict[str, str]
"""What was repaired in a row -> the original value."""


class Row(NamedTuple):
    """A usable row. Image paths are relative, so that it is the same on every machine."""

    id: str
    question: str
    answer: str
    answer_type: AnswerType
    options: tuple[str, ...]
    images: tuple[str, ...]
    """Paths relative to the image folder."""
    cluster: str
    """Rows of one cluster must share a split: the same image, article, case or patient."""
    split: str
    """The official split."""
    groups: dict[str, str]
    reasoning: str = ""
    description: str = ""
    patient: str = ""
    columns: dict[str, Any] = {}
    """The columns of the table that the package does not read, as JSON values."""
    alternatives: tuple[str, ...] = ()
    """Further answers that are as correct."""


@dataclass
class Reading:
    """The usable rows of one or more files, and the issues of all rows."""

    rows: list[Row] = field(default_factory=list)
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    """Number of rows read, including dropped ones."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that belong to another data set in the same file, by reason; not included in ``total``."""
    about: list[str] = field(default_factory=list)
    """A sentence for each of the user's own files: what it was recognised as."""

    def extend(self, other: Reading) -> None:
        """Append the rows and issues of another file."""
        self.rows += other.rows
        self.issues += other.issues
        self.total += other.total
        self.left_out += other.left_out
        self.about += other.about


Parse = Callable[[int, Fields, Repairs], Row]
"""Parses one row, given its position and fields; raises Unusable to drop it."""


def read_rows(
    path: Path,
    parse: Parse,
    *,
    file: str = "",
    id_column: str = "id",
    required: tuple[str, ...] = (),
    columns: tuple[str, ...] = (),
    known: Collection[str] = (),
    keep_repeated: bool = False,
    prepare: Callable[[Fields], Fields] = lambda fields: fields,
    report: TableReport | None = None,
) -> Reading:
    """Read and parse every row of a table.

    A row is dropped if its id, or its content (images, question, options, answer and split), repeats an earlier one.

    Args:
        path: the table.
        parse: parses one row.
        file: the file's name in issues; defaults to the name of ``path``.
        id_column: the column of ids, named in issues.
        required: columns that a CSV or parquet table must have.
        columns: columns of a ``.txt`` file, which has no header.
        known: columns that ``parse`` reads; the others become :attr:`Row.columns`.
        keep_repeated: keep rows with repeated content.
        prepare: brings the fields of a row into the form that ``parse`` reads; raises Unusable to drop the row.
        report: collects the issues; a new one by default.

    Raises:
        ValueError: the table cannot be read.
    """
    report = report or TableReport(file or path.name)
    rows: list[Row] = []
    ids: set[str] = set()
    contents: dict[Hashable, int] = {}
    for number, fields in read_table(path, report, required=required, columns=columns):
        repairs: Repairs = {}
        try:
            fields = prepare(fields)
            row = parse(number, fields, repairs)
            if row.id in ids:
                raise Unusable(f"repeated {id_column}", row.id)
            ids.add(row.id)
            content = (row.images, row.question, row.options, row.answer, row.alternatives, row.split)
            first = contents.setdefault(content, number)
            if first != number and not keep_repeated:
                raise Unusable("repeated row", f"the same as row {report.number(first)}")
            if others := _other_columns(fields, known):
                row = row._replace(columns=others)
        except Unusable as problem:
            report.drop(number, problem.reason, problem.detail)
            continue
        rows.append(row)
        for reason, original in repairs.items():
            report.repair(number, reason, original)
    return Reading(rows, report.issues, report.total)


def _other_columns(fields: Fields, known: Collection[str]) -> dict[str, Any]:
    """The columns that are not known, as JSON values; those of bytes are left out.

    Raises:
        Unusable: a value is nested too deeply.
    """
    others = [name for name in fields if name and name not in known and not isinstance(fields[name], bytes)]
    try:
        return {sys.intern(name): _json_value(fields[name]) for name in others}
    except RecursionError:
        raise Unusable("nested too deeply", ", ".join(others)) from None


def _json_value(value: Any) -> Any:
    """A cell as a JSON value: missing ones are None, and what JSON does not have, such as dates, is text."""
    if is_missing(value) or isinstance(value, bytes):
        return None
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _json_value(item) for name, item in value.items()}
    return str(value)


def is_missing(value: Any) -> bool:
    """Whether a field has no value: null, or the NaN that spreadsheets and parquet use for an empty cell."""
    return value is None or (isinstance(value, float) and value != value)


def required_text(fields: Fields, name: str, repairs: Repairs) -> str:
    """Return the text of a field with white space collapsed.

    Raises:
        Unusable: the field is missing, empty or not valid text (see :func:`clean_text`).
    """
    text = optional_text(fields, name, repairs)
    if not text:
        raise Unusable(f"{'no' if is_missing(fields.get(name)) else 'empty'} {name}")
    return text


def optional_text(fields: Fields, name: str, repairs: Repairs) -> str:
    """Return the text of a field with white space collapsed, or "" if the field is missing.

    Raises:
        Unusable: the field is not valid text (see :func:`clean_text`).
    """
    value = fields.get(name)
    return "" if is_missing(value) else clean_text(value, name, repairs)


def read_groups(fields: Fields, columns: Mapping[str, str], repairs: Repairs) -> dict[str, str]:
    """Return the groups of a row, without those that are empty.

    Args:
        columns: group -> column.

    Raises:
        Unusable: a field is not valid text (see :func:`clean_text`).
    """
    texts = {group: optional_text(fields, column, repairs) for group, column in columns.items()}
    return {group: text for group, text in texts.items() if text}


def clean_text(value: Any, name: str, repairs: Repairs) -> str:
    """Return a value as text with white space collapsed; numbers are converted, whole ones without ".0".

    C1 control characters, which no text contains, are what is left of UTF-8 or Windows-1252 read as Latin-1: they are
    replaced by what they stand for.

    Args:
        name: name of the field, for the reason.

    Raises:
        Unusable: the value is neither text nor a number, is longer than ``MAX_TEXT``, or contains NUL or a lone
            surrogate.
    """
    if isinstance(value, bool | int | float):
        is_boolean = isinstance(value, bool)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # pandas makes a column of whole numbers with an empty cell one of floats
        try:
            value = str(value)
        except ValueError:  # an integer of thousands of digits
            raise Unusable(f"{name} is too long") from None
        kind = "true or false" if is_boolean else "number"
        repairs[f"{kind} in place of text"] = f"{name}: {value}"
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", f"a {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise Unusable(f"{name} is too long", f"{len(value):,} characters, but at most {MAX_TEXT:,} are read")
    if "\0" in value:
        raise Unusable(f"NUL character in {name}", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unusable(f"half a character in {name}", value) from None
        if _C1.search(value):
            repairs["control characters of a wrong decoding"] = value
            value = _decoded_again(value)
    return " ".join(value.split())


_C1 = re.compile("[\x80-\x9f]")


def _decoded_again(text: str) -> str:
    """Decode text again that was read as Latin-1: as UTF-8 if it is that, else as Windows-1252."""
    try:
        return text.encode("latin-1").decode()
    except ValueError:
        return from_windows(text)


def without_point_zero(text: str) -> str:
    """A whole number without the ".0" that pandas writes if its column has an empty cell; other texts as they are."""
    number = text.removesuffix(".0")
    return number if number.removeprefix("-").isdecimal() else text


def distinct(alternatives: Iterable[str], answer: str) -> tuple[str, ...]:
    """The further answers that differ from the answer and from each other once normalised."""
    texts: dict[str, str] = {}
    for text in (answer, *alternatives):
        texts.setdefault(normalise(text), text)
    return tuple(texts.values())[1:]


def find_images(names: Sequence[str], folder: ImageFolder, repairs: Repairs) -> tuple[str, ...]:
    """Return the paths of a row's images relative to the folder, as they are on disk.

    Raises:
        Unusable: an image is missing or empty, or its path leaves the folder.
    """
    paths = []
    for name in names:
        file, fragment = split_fragment(name)
        path, problem = folder.find(file)
        if problem:
            raise Unusable(problem, name)
        if path != file:
            is_same = normalize("NFC", path) == normalize("NFC", file)
            repairs["image name in another Unicode form" if is_same else "image name without folder or suffix"] = name
        paths.append(path if fragment is None else f"{path}#{fragment}")
    return tuple(paths)
