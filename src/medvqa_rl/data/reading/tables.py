"""Read and write tables in CSV, JSON, JSON Lines and parquet. Imports no torch.

A damaged row is dropped and reported. A damaged file (no header, not JSON, not parquet) raises ValueError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import write_whole
from medvqa_rl.core.machine import claimed
from medvqa_rl.core.text import printable, shown
from medvqa_rl.data.reading.issues import RowIssue

Fields = Mapping[str, Any]

READABLE = (".csv", ".jsonl", ".json", ".parquet")
WRITABLE = (".jsonl", ".csv", ".parquet")

WINDOWS_1252 = "not UTF-8, read as Windows-1252"


@dataclass
class TableReport:
    """Collects the issues of one file."""

    file: str
    """The file, relative to the data set's folder."""
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    """Number of rows, including unusable ones."""

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row was dropped."""
        self.issues.append(RowIssue(row, self.file, reason, "dropped", printable(detail)))

    def repair(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row was repaired."""
        self.issues.append(RowIssue(row, self.file, reason, "repaired", printable(detail)))


# --- reading ------------------------------------------------------------------------------------------------------


def read_table(
    path: Path, report: TableReport, *, required: tuple[str, ...] = (), columns: tuple[str, ...] = ()
) -> Iterator[tuple[int, Fields]]:
    """Yield the rows of a file with their positions, counted from 0. Unreadable rows go to the report.

    Text that is not UTF-8 is read as Windows-1252, row by row, and reported.

    Args:
        path: a file whose suffix is one of ``READABLE``, or ``.txt`` if ``columns`` are given.
        report: collects dropped and repaired rows and the number of rows.
        required: columns that a CSV or parquet file must have.
        columns: columns of a ``.txt`` file, which has no header and separates cells by "|".

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    readers: dict[str, Callable[[Path, TableReport, tuple[str, ...]], Iterator[tuple[int, Fields]]]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if columns:
        readers[".txt"] = lambda path, report, _: _read_txt(path, report, columns)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"The table {path} ends in {shown(path.suffix)}: convert it to one of {', '.join(READABLE)}.")
    try:
        for number, fields in reader(path, report, required):
            report.total = max(report.total, number + 1)
            yield number, fields
    except OSError as error:
        raise ValueError(f"The table {path} cannot be read ({error.strerror or error}): check the file.") from error
    report.total = max(report.total, *(issue.row + 1 for issue in report.issues), 0)


def _check_columns(path: Path, columns: list[str], required: tuple[str, ...]) -> None:
    """Refuse a table with missing or duplicate columns."""
    if missing := [name for name in required if name not in columns]:
        raise ValueError(
            f"The table {path} has no column {', '.join(missing)}; it has {printable(', '.join(columns)) or 'none'}: "
            "rename its columns, or check that data.path and data.name belong together."
        )
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(
            f"The table {path} has the column {printable(', '.join(repeated))} twice: rename one of them."
        )


_FROM_LATIN_1 = {
    code: character
    for code in range(0x80, 0xA0)
    if (character := bytes([code]).decode("cp1252", "ignore"))  # five bytes of Windows-1252 mean nothing
}


def from_windows(text: str) -> str:
    """Replace the C1 control characters of Windows-1252 text that was read as Latin-1 by what they stand for."""
    return text.translate(_FROM_LATIN_1)


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        raise ValueError(f"The table {path} is UTF-16 or UTF-32: save it as UTF-8.")


def _decode(text: str) -> tuple[str, bool]:
    """Decode text that was read with surrogate escapes: the text, and whether it is Windows-1252 rather than UTF-8."""
    if text.isascii():
        return text, False
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return from_windows(raw.decode("latin-1")), True


def _read_csv(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read the rows below a header. Quoting is strict, so that a stray quotation mark cannot swallow later rows."""
    _refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ValueError(
                f"The header of {path} is not CSV ({printable(str(error))}): fix its first line."
            ) from error
        header = [_decode(name)[0].strip() for name in header]
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
                number -= 1  # empty lines are not rows
                continue
            if len(cells) != len(header):
                report.drop(
                    number, "wrong number of cells", f"line {line}: {len(cells)} where the header has {len(header)}"
                )
                continue
            row = "".join(cells)
            if not row.isascii() and _decode(row)[1]:
                cells = [_decode(cell)[0] for cell in cells]
                report.repair(number, WINDOWS_1252, f"line {line}")
            yield number, dict(zip(header, cells))


