"""The runs and evaluations below a folder, found again at every look. Links that lead out of it are refused.

Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from medvqa_rl.core.text import is_unicode, shown
from medvqa_rl.report.runs import StoredRun, holds_run, read_headline, read_run
from medvqa_rl.rewards.attack.results import FILE as ATTACK

MAX_DEPTH = 6
"""Folders between the given one and a run; a study has two."""

Version = tuple[object, ...]
"""Differs when files of a run have changed."""


class RunsFolder:
    """The runs below a folder by name: their paths in it. Nothing else can be opened."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            ValueError: it is not a folder.
        """
        if not root.is_dir():
            raise ValueError(f"There is no folder {root}: give the folder that holds the runs, such as runs.")
        self.root = root.resolve()
        self._headlines: dict[str, tuple[Version, StoredRun]] = {}

    def find(self) -> dict[str, Path]:
        """Return the folders of runs, and of evaluations outside of runs, by name. Linked folders are not followed."""
        found = {path.relative_to(self.root).as_posix(): path for path in _below(self.root, MAX_DEPTH)}
        return {self.root.name if name == "." else name: path for name, path in found.items() if is_unicode(name)}

    def path_of(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            ValueError: there is none of that name, or a link in it leads out of the folder.
        """
        path = self.find().get(name)
        if path is None:
            raise ValueError(
                f"There is no run {shown(name)} below the folder {self.root.name}: it may have been moved."
            )
        self._check(name, path)
        return path

    def _check(self, name: str, path: Path) -> None:
        """Refuse a run with a link that leads out of the folder."""
        if (link := self._link_out(path)) is not None:
            raise ValueError(
                f"The run {shown(name)} is not shown, because its link {shown(link)} leads out of the folder "
                f"{self.root.name}: start `medvqa-rl view` on a folder that holds both."
            )

    def read(self, name: str) -> StoredRun:
        """Read a run, or an evaluation as a run that has only this one.

        Raises:
            ValueError: see :meth:`path_of`; or it cannot be read.
        """
        path = self.path_of(name)
        return (read_run if holds_run(path) else read_headline)(path, label=name)

    def headlines(self) -> tuple[list[StoredRun], list[str]]:
        """Return all runs with their status and main evaluations only, and a sentence for each that is refused."""
        runs, problems = [], []
        for name, path in self.find().items():
            try:
                self._check(name, path)
                version = version_of(path)
                if self._headlines.get(name, ((), None))[0] != version:
                    self._headlines[name] = version, read_headline(path, label=name)
                runs.append(self._headlines[name][1])
            except (ValueError, OSError) as error:
                problems.append(str(error))
        return runs, problems

    def _link_out(self, run: Path) -> str | None:
        """A link among the files of a run that leads out of the root, or None."""
        folders = [run, run / "eval", run / "samples", run / "checkpoints"]
        folders += [Path(entry) for entry in _entries(run / "eval") if entry.is_dir()]
        for folder in folders:
            for entry in _entries(folder):
                if entry.is_symlink() and not Path(entry).resolve().is_relative_to(self.root):
                    return Path(entry).relative_to(run).as_posix()
        return None


def version_of(run: Path, *, only_evaluations: bool = False) -> Version:
    """Return sizes and times of what a page shows of a run, or of its evaluations."""
    paths = [run / "results.json", run / "samples.jsonl", *sorted(run.glob("eval/*/*.json*"))]
    if only_evaluations:
        return tuple((path.relative_to(run).as_posix(), *_state(path)) for path in paths)
    names = ("status.json", "metrics.jsonl", "config.resolved.json", "data.json", "env.json", "resumes.jsonl", ATTACK)
    paths += [*(run / name for name in names), run / "best" / "best.json"]
    samples = sorted(run.glob("samples/step_*.jsonl"))
    return (len(samples), *((path.relative_to(run).as_posix(), *_state(path)) for path in [*paths, *samples[-1:]]))


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if holds_run(folder) or all((folder / name).is_file() for name in ("results.json", "samples.jsonl")):
        yield folder
    elif depth:
        for entry in sorted(_entries(folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _below(Path(entry), depth - 1)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """The content of a folder; empty if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
