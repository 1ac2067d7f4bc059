"""Checkpoints of a run: the model in standard form, and in trainer/ what it takes to go on exactly.

A checkpoint appears under its name only when it is whole and on disk; half-written ones are removed by the next run.
No state of a random number generator is kept: every random number is drawn from its address.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medvqa_rl.core.files import list_checkpoints
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy, fill_adapter, load_policy

BYTES_PER_FILE = 4 * 2**30
"""Of the optimizer's state: what the writing process holds at a time."""

_LEFTOVER = re.compile(r"\.(?P<name>best|step_\d+)\.\d+\.(?P<kind>tmp|old)")
"""Folders on their way to or from their name, see :func:`medvqa_rl.models.checkpoints.atomic_folder`."""


@dataclass
class TrainState:
    """How far a run is."""

    step: int = 0
    """Steps done."""
    num_tokens: int = 0
    """Tokens of prompts and completions seen."""
    best_accuracy: float | None = None
    """Highest accuracy of an evaluation so far."""
    best_step: int | None = None
    metrics_bytes: int = 0
    """Length of metrics.jsonl at this point."""


def save_checkpoint(folder: Path, trained: TrainedPolicy, state: TrainState, *, is_main: bool) -> None:
    """Write a checkpoint; an older one of that name is replaced.

    Weights and optimizer state are gathered tensor by tensor, whatever engine trains and however many ranks there
    are, so a checkpoint is the same folder always. Where tensors are sharded all ranks call this together.

    Args:
        is_main: this process writes.

    Raises:
        ValueError: no space is left; earlier checkpoints are untouched.
    """
    with atomic_folder(folder) if is_main else nullcontext() as temporary:
        with trained.gathered():
            if temporary is not None:
                write_model(trained.policy, temporary)
        if temporary is None:
            for _ in trained.state_tensors() if trained.is_collective else ():
                pass
            return
        trainer = temporary / "trainer"
        trainer.mkdir()
        for number, tensors in enumerate(_portions(trained.state_tensors())):
            save_file(tensors, trainer / f"optimizer{f'_{number}' if number else ''}.safetensors")
        (trainer / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def _portions(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in dictionaries of about :data:`BYTES_PER_FILE`, the first of which may be empty."""
    portion: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        portion[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= BYTES_PER_FILE:
            yield portion
            portion, size = {}, 0
    yield portion


def save_best(folder: Path, policy: Policy, state: TrainState) -> None:
    """Write a copy of the model that evaluated best, in standard form, with best.json beside it.

    Args:
        policy: with all its weights in place.
    """
    with atomic_folder(folder) as temporary:
        write_model(policy, temporary)
        best = {"step": state.best_step, "accuracy": state.best_accuracy}
        (temporary / "best.json").write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; the best model lies elsewhere and is not counted."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def clean_up(run: Path) -> None:
    """Remove what a killed process left half written, and put back a folder that it had just moved away."""
    for parent in (run, run / "checkpoints"):
        for leftover in sorted(parent.glob(".*")):
            match = _LEFTOVER.fullmatch(leftover.name)
            if match is None:
                continue  # not ours: the folder may hold other things
            target = parent / match["name"]
            if match["kind"] == "old" and not target.exists():
                leftover.rename(target)
            else:
                shutil.rmtree(leftover)
        for leftover in parent.glob(".*.json.tmp"):  # see run_dir.write_json
            leftover.unlink()


def load_checkpoint(folder: Path, policy: Policy) -> TrainState:
    """Put a checkpoint's weights into a policy in place, before it is wrapped.

    The policy has been loaded from where the run began, because that is the reference's place.
    """
    if isinstance(policy.model, PeftModel):
        fill_adapter(policy.model, folder)  # what is below it is there, and need not be there twice
    else:
        saved = load_policy(policy.config.model_copy(update={"path": str(folder), "revision": None}))
        current = policy.model.state_dict()
        with torch.no_grad():
            for name, tensor in saved.model.state_dict().items():
                current[name].copy_(tensor)
    return TrainState(**json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8")))


class _Stored(Mapping[str, Tensor]):
    """Tensors of safetensors files, each read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        self._names = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  # no mapping

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._names[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_optimizer(folder: Path, trained: TrainedPolicy) -> None:
    """Put a checkpoint's state of the optimizer into a policy that was wrapped with its weights."""
    trained.load_state_tensors(_Stored(sorted((folder / "trainer").glob("optimizer*.safetensors"))))
