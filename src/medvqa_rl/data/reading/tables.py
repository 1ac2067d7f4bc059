"""Reading tables, whatever is in them: CSV, JSON, JSON Lines and parquet become rows, or a report that names file and
row. Imports no torch.

Damage to a row drops that row; damage to the whole file (no header, no JSON, no parquet) is a ValueError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medvqa_rl.data.reading.issues import RowIssue

Fields = Mapping[str, Any]

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")


@dataclass
class Report:
    """What happened to the rows of one file."""

    file: str
    """The file, relative to the data set's folder."""
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    """Rows of the file, unusable ones included."""

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row cannot be used."""
        self.issues.append(RowIssue(row, self.file, reason, "dropped", _short(detail)))

    def repair(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row was repaired."""
        self.issues.append(RowIssue(row, self.file, reason, "repaired", _short(detail)))


def _short(text: str, most: int = 200) -> str:
    """What can be printed of a value: without control characters and lone surrogates, not endless."""
    if len(text) <= most and text.isprintable():
        return text
    text = text[: most + 1].encode("utf-8", "backslashreplace").decode()
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= most else text[:most] + "..."


def read_table(
    path: Path, report: Report, *, required: tuple[str, ...] = (), columns: tuple[str, ...] = ()
) -> Iterator[tuple[int, Fields]]:
    """The rows of a file by its suffix, with their positions from 0; unreadable rows go to the report.

    Text that is not UTF-8 is read as Latin-1, row by row, and reported.

    Args:
        path: a file that ends in one of ``SUFFIXES``.
        report: gets what is dropped and repaired, and the number of rows.
        required: columns that must be there (CSV and parquet, whose columns are the same for all rows).
        columns: columns of a ``.txt`` file, which has no header and separates them by "|".

    Raises:
        ValueError: the file as a whole cannot be read; the message names it.
    """
    readers: dict[str, Callable[[Path, Report, tuple[str, ...]], Iterator[tuple[int, Fields]]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".txt": lambda path, report, _: _read_txt(path, report, columns),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"The table {path} ends in {path.suffix!r}: convert it to one of {', '.join(SUFFIXES)}.")
    try:
        for number, fields in reader(path, report, required):
            report.total = max(report.total, number + 1)
            yield number, fields
    except OSError as error:
        raise ValueError(f"The table {path} cannot be read ({error.strerror or error}): check the file.") from error
    report.total = max(report.total, *(issue.row + 1 for issue in report.issues), 0)


def _check_columns(path: Path, columns: list[str], required: tuple[str, ...]) -> None:
    """Refuse a table that lacks columns or has one twice."""
    if missing := [name for name in required if name not in columns]:
        raise ValueError(
            f"The table {path} has no column {', '.join(missing)}; it has {_short(', '.join(columns)) or 'none'}: "
            "rename its columns, or set data.path and data.name to what belongs together."
        )
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"The table {path} has the column {_short(', '.join(twice))} twice: rename one of them.")


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        raise ValueError(f"The table {path} is UTF-16 or UTF-32: save it as UTF-8.")


def _utf8(text: str) -> tuple[str, bool]:
    """Text that was decoded with surrogate escapes, and whether it had to be read as Latin-1."""
    if text.isascii():
        return text, False
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return raw.decode("latin-1"), True


LATIN_1 = "not UTF-8, read as Latin-1"


def _read_csv(path: Path, report: Report, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Rows below a header. Quotation is checked, so a stray mark cannot swallow the rows that follow unseen."""
    _refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ValueError(f"The header of {path} is not CSV ({error}): repair its first line.") from error
        header = [_utf8(name)[0].strip() for name in header]
        if not any(header) or any("\0" in name for name in header):
            raise ValueError(f"The table {path} has no header: its first line must name the columns.")
        _check_columns(path, header, required)
        number = -1
        while True:
            line = reader.line_num + 1
            number += 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                report.drop(number, "broken quotation or endless cell", f"line {line}: {error}")
                continue
            if not cells:
                number -= 1  # an empty line is no row
                continue
            if len(cells) != len(header):
                report.drop(
                    number, "wrong number of cells", f"line {line}: {len(cells)} where the header has {len(header)}"
                )
                continue
            row = "".join(cells)
            if not row.isascii() and _utf8(row)[1]:
                cells = [_utf8(cell)[0] for cell in cells]
                report.repair(number, LATIN_1, f"line {line}")
            yield number, dict(zip(header, cells))


def _read_txt(path: Path, report: Report, columns: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Lines of cells between bars; empty lines are no rows."""
    for number, (count, line, is_latin) in enumerate(_filled_lines(path)):
        cells = line.rstrip("\r\n").split("|")
        if len(cells) != len(columns):
            report.drop(number, "wrong number of cells", f"line {count}: {len(cells)}, not {len(columns)}")
            continue
        if is_latin:
            report.repair(number, LATIN_1, f"line {count}")
        yield number, dict(zip(columns, cells))


def _filled_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Lines that hold something: their number from 1, their text, and whether they were read as Latin-1."""
    _refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for count, raw in enumerate(file, start=1):
            line, is_latin = _utf8(raw)
            if line.strip():
                yield count, line, is_latin


def _parse_json(text: str) -> Any:
    """Read JSON.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_jsonl(path: Path, report: Report, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """One JSON object per line; empty lines are no rows."""
    for number, (count, line, is_latin) in enumerate(_filled_lines(path)):
        try:
            fields = _parse_json(line)
        except ValueError as error:
            report.drop(number, "not JSON", f"line {count}: {error}")
            continue
        if not isinstance(fields, dict):
            report.drop(number, "not a JSON object", f"line {count}")
            continue
        if is_latin:
            report.repair(number, LATIN_1, f"line {count}")
        yield number, fields


def _read_json(path: Path, report: Report, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """A list of JSON objects."""
    _refuse_utf16(path)
    text, is_latin = _utf8(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    try:
        content = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"The file {path} is not JSON ({_short(str(error))}): download it again.") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"The file {path} is not a list of questions: check that it is the right file.")
    for number, fields in enumerate(content):
        if not isinstance(fields, dict):
            report.drop(number, "not a JSON object")
            continue
        if is_latin and any(isinstance(value, str) and not value.isascii() for value in fields.values()):
            report.repair(number, LATIN_1)
        yield number, fields


def _read_parquet(path: Path, report: Report, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """The rows of a parquet file, a few hundred in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is parquet, which needs pyarrow: install it with pip install 'medvqa-rl[hub]', or convert the "
            "file to JSON Lines or CSV."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, list(file.schema_arrow.names), required)
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    yield number, fields
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not parquet, or damaged ({_short(str(error))}): download it again.") from error
