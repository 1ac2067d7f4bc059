"""Rows that were dropped or repaired while loading, and why. Imports no torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from medvqa_rl.core.text import first_few, number_of

Action = Literal["dropped", "repaired"]

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


def count_issues(issues: Iterable[RowIssue]) -> dict[str, int]:
    """Count rows by action and reason, dropped rows first, as in ``{"dropped: missing image": 3}``."""
    counts = Counter((issue.action, issue.reason) for issue in issues)
    return {f"{action}: {reason}": count for (action, reason), count in sorted(counts.items())}


def rows_by_reason(issues: Iterable[RowIssue], action: Action) -> dict[tuple[str, str], list[int]]:
    """Map (file, reason) to the positions of the rows that were dropped or repaired."""
    found: dict[tuple[str, str], list[int]] = {}
    for issue in issues:
        if issue.action == action:
            found.setdefault((issue.file, issue.reason), []).append(issue.row)
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


class TooManyDropped(ValueError):
    """Raised if too many rows are unusable; ``found`` says how many, and which, without advice."""

    def __init__(self, found: str, max_dropped: float) -> None:
        super().__init__(
            f"{found}, more than data.max_dropped = {max_dropped:g} allows: fix the rows, or raise data.max_dropped."
        )
        self.found = found


def refuse_if_too_many_dropped(
    issues: Sequence[RowIssue], *, total: int, max_dropped: float, name: str, folder: object
) -> None:
    """Refuse a data set if too large a share of its rows was dropped.

    Args:
        issues: issues of all rows.
        total: number of rows read, including dropped ones.
        max_dropped: largest allowed share of dropped rows, ``data.max_dropped``.
        name: name of the data set, for the message.
        folder: its folder, for the message.

    Raises:
        TooManyDropped: the message lists reasons, files and rows.
    """
    dropped = rows_by_reason(issues, "dropped")
    number = sum(map(len, dropped.values()))
    if number > max_dropped * total:
        reasons = "; ".join(
            f"{reason}: rows {first_few(rows, 5)} of {file}" for (file, reason), rows in dropped.items()
        )
        raise TooManyDropped(
            f"{number:,} of {total:,} rows of {name} at {folder} are unusable ({reasons})", max_dropped
        )
