"""The folder that holds the images of a data set. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from unicodedata import normalize

OUTSIDE = "image path leaves the folder"
MISSING = "missing image"
EMPTY = "empty image file"


class ImageFolder:
    """Looks up image names. Lists each folder once: 200,000 separate look-ups are slow on a network disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._listings: dict[str, dict[str, tuple[str, str]]] = {}
        """Folder below root ("" for root) -> name in NFC -> (name on disk, problem or "")."""
        self._found: dict[str, tuple[str, str]] = {}

    def find(self, name: str) -> tuple[str, str]:
        """Look up an image by the name in the data set.

        Names are compared in Unicode's composed form (NFC), because archives packed on a Mac hold decomposed names.

        Returns:
            The path on disk relative to the folder, and the problem: ``OUTSIDE``, ``MISSING``, ``EMPTY`` or "".
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> tuple[str, str]:
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            return name, OUTSIDE
        path, problem = "", MISSING
        for part in name.split("/"):
            if part in ("", "."):
                continue
            actual, problem = self._listing(path).get(normalize("NFC", part), ("", MISSING))
            if not actual or problem == OUTSIDE:
                return name, problem
            path = f"{path}/{actual}" if path else actual
        return path or name, problem

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
