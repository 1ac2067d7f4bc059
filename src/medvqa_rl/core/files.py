"""Files that are written whole or not at all, and the folder of caches. Imports no torch."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def write_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block ends.

    Readers see the old file or the new one, never a part. If the block raises, the temporary file is removed and
    ``path`` stays as it was. Several processes may write the same path; the last one wins.

    Args:
        path: the file; its folder is created.
        durable: flush the content to disk before renaming, so that it survives a power failure. Turn it off for many
            small files that can be made again.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, errors: str = "strict") -> Path:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        errors: ``replace`` writes ``?`` for lone surrogates, which some data sets contain.
    """
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write a value as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Force the content of a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(given: str | None) -> Path:
    """``data.cache_dir``, or ``medvqa-rl`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medvqa-rl"
