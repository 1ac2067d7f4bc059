"""Unpack images from archives and tables into the cache folder. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.core.files import NO_ROOM, remove_partials, temporary_folder, write_whole
from medvqa_rl.core.text import printable, shown

MAX_BYTES = 200 * 2**30
"""Largest unpacked size of an archive; a larger one is damaged or malicious."""


_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError, EOFError),
    UnicodeDecodeError,  # a name that is marked as UTF-8 and is not
)


def unpack_zips(archives: Sequence[Path], cache_dir: Path) -> Path:
    """Unpack archives into one folder of the cache, unless they are unpacked there already.

    Args:
        archives: zip files; they are unpacked again if a path, size or time changes.
        cache_dir: the cache folder.

    Returns:
        The folder.

    Raises:
        ValueError: an archive is missing, damaged or too large, contains a path that leaves the folder, or there is no
            room to unpack it.
    """
    stamps = []
    for archive in archives:
        if not archive.is_file():
            raise ValueError(f"There is no archive {shown(archive.name)} in {archive.parent}: download it there.")
        status = archive.stat()
        stamps.append((str(archive.resolve()), status.st_size, status.st_mtime_ns))
    folder = cache_dir / "unpacked" / hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    if folder.is_dir():
        remove_partials(folder.parent, below=False)
        return folder
    with temporary_folder(folder) as temporary:
        for archive in archives:
            _unpack(archive, temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise ValueError(f"{archive} would unpack to more than {MAX_BYTES / 2**30:.0f} GiB: check the file.")
            for member in members:
                if not member.filename.strip("/."):
                    raise ValueError(f"{archive} contains an entry without a name: make the archive again without it.")
                if member.filename.startswith("/") or ".." in member.filename.split("/"):
                    raise ValueError(
                        f"{archive} contains the path {shown(member.filename)}, which leaves its folder: check "
                        "the file."
                    )
            opened.extractall(folder)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            why = printable(str(error.strerror))
            raise ValueError(
                f"{archive} cannot be unpacked in {folder.parent} ({why}): make room there, or set data.cache_dir "
                "to a folder elsewhere."
            ) from error
        raise ValueError(f"{archive} cannot be unpacked ({printable(str(error))}): download it again.") from error


_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif"}


def unpacked_images(cache_dir: Path, name: str) -> Path:
    """The folder of a data set's images that its tables hold; it is created.

    Raises:
        ValueError: it cannot be created.
    """
    folder = cache_dir / "images" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder {folder} for unpacked images cannot be created ({error}): set data.cache_dir to a writable "
            "folder."
        ) from error
    return folder


def store_image(data: bytes, folder: Path) -> str:
    """Write the bytes of an image to a file named by their hash, unless it exists.

    Returns:
        The file's name, which is the same for equal images.
    """
    name = name_of(data)
    if not (folder / name).is_file():
        with write_whole(folder / name, durable=False) as partial:
            partial.write_bytes(data)
    return name


def name_of(data: bytes) -> str:
    """The name of the file for the bytes of an image: their hash and the suffix of their format."""
    suffix = next((suffix for start, suffix in _SUFFIXES.items() if data.startswith(start)), ".bin")
    return hashlib.sha256(data).hexdigest()[:32] + suffix