def _read_txt(path: Path, report: TableReport, columns: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read lines of cells separated by "|"."""
    for number, (line_number, line, is_windows) in enumerate(_filled_lines(path)):
        cells = line.rstrip("\r\n").split("|")
        if len(cells) != len(columns):
            report.drop(number, "wrong number of cells", f"line {line_number}: {len(cells)}, not {len(columns)}")
            continue
        if is_windows:
            report.repair(number, WINDOWS_1252, f"line {line_number}")
        yield number, dict(zip(columns, cells))


def _filled_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the lines that are not blank: number from 1, text, and whether they are Windows-1252."""
    _refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line_number, raw in enumerate(file, start=1):
            line, is_windows = _decode(raw)
            if line.strip():
                yield line_number, line, is_windows


def _parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _read_jsonl(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read one JSON object per line."""
    for number, (line_number, line, is_windows) in enumerate(_filled_lines(path)):
        try:
            fields = _parse_json(line)
        except ValueError as error:
            report.drop(number, "not JSON", f"line {line_number}: {error}")
            continue
        if not isinstance(fields, dict):
            report.drop(number, "not a JSON object", f"line {line_number}")
            continue
        if is_windows:
            report.repair(number, WINDOWS_1252, f"line {line_number}")
        yield number, fields


def _read_json(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read a list of JSON objects."""
    _refuse_utf16(path)
    text, is_windows = _decode(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    try:
        content = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"The file {path} is not JSON ({printable(str(error))}): download it again.") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"The file {path} is not a list of questions: check that it is the right file.")
    for number, fields in enumerate(content):
        if not isinstance(fields, dict):
            report.drop(number, "not a JSON object")
            continue
        if is_windows and any(isinstance(value, str) and not value.isascii() for value in fields.values()):
            report.repair(number, WINDOWS_1252)
        yield number, fields


def _read_parquet(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read a parquet file in batches of 256 rows."""
    pyarrow = import_pyarrow(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, list(file.schema_arrow.names), required)
            batches = file.iter_batches(batch_size=256)
            yield from enumerate(fields for batch in batches for fields in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not parquet, or damaged ({printable(str(error))}): download it again.") from error


def import_pyarrow(path: Path) -> Any:
    """Import pyarrow to read or write a file.

    Raises:
        ValueError: pyarrow is not installed; the message names the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is parquet, which needs pyarrow: install it with pip install 'medvqa-rl[hub]', or use JSON Lines "
            "or CSV."
        ) from error
    return pyarrow


# --- writing ------------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: Iterable[Fields], columns: Sequence[str] = (), schema: Any = None) -> None:
    """Write a table whole or not at all, in the format of its suffix. Values of CSV cells that are lists become JSON.

    Args:
        path: a new file whose suffix is one of ``WRITABLE``.
        rows: the rows; a generator is consumed while writing.
        columns: columns of a CSV file.
        schema: pyarrow schema of a parquet file, which is then written in batches; inferred from all rows by default.

    Raises:
        ValueError: the file exists, its suffix is not supported, or pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise ValueError(
            f"The file {path} ends in {shown(path.suffix)}: end its name in one of {', '.join(WRITABLE)}."
        )
    pyarrow: Any = import_pyarrow(path) if suffix == ".parquet" else None
    with claimed(path), write_whole(path) as partial:
        if path.exists():
            raise ValueError(f"The file {path} already exists: choose another with --output, or move it away.")
        if suffix == ".jsonl":
            with partial.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        elif suffix == ".csv":
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        elif schema is None:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
        else:
            with pyarrow.parquet.ParquetWriter(partial, schema) as batches:
                remaining = iter(rows)
                while batch := list(islice(remaining, 64)):
                    batches.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
