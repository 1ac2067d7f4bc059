"""Cache the parsed rows of a large table, so that the next load does not parse it again. Imports no torch.

An index is one JSON file in the cache folder that holds the rows column by column. It is valid as long as the table
(path, size and time), the image folders and the code that parses rows are unchanged. If it is outdated or damaged, the
table is read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import write_whole
from medvqa_rl.data.reading.folder import ImageFolder, modification_time
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.reading.rows import Reading, Row

MIN_BYTES = 4 * 2**20
"""Smaller tables have no index: parsing them is fast."""

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
    """Return the rows of a table from its index, or read the table and write the index.

    Args:
        path: the table.
        folder: the folder of its images.
        recipe: identifies how the table is read, besides the code: name of the data set and its settings.
        read: reads the table.
        cache_dir: the cache folder. If it is not writable, a warning is logged and no index is written.
        is_shared: whether reading other tables adds images to the folder, so that its modification time proves
            nothing; the images of each row are looked up instead.

    Raises:
        ValueError: raised by ``read``.
    """
    try:
        status = path.stat()
    except OSError:
        return read()
    if status.st_size < MIN_BYTES:
        return read()
    address = repr((recipe, str(path.resolve()), str(folder.root), _code_hash()))
    file = cache_dir / "index" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"
    version = [status.st_size, status.st_mtime_ns]
    reading = _load(file, version, folder.root)
    if reading is not None and not (is_shared and _misses_images(reading, folder)):
        return reading
    reading = read()
    _save(file, version, {} if is_shared else folder.modification_times(), reading)
    return reading


def _misses_images(reading: Reading, folder: ImageFolder) -> bool:
    return any(folder.find(image)[1] for row in reading.rows for image in row.images)


@cache
def _code_hash() -> str:
    """SHA-256 of the modules that decide what a row becomes."""
    digest = hashlib.sha256()
    for file in code_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def code_files() -> list[Path]:
    """The modules that decide what a row becomes: all of ``data`` and ``core``."""
    package = Path(__file__).parents[2]
    return sorted([*(package / "data").rglob("*.py"), *(package / "core").rglob("*.py")])


def _save(file: Path, version: list[int], folders: dict[str, int], reading: Reading) -> None:
    content = {
        "version": version,
        "folders": folders,
        "total": reading.total,
        "left_out": reading.left_out,
        "about": reading.about,
        "rows": list(zip(*reading.rows)),
        "issues": list(zip(*reading.issues)),
    }
    try:
        data = json.dumps(content).encode()
        with write_whole(file, durable=False) as partial:
            partial.write_bytes(f"{hashlib.sha256(data).hexdigest()}\n".encode() + data)
    except OSError as error:
        log.warning("The index %s cannot be written (%s): the next load reads the table again.", file, error)


def _load(file: Path, version: list[int], images: Path) -> Reading | None:
    """Read an index; None if it is missing, outdated or damaged."""
    try:
        digest, _, data = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if digest != hashlib.sha256(data).hexdigest().encode():  # damaged, or of an older version
        return None
    content: dict[str, Any] = json.loads(data)
    if content["version"] != version:
        return None
    if any(modification_time(images / folder) != time for folder, time in content["folders"].items()):
        return None
    columns = dict(zip(Row._fields, content["rows"]))
    for name in ("options", "images", "alternatives"):  # JSON has no tuples
        columns[name] = map(tuple, columns.get(name, ()))
    return Reading(
        [Row(*cells) for cells in zip(*columns.values())],
        [RowIssue(*values) for values in zip(*content["issues"])],
        content["total"],
        Counter(content["left_out"]),
        content["about"],
    )
