"""Exceptions that end a run before its last step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.core.types import Group


class TrainingFailed(RuntimeError):
    """Training cannot continue. The run saves the groups involved, and a checkpoint if the weights are valid."""

    def __init__(self, message: str, groups: Sequence[Group], *, has_valid_weights: bool = True) -> None:
        super().__init__(message)
        self.groups = tuple(groups)
        self.has_valid_weights = has_valid_weights
        """Whether the weights are those of the last completed step."""


class NonFiniteError(TrainingFailed):
    """A loss or gradient is NaN or infinite."""


class UnscoredError(TrainingFailed):
    """Too many completions of a step could not be scored."""


class RankLostError(TrainingFailed):
    """Another rank is dead, unresponsive or has failed."""


class UnusableSampleError(ValueError):
    """A sample's image cannot be used, or the sample is too large. The weights are valid, and the run saves them."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved a checkpoint. The exit code is 128 + the signal, as in shells."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(128 + signal_number)
        self.folder = folder
