"""An index on disk of what reading a large table found, so that the second load need not read it again. No torch.

An index holds rows and reports as JSON columns. It is used only as long as nothing has changed that it depends on:
the table's path, size and time, the folders of its images, and the code that reads rows. One file per table and way
of reading it, written atomically; anything odd about it means that the table is read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from medvqa_rl.data.folder import ImageFolder, stamp
from medvqa_rl.data.issues import RowIssue
from medvqa_rl.data.rows import Reading, Row

SMALLEST = 4 * 2**20
"""Tables below this size in bytes are read every time: that is as quick."""

log = logging.getLogger(__name__)


def cache_folder(given: str | None) -> Path:
    """``data.cache_dir``, or ``medvqa-rl`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medvqa-rl"


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
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _save(file: Path, header: dict[str, Any], reading: Reading) -> None:
    text = json.dumps(
        {
            **header,
            "total": reading.total,
            "left_out": reading.left_out,
            "rows": list(zip(*reading.rows)),
            "issues": list(zip(*reading.issues)),
        },
        separators=(",", ":"),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as temporary:
            temporary.write(text)
        os.replace(temporary.name, file)
    except OSError as error:
        log.warning("The index %s cannot be written (%s): the next load reads the table again.", file, error)


def _load(file: Path, source: list[int], images: Path) -> Reading | None:
    """The rows of an index; None where there is none, or it is not of what is on disk now."""
    try:
        content = json.loads(file.read_bytes())
        if content["source"] != source:
            return None
        if any(stamp(images / folder) != time for folder, time in content["folders"].items()):
            return None
        rows, issues = content["rows"], content["issues"]
        if rows:
            # Tuples become lists in JSON: options and images, the fields 4 and 5 of a row.
            rows[4], rows[5] = map(tuple, rows[4]), map(tuple, rows[5])
        return Reading(
            list(map(Row._make, zip(*rows, strict=False))),
            list(map(RowIssue._make, zip(*issues))),
            int(content["total"]),
            Counter(content["left_out"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent, or damaged: the table is read again
