"""Images that come inside archives or tables, put into the cache folder as files. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

MAX_BYTES = 200 * 2**30
"""What archives may unpack to, together: more is damage or malice."""


def unpack_zips(archives: Sequence[Path], cache_dir: Path) -> Path:
    """Unpack archives into one folder of the cache, once; paths that lead out of it are refused.

    Args:
        archives: zip files; named by path, size and time, so changed ones are unpacked anew.
        cache_dir: the cache folder.

    Returns:
        The folder.

    Raises:
        ValueError: an archive is missing, damaged, too large, or holds a path that leaves the folder.
    """
    stamps = []
    for archive in archives:
        if not archive.is_file():
            raise ValueError(f"There is no archive {archive.name!r} in {archive.parent}: download it there.")
        status = archive.stat()
        stamps.append((str(archive.resolve()), status.st_size, status.st_mtime_ns))
    folder = cache_dir / "unpacked" / hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for archive in archives:
            _unpack(archive, temporary)
        if not folder.is_dir():
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.infolist()
            if sum(name.file_size for name in names) > MAX_BYTES:
                raise ValueError(f"{archive} would unpack to more than {MAX_BYTES / 2**30:.0f} GiB: check the file.")
            for name in names:
                if name.filename.startswith("/") or ".." in name.filename.split("/"):
                    raise ValueError(f"{archive} holds the path {name.filename!r}, which leaves its folder: check it.")
            opened.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}): download it again.") from error


_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif"}


def store_image(data: bytes, folder: Path) -> str:
    """Write an image's bytes to a file named by their hash, unless it is there.

    Returns:
        The file's name. Equal images get equal names, whatever row or file they come from.
    """
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".bin")
    name = hashlib.sha256(data).hexdigest()[:32] + suffix
    if not (folder / name).is_file():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as temporary:
            temporary.write(data)
        os.replace(temporary.name, folder / name)
    return name
