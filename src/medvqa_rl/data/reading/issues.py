"""Rows that were dropped or repaired while loading, and why. Imports no torch."""

from __future__ import annotations

import logging
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from medvqa_rl.core.text import first_few, number_of, printable

Action = Literal["dropped", "repaired"]

NO_IMAGE = "no image"
"""The reason why a row without an image is unusable, unless ``data.allow_text_only`` is set."""

log = logging.getLogger(__name__)


class RowIssue(NamedTuple):
    """One problem with one row."""

    row: int
    """Position in the file, counted from 0; the header does not count."""
    file: str
    """The file, relative to the data set's folder."""
    reason: str
    """What was wrong, worded the same for all rows with this problem."""
    action: Action
    detail: str = ""
    """The offending value, or empty if the reason says everything."""
    line: int = 0
    """The row as the file numbers it (:meth:`TableReport.number`); 0 if rows are simply counted."""

    @property
    def number(self) -> int:
        """The row as people count it (:meth:`TableReport.number`)."""
        return self.line or self.row + 1


@dataclass
class TableReport:
    """Collects what is found in one file."""

    file: str
    """The file, relative to the data set's folder."""
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    """Number of rows, including unusable ones."""
    about: str = ""
    """How the file is written, such as ``separated by semicolons``; empty if its suffix says it."""
    lines: array[int] = field(default_factory=lambda: array("L"))
    """The line of each row in the file, or its row in the spreadsheet; empty if rows are simply counted."""

    def number(self, row: int) -> int:
        """The number of a row as a spreadsheet shows it (its header is row 1), for JSON Lines and text the number of
        the line, in other files counted from 1.

        Args:
            row: position in the file, counted from 0.
        """
        return self._line(row) or row + 1

    def _line(self, row: int) -> int:
        return self.lines[row] if row < len(self.lines) else 0

    def drop(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row was dropped."""
        self.issues.append(RowIssue(row, self.file, reason, "dropped", printable(detail), self._line(row)))

    def repair(self, row: int, reason: str, detail: str = "") -> None:
        """Record that a row was repaired."""
        self.issues.append(RowIssue(row, self.file, reason, "repaired", printable(detail), self._line(row)))


def count_issues(issues: Iterable[RowIssue]) -> dict[str, int]:
    """Count rows by action and reason, dropped rows first, as in ``{"dropped: missing image": 3}``."""
    counts = Counter((issue.action, issue.reason) for issue in issues)
    return {f"{action}: {reason}": count for (action, reason), count in sorted(counts.items())}


def rows_by_reason(issues: Iterable[RowIssue], action: Action) -> dict[tuple[str, str], list[int]]:
    """Map (file, reason) to the numbers of the rows that were dropped or repaired (:attr:`RowIssue.number`)."""
    found: dict[tuple[str, str], list[int]] = {}
    for issue in issues:
        if issue.action == action:
            found.setdefault((issue.file, issue.reason), []).append(issue.number)
    return found


def log_issues(issues: Sequence[RowIssue], folder: Path) -> None:
    """Log dropped rows as warnings and repaired rows as information, one line for each file and reason.

    A line is logged once per process, although each split of a table reads all of it.

    Args:
        folder: that of the data set.
    """
    levels: dict[Action, int] = {"dropped": logging.WARNING, "repaired": logging.INFO}
    for action, level in levels.items():
        if not log.isEnabledFor(level):
            continue
        for (file, reason), rows in rows_by_reason(issues, action).items():
            which = f"{'row' if len(rows) == 1 else 'rows'} {first_few(rows, 20)}"
            _log_once(level, folder, f"{number_of(len(rows), 'row')} of {file} {action}, {reason}: {which}")


@cache
def _log_once(level: int, folder: Path, line: str) -> None:
    log.log(level, "%s", line)


def refuse_if_too_many_dropped(
    issues: Sequence[RowIssue], *, total: int, max_dropped: float, name: str, folder: object, is_own: bool = False
) -> None:
    """Refuse a data set if too large a share of its rows was dropped.

    Args:
        issues: issues of all rows.
        total: number of rows read, including dropped ones.
        max_dropped: largest allowed share of dropped rows, ``data.max_dropped``.
        name: name of the data set, for the message.
        folder: its folder, for the message.
        is_own: whether it is the user's own table.

    Raises:
        ValueError: too many were; the message lists reasons, files and rows.
    """
    dropped = rows_by_reason(issues, "dropped")
    number = sum(map(len, dropped.values()))
    if number > max_dropped * total:
        reasons = "; ".join(
            f"{reason}: rows {first_few(rows, 20)} of {file}" for (file, reason), rows in dropped.items()
        )
        enough = math.ceil(100 * number / total) / 100
        own = is_own and any(reason == NO_IMAGE for _, reason in dropped)
        keep = ", or keep questions without an image with data.allow_text_only=true" if own else ""
        raise ValueError(
            f"{number:,} of {total:,} rows of {name} at {folder} are unusable ({reasons}), more than data.max_dropped "
            f"= {max_dropped:g} allows: fix the rows, or set data.max_dropped={enough:g}{keep}."
        )
