"""Checkpoints: the model in standard format, and in trainer/ the state needed to resume exactly.

A checkpoint gets its name only when it is complete and on disk; the next run removes partial ones. There is no
random-generator state to save, because random numbers are pure functions of their address (core/randomness.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medvqa_rl.core.files import list_checkpoints, write_json
from medvqa_rl.learning.distributed.trained import LazyTensors, TrainedPolicy
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy, fill_adapter, load_policy

BYTES_PER_FILE = 4 * 2**30
"""Size limit of an optimizer file, and of the optimizer state that the writing process holds in memory."""

_LEFTOVER = re.compile(r"\.(?P<name>best|step_\d+)\.\d+\.(?P<kind>tmp|old)")
"""Temporary folders of :func:`medvqa_rl.models.checkpoints.atomic_folder`."""


@dataclass
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Completed steps."""
    num_tokens: int = 0
    """Prompt and completion tokens processed so far."""
    best_accuracy: float | None = None
    """Highest validation accuracy so far."""
    best_step: int | None = None
    metrics_bytes: int = 0
    """Length of metrics.jsonl after this step."""
    is_evaluated: bool = True
    """False if the evaluation that is due after this step was not finished."""


def save_checkpoint(folder: Path, trained: TrainedPolicy, state: TrainState, *, is_main: bool) -> None:
    """Write a checkpoint, replacing one of the same name.

    The files do not depend on the engine or the number of ranks: weights and optimizer state are gathered tensor by
    tensor. Collective if ``trained.is_collective``.

    Args:
        is_main: whether this process writes the files.

    Raises:
        ValueError: no space is left on the device; earlier checkpoints are unchanged.
    """
    with atomic_folder(folder) if is_main else nullcontext() as temporary:
        with trained.gathered():
            if temporary is not None:
                write_model(trained.policy, temporary)
        if temporary is None:
            if trained.is_collective:
                for _ in trained.state_tensors():
                    pass  # take part in gathering
            return
        trainer = temporary / "trainer"
        trainer.mkdir()
        for number, tensors in enumerate(_chunks(trained.state_tensors())):
            save_file(tensors, trainer / f"optimizer{f'_{number}' if number else ''}.safetensors")
        write_json(trainer / "state.json", asdict(state))


def _chunks(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group tensors into dictionaries of about :data:`BYTES_PER_FILE`; the last may be empty."""
    chunk: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        chunk[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= BYTES_PER_FILE:
            yield chunk
            chunk, size = {}, 0
    yield chunk


def save_best(folder: Path, policy: Policy, state: TrainState) -> None:
    """Write the model with the best validation accuracy so far, in standard format, and best.json beside it.

    Args:
        policy: the policy with all weights gathered.
    """
    with atomic_folder(folder) as temporary:
        write_model(policy, temporary)
        best = {"step": state.best_step, "accuracy": state.best_accuracy}
        write_json(temporary / "best.json", best)


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest checkpoints; ``best/`` is not affected."""
    for folder in list_checkpoints(run)[:-keep]:
        shutil.rmtree(folder)


def clean_up(run: Path) -> None:
    """Remove partial files and folders of a killed process, and restore a folder that it was replacing."""
    for parent in (run, run / "checkpoints"):
        for leftover in sorted(parent.glob(".*")):
            match = _LEFTOVER.fullmatch(leftover.name)
            if match is None:
                continue  # not ours
            target = parent / match["name"]
            if match["kind"] == "old" and not target.exists():
                leftover.rename(target)
            else:
                shutil.rmtree(leftover)
        for leftover in parent.glob(".*.partial"):  # of core.files.write_whole
            leftover.unlink()


def load_checkpoint(folder: Path, policy: Policy) -> TrainState:
    """Load a checkpoint's weights into a policy in place, before it is wrapped.

    The policy was loaded from the run's initial weights, which the reference needs.
    """
    if isinstance(policy.model, PeftModel):
        fill_adapter(policy.model, folder)  # the base model is already loaded
    else:
        saved = load_policy(policy.config.model_copy(update={"path": str(folder), "revision": None}))
        current = policy.model.state_dict()
        with torch.no_grad():
            for name, tensor in saved.model.state_dict().items():
                current[name].copy_(tensor)
    return TrainState(**json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8")))


def load_optimizer(folder: Path, trained: TrainedPolicy) -> None:
    """Restore a checkpoint's optimizer state into a policy that was wrapped with the checkpoint's weights."""
    files: list[Any] = [
        safe_open(path, framework="pt") for path in (folder / "trainer").glob("optimizer*.safetensors")
    ]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a mapping
    trained.load_state_tensors(LazyTensors(file_of, lambda name: file_of[name].get_tensor(name)))
