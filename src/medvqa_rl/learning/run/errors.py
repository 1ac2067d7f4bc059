"""What ends a run before its last step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medvqa_rl.core.types import Group


class TrainingFailed(RuntimeError):
    """Training cannot go on. The run saves the groups concerned, and the weights where they are sound."""

    def __init__(self, message: str, groups: Sequence[Group], *, has_valid_weights: bool = True) -> None:
        super().__init__(message)
        self.groups = tuple(groups)
        self.has_valid_weights = has_valid_weights
        """True where the weights are those of the last whole step."""


class NonFiniteError(TrainingFailed):
    """A loss or a gradient is infinite or not a number."""


class UnscoredError(TrainingFailed):
    """Too many completions of a step could not be scored."""


class RankLostError(TrainingFailed):
    """Another rank is dead, frozen or has failed."""


class UnusableSampleError(ValueError):
    """A sample cannot be used, for its image or its size. Nothing is wrong with the weights, which the run saves."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved a checkpoint; the exit code is 128 + the signal, as shells have it."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(128 + signal_number)
        self.folder = folder
