"""What loading did to the rows of a data set: which it dropped or repaired, and why. Imports no torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Action = Literal["dropped", "repaired"]

log = logging.getLogger(__name__)


class RowIssue(NamedTuple):
    """One thing that was wrong with one row."""

    row: int
    """Position of the row in its file; the first row of data is 0, a header is not counted."""
    file: str
    """The file, relative to the data set's folder."""
    reason: str
    """What was wrong, in the same few words for all rows that share it."""
    action: Action
    detail: str = ""
    """What exactly was wrong in this row; empty where the reason says it all."""


def count_issues(issues: Iterable[RowIssue]) -> dict[str, int]:
    """Rows per action and reason, as in ``{"dropped: missing image": 3}``; dropped ones first."""
    counts = Counter((issue.action, issue.reason) for issue in issues)
    return {f"{action}: {reason}": count for (action, reason), count in sorted(counts.items())}


def numbers_by_reason(issues: Iterable[RowIssue], action: Action) -> dict[tuple[str, str], list[int]]:
    """(file, reason) -> positions of the rows that were dropped, or repaired, for it."""
    found: dict[tuple[str, str], list[int]] = {}
    for issue in issues:
        if issue.action == action:
            found.setdefault((issue.file, issue.reason), []).append(issue.row)
    return found


def few(numbers: Sequence[int], most: int = 20) -> str:
    """The first numbers and how many more there are."""
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most:,} more" if len(numbers) > most else "")


def log_issues(issues: Sequence[RowIssue]) -> None:
    """Log dropped rows as warnings and repaired ones as information, a line for every file and reason."""
    levels: dict[Action, int] = {"dropped": logging.WARNING, "repaired": logging.INFO}
    for action, level in levels.items():
        if not log.isEnabledFor(level):
            continue
        for (file, reason), numbers in numbers_by_reason(issues, action).items():
            log.log(level, "%d rows of %s are %s, %s: numbers %s", len(numbers), file, action, reason, few(numbers))


def refuse_if_too_many_dropped(
    issues: Sequence[RowIssue], *, total: int, max_dropped: float, name: str, folder: object
) -> None:
    """Stop where more than a share of the rows is unusable.

    Args:
        issues: of all rows that were read.
        total: rows that were read, dropped ones included.
        max_dropped: the largest share of dropped rows, ``data.max_dropped``.
        name: the data set, for the message.
        folder: where it is, for the message.

    Raises:
        ValueError: the share is larger; the message names reasons, files and rows.
    """
    found = numbers_by_reason(issues, "dropped")
    count = sum(map(len, found.values()))
    if count > max_dropped * total:
        reasons = "; ".join(f"{reason}: rows {few(rows, 5)} of {file}" for (file, reason), rows in found.items())
        raise ValueError(
            f"{count:,} of {total:,} rows of {name} at {folder} are unusable ({reasons}), more than "
            f"data.max_dropped = {max_dropped:g} allows: repair the folder, or raise data.max_dropped."
        )
