"""Read the rows below a header: CSV with any of the usual separators, and Excel workbooks. Imports no torch."""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from medvqa_rl.core.text import printable, shown
from medvqa_rl.data.reading.issues import TableReport

Fields = Mapping[str, Any]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may separate the cells of a CSV file, and its name."""

WINDOWS_1252 = "not UTF-8, read as Windows-1252"

_SEPARATOR_LINE = re.compile(r'"?sep=([,;\t])"?\r?\n?')
"""A first line that declares the separator; Excel hides it."""

_HEAD = 2**18
"""Characters that are looked at to find the separator."""


def check_columns(path: Path, columns: list[str], required: tuple[str, ...]) -> None:
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


def refuse_utf16(path: Path) -> None:
    """Refuse a file that is not UTF-8 or an encoding of one byte per character.

    Raises:
        ValueError: it begins as UTF-16 or UTF-32 do.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start == b"\x00\x00\xfe\xff":
        raise ValueError(f"The table {path} is UTF-16 or UTF-32: save it as UTF-8.")


def decode(text: str) -> tuple[str, bool]:
    """Decode text that was read with surrogate escapes: the text, and whether it is Windows-1252 rather than UTF-8."""
    if text.isascii():
        return text, False
    raw = text.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError:
        return from_windows(raw.decode("latin-1")), True


# --- CSV ----------------------------------------------------------------------------------------------------------


def find_delimiter(head: str) -> str:
    """What separates the cells of a CSV text.

    It must separate the header into two cells or more. Of several, it is the one with which most of the first 50 rows
    have as many cells as the header, then the one with more cells, then the first of ``DELIMITERS``.

    Args:
        head: the beginning of the file, without a line ``sep=``.
    """
    found: list[tuple[float, int, str]] = []
    for delimiter in DELIMITERS:
        counts = list(_cell_counts(head, delimiter))
        if counts and counts[0] > 1:
            body = counts[1:]
            found.append((body.count(counts[0]) / max(1, len(body)), counts[0], delimiter))
    return max(found, key=lambda item: item[:2])[2] if found else ","


def _cell_counts(head: str, delimiter: str) -> Iterator[int]:
    """The number of cells of the first rows; 0 for a row that cannot be read."""
    reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True)
    for _ in range(51):
        try:
            yield len(next(reader))
        except StopIteration:
            return
        except csv.Error:
            yield 0


def _open_csv(path: Path) -> tuple[IO[str], str]:
    """Open a file behind a line ``sep=``, and find its delimiter."""
    file = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        head = file.read(_HEAD)
        line = _SEPARATOR_LINE.match(head)
        file.seek(0)
        if line:
            file.read(line.end())
        return file, line[1] if line else find_delimiter(head)
    except BaseException:
        file.close()
        raise


def read_csv(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read the rows below a header. Quoting is strict, so that a stray quotation mark cannot swallow later rows.

    Raises:
        ValueError: the file is UTF-16, its header cannot be read, or lacks a column.
    """
    refuse_utf16(path)
    file, delimiter = _open_csv(path)
    report.about = f"separated by {DELIMITERS[delimiter]}"
    with file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise ValueError(
                f"The header of {path} is not CSV ({printable(str(error))}): fix its first line."
            ) from error
        header = _filled([decode(name)[0].strip() for name in header])
        if not header or any("\0" in name for name in header):
            raise ValueError(f"The table {path} has no header: its first line must name the columns.")
        check_columns(path, header, required)
        row = 1
        while True:
            line = reader.line_num + 1
            row += 1
            number = len(report.lines)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                report.lines.append(row)
                report.drop(number, "broken quotation or endless cell", f"line {line}: {error}")
                continue
            if not any(map(str.strip, cells)):
                continue  # empty lines are not rows
            report.lines.append(row)
            if len(cells) > len(header):
                cells[len(header) :] = _filled(cells[len(header) :])
            if len(cells) != len(header):
                report.drop(
                    number, "wrong number of cells", f"line {line}: {len(cells)} where the header has {len(header)}"
                )
                continue
            text = "".join(cells)
            if not text.isascii() and decode(text)[1]:
                cells = [decode(cell)[0] for cell in cells]
                report.repair(number, WINDOWS_1252, f"line {line}")
            yield number, dict(zip(header, cells))


def _filled(cells: list[str]) -> list[str]:
    """The cells without the empty ones at the end, which spreadsheets write for columns that were used once."""
    while cells and not cells[-1].strip():
        cells = cells[:-1]
    return cells


# --- Excel --------------------------------------------------------------------------------------------------------

_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, ArithmeticError, LookupError, TypeError),
    *(AttributeError, SyntaxError, NotImplementedError, RuntimeError),
)
"""Raised by openpyxl and below it on files that are no workbooks."""


def read_excel(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read the rows below the header of a workbook's first sheet that is not empty.

    Raises:
        ValueError: openpyxl is not installed, the file is not a workbook, or the header lacks a column.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            f"{path} is an Excel workbook, which needs openpyxl: install it with pip install 'medvqa-rl[excel]', or "
            "save it as CSV."
        ) from error
    header: list[str] = []
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        for sheet in book.worksheets:
            for line, values in enumerate(sheet.iter_rows(values_only=True), start=1):
                if all(value is None or value == "" for value in values):
                    continue
                if not header:
                    header = _filled(["" if value is None else str(value).strip() for value in values])
                    report.about = f"sheet {shown(sheet.title)}"
                    if len(book.worksheets) > 1:
                        report.about += f" of {len(book.worksheets)}"
                    check_columns(path, header, required)
                    continue
                number = len(report.lines)
                report.lines.append(line)
                if any(value is not None for value in values[len(header) :]):
                    report.drop(number, "cell without a header", f"{len(header)} columns have one")
                    continue
                yield number, dict(zip(header, values))
            if header:
                break
        book.close()
    except _DAMAGED as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"{path} is not an Excel workbook, damaged, or protected by a password: save it as .xlsx or CSV again."
        ) from error
    if not header:
        raise ValueError(f"The table {path} is empty: write the names of the columns into its first row.")
