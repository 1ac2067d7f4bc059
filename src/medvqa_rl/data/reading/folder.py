"""The folder that the images of a data set lie in: which names are there, and none that lead out of it. No torch."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

OUTSIDE = "image path leaves the folder"
MISSING = "missing image"
EMPTY = "empty image file"


class ImageFolder:
    """Looks up image names. Every folder is listed once, so 200,000 names cost a listing and not 200,000 look-ups on
    what may be a network disk."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._listings: dict[str, dict[str, str]] = {}
        """Folder below root ("" for root) -> name -> "" or what is wrong with it."""
        self._composed: dict[str, dict[str, str]] = {}
        """Folder -> name in composed form -> name on disk."""
        self._found: dict[str, tuple[str, str]] = {}

    def find(self, name: str) -> tuple[str, str]:
        """Look up a name as a data set gives it.

        Returns:
            The path relative to the folder as it is on disk, and "" or what is wrong: it leads out of the folder, it
            is missing, or it is empty. Names are compared in Unicode's composed form, because archives that were
            packed on a Mac hold decomposed ones.
        """
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def _find(self, name: str) -> tuple[str, str]:
        if "\0" in name or "\\" in name or name.startswith("/") or ".." in name.split("/"):
            return name, OUTSIDE
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if not parts:
            return name, MISSING
        folder = ""
        for depth, part in enumerate(parts):
            listing = self._listing(folder)
            actual = part if part in listing else self._in_composed_form(folder, part)
            problem = MISSING if actual is None else listing[actual]
            if actual is None or problem == OUTSIDE:
                return name, problem
            folder = f"{folder}/{actual}" if folder else actual
            if depth == len(parts) - 1:
                return folder, problem
        raise AssertionError("a name has a last part")

    def _in_composed_form(self, folder: str, part: str) -> str | None:
        if part.isascii():
            return None
        if folder not in self._composed:
            self._composed[folder] = {unicodedata.normalize("NFC", name): name for name in self._listing(folder)}
        return self._composed[folder].get(unicodedata.normalize("NFC", part))

    def _listing(self, folder: str) -> dict[str, str]:
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def _list(self, folder: str) -> dict[str, str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {entry.name: self._problem(entry) for entry in entries}
        except OSError:
            return {}  # no such folder, or not a folder: its names are missing

    def _problem(self, entry: os.DirEntry[str]) -> str:
        try:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self.root):
                return OUTSIDE
            if entry.is_dir():
                return MISSING  # as an image; as a part of a path it is followed
            return "" if entry.stat().st_size else EMPTY
        except (OSError, RuntimeError):
            return MISSING  # a link to nowhere, or in a circle

    def stamps(self) -> dict[str, int]:
        """When every folder that was listed last got or lost a file (nanoseconds; -1 where there is none)."""
        return {folder: stamp(self.root / folder) for folder in sorted(self._listings)}


def stamp(folder: Path) -> int:
    """When a folder last got or lost a file, in nanoseconds; -1 where there is none."""
    try:
        return folder.stat().st_mtime_ns
    except (OSError, ValueError):
        return -1
