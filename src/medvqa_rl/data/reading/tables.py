"""Read and write tables: CSV, Excel, JSON, JSON Lines, parquet and folders of the ``datasets`` library. Imports no
torch.

A damaged row is dropped and reported. A damaged file (no header, not JSON, not parquet) raises ValueError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import write_whole
from medvqa_rl.core.machine import claimed
from medvqa_rl.core.text import printable, shown
from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.sheets import (
    WINDOWS_1252,
    Fields,
    check_columns,
    decode,
    read_csv,
    read_excel,
    refuse_utf16,
)

READABLE = (".csv", ".tsv", ".xlsx", ".jsonl", ".json", ".parquet")
WRITABLE = (".jsonl", ".csv", ".parquet")


# --- reading ------------------------------------------------------------------------------------------------------


def read_table(
    path: Path, report: TableReport, *, required: tuple[str, ...] = (), columns: tuple[str, ...] = ()
) -> Iterator[tuple[int, Fields]]:
    """Yield the rows of a file with their positions, counted from 0. Unreadable rows go to the report.

    Text that is not UTF-8 is read as Windows-1252, row by row, and reported.

    Args:
        path: a file whose suffix is one of ``READABLE``, or ``.txt`` if ``columns`` are given.
        report: collects dropped and repaired rows and the number of rows.
        required: columns that a table with a header must have.
        columns: columns of a ``.txt`` file, which has no header and separates cells by "|".

    Raises:
        ValueError: the file cannot be read; the message names it.
    """
    readers: dict[str, Callable[[Path, TableReport, tuple[str, ...]], Iterator[tuple[int, Fields]]]] = {
        ".csv": read_csv,
        ".tsv": read_csv,
        ".xlsx": read_excel,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if columns:
        readers[".txt"] = lambda path, report, _: _read_txt(path, report, columns)
    reader = _read_saved if is_saved(path) else readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"The table {path} ends in {shown(path.suffix)}: convert it to one of {', '.join(READABLE)}.")
    try:
        for number, fields in reader(path, report, required):
            report.total = max(report.total, number + 1)
            yield number, fields
    except OSError as error:
        raise ValueError(f"The table {path} cannot be read ({error.strerror or error}): check the file.") from error
    report.total = max(report.total, *(issue.row + 1 for issue in report.issues), 0)


def _read_txt(path: Path, report: TableReport, columns: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read lines of cells separated by "|"."""
    for number, (line_number, line, is_windows) in enumerate(_filled_lines(path)):
        report.lines.append(line_number)
        cells = line.rstrip("\r\n").split("|")
        if len(cells) != len(columns):
            report.drop(number, "wrong number of cells", f"line {line_number}: {len(cells)}, not {len(columns)}")
            continue
        if is_windows:
            report.repair(number, WINDOWS_1252, f"line {line_number}")
        yield number, dict(zip(columns, cells))


def _filled_lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield the lines that are not blank: number from 1, text, and whether they are Windows-1252."""
    refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line_number, raw in enumerate(file, start=1):
            line, is_windows = decode(raw)
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
        report.lines.append(line_number)
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
    """Read a list of JSON objects, or an object with one such list in it."""
    refuse_utf16(path)
    text, is_windows = decode(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    try:
        content = _parse_json(text)
    except ValueError as error:
        raise ValueError(f"The file {path} is not JSON ({printable(str(error))}): download it again.") from error
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
        if len(lists) > 1:
            raise ValueError(
                f"The file {path} holds {len(lists)} lists ({printable(', '.join(lists))}): write the one with the "
                "questions to a file of its own."
            )
        if lists:
            ((name, content),) = lists.items()
            report.about = f"the list {shown(name)}"
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
            check_columns(path, list(file.schema_arrow.names), required)
            batches = file.iter_batches(batch_size=256)
            yield from enumerate(fields for batch in batches for fields in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not parquet, or damaged ({printable(str(error))}): download it again.") from error


def is_saved(path: Path) -> bool:
    """Whether a path is a folder written by ``Dataset.save_to_disk`` of the ``datasets`` library."""
    return (path / "state.json").is_file()


def _read_saved(path: Path, report: TableReport, required: tuple[str, ...]) -> Iterator[tuple[int, Fields]]:
    """Read the Arrow files of a folder written by ``Dataset.save_to_disk``."""
    pyarrow = import_pyarrow(path)
    report.about = "saved by datasets"
    number = 0
    try:
        files = _parse_json((path / "state.json").read_text(encoding="utf-8"))["_data_files"]
        names = [Path(file["filename"]).name for file in files]
        for name in names:
            with pyarrow.memory_map(str(path / name)) as source, pyarrow.ipc.open_stream(source) as stream:
                check_columns(path, list(stream.schema.names), required)
                for batch in stream:
                    for start in range(0, batch.num_rows, 256):
                        for fields in batch.slice(start, 256).to_pylist():
                            yield number, fields
                            number += 1
    except (pyarrow.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        if str(path) in str(error) and isinstance(error, ValueError):
            raise
        raise ValueError(
            f"The folder {path} was not written by save_to_disk, or is damaged ({printable(str(error))}): save it "
            "again."
        ) from error


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
            f"{path} is parquet or Arrow, which needs pyarrow: install it with pip install 'medvqa-rl[hub]', or use "
            "JSON Lines or CSV."
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
