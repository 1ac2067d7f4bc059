"""How groups are laid out as rows of tokens. Imports no torch."""

from __future__ import annotations

from enum import StrEnum


class Layout(StrEnum):
    """The rows of a micro-batch; the log-probabilities do not depend on it."""

    PACKED = "packed"
    """One row with all groups and no padding."""
    ROWS = "rows"
    """One padded row per group."""
    SEPARATE = "separate"
    """One padded row per completion, each with its prompt."""
