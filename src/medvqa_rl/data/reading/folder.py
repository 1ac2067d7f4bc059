"""The folder that holds the images of a data set. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

OUTSIDE = "image path leaves the folder"
MISSING = "missing image"
EMPTY = "empty image file"
SEVERAL = "image name fits several files"

_SUFFIXES = re.compile(
    r"\.(?:png|jpe?g|bmp|gif|tiff?|webp|p[gnp]m|jp2|(?:dcm|dicom|ima|nii)(?:\.gz)?)$", re.IGNORECASE
)
"""The suffix of an image file."""


class ImageFolder:
    """Looks up image names. Lists each folder once: 200,000 separate look-ups are slow on a network disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.given = root.absolute()
        """The folder as it was named, which may be a link."""
        self._listings: dict[str, dict[str, tuple[str, str]]] = {}
        """Folder below root ("" for root) -> name in NFC -> (name on disk, problem or "")."""
        self._found: dict[str, tuple[str, str]] = {}
        self._stems: dict[str, dict[str, list[tuple[str, str]]]] = {}
        """Folder below root -> name without suffix -> the files."""

    def find(self, name: str) -> tuple[str, str]:
        """Look up an image by the name in the data set.

        Names are compared in Unicode's composed form (NFC), because archives packed on a Mac hold decomposed names.
        A path may have back slashes, begin with the folder's own name or be absolute inside the folder, and a file
        may be named without its suffix.

        Returns:
            The path on disk relative to the folder, and the problem: ``OUTSIDE``, ``MISSING``, ``EMPTY``, ``SEVERAL``
            or "".
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> tuple[str, str]:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if name.startswith(("/", "\\")):
            inside = [folder.parts[1:] for folder in (self.root, self.given)]
            mine = next((folder for folder in inside if (*parts[: len(folder)],) == folder), None)
            if mine is None:
                return name, OUTSIDE
            parts = parts[len(mine) :]
        if "\0" in name or ".." in parts or re.match("[A-Za-z]:", name):
            return name, OUTSIDE
        path, problem = self._walk(parts)
        for count in range(1, len(parts)):
            if problem != MISSING:
                break
            if any((*parts[:count],) == folder.parts[-count:] for folder in (self.root, self.given)):
                path, problem = self._walk(parts[count:])
        return path or name, problem

    def _walk(self, parts: Sequence[str]) -> tuple[str, str]:
        """Follow the parts of a path: the path on disk, empty if it is missing, and the problem."""
        path, problem = "", MISSING
        for place, part in enumerate(parts, start=1):
            listing = self._listing(path)
            actual, problem = listing.get(normalize("NFC", part), ("", MISSING))
            if not actual and place == len(parts):
                actual, problem = self._without_suffix(path, part)
            if not actual or problem == OUTSIDE:
                return "", problem
            path = f"{path}/{actual}" if path else actual
        return path, problem

    def _without_suffix(self, folder: str, name: str) -> tuple[str, str]:
        """The one file of a folder whose name without suffix is ``name``."""
        if folder not in self._stems:
            stems: dict[str, list[tuple[str, str]]] = {}
            for known, entry in self._listing(folder).items():
                if entry[1] != MISSING:  # no folder
                    stems.setdefault(_SUFFIXES.sub("", known), []).append(entry)
            self._stems[folder] = stems
        found = self._stems[folder].get(normalize("NFC", name), [])
        return found[0] if len(found) == 1 else ("", SEVERAL if found else MISSING)

    def _listing(self, folder: str) -> dict[str, tuple[str, str]]:
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def _list(self, folder: str) -> dict[str, tuple[str, str]]:
        try:
            with os.scandir(self.root / folder) as entries:
                in_order = sorted(entries, key=lambda entry: entry.name)
                return {normalize("NFC", entry.name): (entry.name, self._problem(entry)) for entry in in_order}
        except OSError:
            return {}  # not a folder, so its files are missing

    def _problem(self, entry: os.DirEntry[str]) -> str:
        try:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.root):
                return OUTSIDE
            if entry.is_dir():
                return MISSING  # not an image, but may be part of a path
            return "" if entry.stat().st_size else EMPTY
        except (OSError, RuntimeError):
            return MISSING  # a dangling or circular link

    def modification_times(self) -> dict[str, int]:
        """Map each listed folder to its modification time (see :func:`modification_time`)."""
        return {folder: modification_time(self.root / folder) for folder in sorted(self._listings)}


def modification_time(folder: Path) -> int:
    """When a file was last added to or removed from a folder, in nanoseconds; -1 if the folder does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return -1
