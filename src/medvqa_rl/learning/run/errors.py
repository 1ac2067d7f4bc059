"""Exceptions that end a run before its last step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medvqa_rl.core.files import describe_os_error, write_text
from medvqa_rl.core.types import Group


class TrainingFailed(RuntimeError):
    """Training cannot continue. The run saves the groups involved, and a checkpoint if the weights are valid."""

    def __init__(self, message: str, groups: Sequence[Group], *, has_valid_weights: bool = True) -> None:
        super().__init__(message)
        self.groups = tuple(groups)
        self.has_valid_weights = has_valid_weights
        """Whether the weights are those of the last completed step."""

    def write_groups(self, path: Path) -> str:
        """Write the groups as JSON Lines, and return a sentence that names the file, or says why there is none."""
        try:
            write_text(path, "".join(json.dumps(_describe(group)) + "\n" for group in self.groups))
        except OSError as problem:
            return f"The samples and their completions could not be written. {describe_os_error(problem)}"
        return f"The samples and their completions are in {path}."


class NonFiniteError(TrainingFailed):
    """A loss or gradient is NaN or infinite."""


class UnscoredError(TrainingFailed):
    """Too many completions of a step could not be scored."""


class RankLostError(TrainingFailed):
    """Another rank is dead, unresponsive or has failed."""


class OutOfMemory(TrainingFailed):
    """The GPU or this machine has no memory left for a step."""

    def __init__(self, error: BaseException, step: int, kind: str) -> None:
        """
        Args:
            error: what was raised.
            step: counted from 1.
            kind: the command that runs, ``train`` or ``sft``.
        """
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        sizes = {
            "train": "train.prompts_per_micro_batch or rollout.max_batch",
            "sft": "sft.samples_per_micro_batch",
        }
        super().__init__(
            f"Memory ran out in step {step} ({reason}). Lower {sizes[kind]}, or set "
            "model.gradient_checkpointing=true: all of them may change when a run is resumed.",
            (),
        )


class RunFolderLost(ValueError):
    """The run's folder was removed, moved or replaced. Nothing more is written."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: torch's on a GPU or a CPU, or Python's."""
    is_allocator = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_allocator


class UnusableSampleError(ValueError):
    """A sample's image cannot be used, or the sample is too large."""

    def __init__(self, message: str, images: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.images = tuple(images)
        """Keys of the images that cannot be used."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved a checkpoint. The exit code is 128 + the signal, as in shells."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(128 + signal_number)
        self.folder = folder


def _describe(group: Group) -> dict[str, Any]:
    """A group as JSON values."""
    return {
        "sample_id": group.sample.id,
        "images": [image.key for image in group.sample.images],
        "template": group.template,
        "prompt": group.prompt.text,
        "gold": group.sample.gold,
        "completions": [completion.text for completion in group.completions],
    }
