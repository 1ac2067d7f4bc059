"""An index on disk of what reading a large table found, so that the second load need not read it again. No torch.

An index is a line of JSON with the report, then one column of the rows after the other, a value per line: cleaned
texts hold no line breaks, and nothing splits faster. It is used only as long as nothing has changed that it depends
on: the table's path, size and time, the folders of its images, and the code that reads rows. One file per table and
way of reading it, written atomically; anything odd about it means that the table is read again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.reading.folder import ImageFolder, stamp
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.reading.rows import Reading, Row

SMALLEST = 4 * 2**20
"""Tables below this size in bytes are read every time: that is as quick."""

TEXTS = ("id", "question", "answer", "answer_type", "together", "place", "reasoning", "description")
LISTS = ("options", "images")
"""Fields of a row that are one text, and those that are several, between tabs."""

log = logging.getLogger(__name__)


def read_indexed(
    path: Path,
    folder: ImageFolder,
    recipe: str,
    read: Callable[[], Reading],
    cache_dir: Path,
    *,
    is_shared: bool = False,
) -> Reading:
    """What ``read`` finds in a table, from the index where there is a valid one.

    Args:
        path: the table.
        folder: where its images are looked up; the folders that reading listed become part of the index.
        recipe: says how the table is read, apart from the code: the data set's name and its settings.
        read: reads the table.
        cache_dir: the folder of the indexes. Where it cannot be written, a warning is logged and nothing is kept.
        is_shared: reading other tables adds to the folder, so images are looked up instead of the folder's time.

    Raises:
        ValueError: from ``read``.
    """
    try:
        status = path.stat()
    except OSError:
        return read()
    if status.st_size < SMALLEST:
        return read()
    address = repr((recipe, str(path.resolve()), str(folder.root), _code_hash()))
    file = cache_dir / "index" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"
    source = [status.st_size, status.st_mtime_ns]
    reading = _load(file, source, folder.root)
    if (
        reading is not None
        and is_shared
        and any(folder.find(image)[1] for row in reading.rows for image in row.images)
    ):
        reading = None
    if reading is not None:
        return reading
    reading = read()
    _save(file, {"source": source, "folders": {} if is_shared else folder.stamps()}, reading)
    return reading


@cache
def _code_hash() -> str:
    """Of the modules that read rows: an index made by other code is not used."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for file in sorted([*(package / "data").rglob("*.py"), *(package / "core").glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _save(file: Path, header: dict[str, Any], reading: Reading) -> None:
    row_groups = [json.dumps(row.groups) for row in reading.rows]
    kinds = list(dict.fromkeys(row_groups))
    numbers = {kind: str(index) for index, kind in enumerate(kinds)}
    issues: dict[tuple[str, str, str], dict[str, list[Any]]] = {}
    for issue in reading.issues:
        found = issues.setdefault((issue.file, issue.reason, issue.action), {"rows": [], "details": []})
        found["rows"].append(issue.row)
        found["details"].append(issue.detail)
    header = {
        **header,
        "total": reading.total,
        "left_out": reading.left_out,
        "num_rows": len(reading.rows),
        "groups": [json.loads(kind) for kind in kinds],
        "issues": [
            [*key, found["rows"], found["details"] if any(found["details"]) else None] for key, found in issues.items()
        ],
    }
    columns: list[Iterable[str]] = [
        *([getattr(row, name) for row in reading.rows] for name in TEXTS),
        *(["\t".join(getattr(row, name)) for row in reading.rows] for name in LISTS),
        [numbers[groups] for groups in row_groups],
    ]
    lines = itertools.chain([json.dumps(header, separators=(",", ":"))], *columns)
    text = "\n".join(lines)
    if text.count("\n") != len(columns) * len(reading.rows):
        return  # a line break inside a text would shift the others: such a table is read every time
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=file.parent, delete=False) as temporary:
            temporary.write(text.encode())
        os.replace(temporary.name, file)
    except OSError as error:
        log.warning("The index %s cannot be written (%s): the next load reads the table again.", file, error)


def _load(file: Path, source: list[int], images: Path) -> Reading | None:
    """The rows of an index; None where there is none, or it is not of what is on disk now."""
    try:
        lines = file.read_bytes().decode().split("\n")
        header = json.loads(lines[0])
        if header["source"] != source:
            return None
        if any(stamp(images / folder) != time for folder, time in header["folders"].items()):
            return None
        count = header["num_rows"]
        if len(lines) != 1 + (len(TEXTS) + len(LISTS) + 1) * count:
            return None
        columns = [lines[start : start + count] for start in range(1, len(lines), count)] if count else []
        rows = []
        if columns:
            texts = dict(zip(TEXTS, columns))
            options, pictures = (
                [tuple(cell.split("\t")) if cell else () for cell in cells] for cells in columns[-3:-1]
            )
            kinds = header["groups"]
            rows = list(
                map(
                    Row,
                    texts["id"],
                    texts["question"],
                    texts["answer"],
                    cast("list[AnswerType]", texts["answer_type"]),
                    options,
                    pictures,
                    texts["together"],
                    texts["place"],
                    [kinds[int(kind)] for kind in columns[-1]],
                    texts["reasoning"],
                    texts["description"],
                )
            )
        issues = [
            RowIssue(row, name, reason, action, detail)
            for name, reason, action, numbers, details in header["issues"]
            for row, detail in zip(numbers, details or itertools.repeat(""))
        ]
        issues.sort(key=itemgetter(0))
        return Reading(rows, issues, int(header["total"]), Counter(header["left_out"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None  # absent, or damaged: the table is read again
