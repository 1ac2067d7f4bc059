"""Checkpoints of a run: the model in standard form, and in trainer/ what it takes to go on exactly.

A checkpoint appears under its name only when it is whole and on disk; half-written ones are removed by the next run.
No state of a random number generator is kept: every random number is drawn from its address.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medvqa_rl.learning.optimizer import Optimizer
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy, load_policy

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


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return checkpoints / f"step_{step:06d}"


def save_checkpoint(folder: Path, policy: Policy, optimizer: Optimizer, state: TrainState) -> None:
    """Write a checkpoint; an older one of that name is replaced.

    Raises:
        ValueError: no space is left; earlier checkpoints are untouched.
    """
    with atomic_folder(folder) as temporary:
        write_model(policy, temporary)
        trainer = temporary / "trainer"
        trainer.mkdir()
        save_file(optimizer.state_tensors(), trainer / "optimizer.safetensors")
        (trainer / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")


def save_best(folder: Path, policy: Policy, state: TrainState) -> None:
    """Write a copy of the model that evaluated best, in standard form, with best.json beside it."""
    with atomic_folder(folder) as temporary:
        write_model(policy, temporary)
        best = {"step": state.best_step, "accuracy": state.best_accuracy}
        (temporary / "best.json").write_text(json.dumps(best, indent=2) + "\n", encoding="utf-8")


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(checkpoints.glob("step_*"))


def remove_old_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest checkpoints; the best model lies elsewhere and is not counted."""
    for folder in list_checkpoints(checkpoints)[:-keep]:
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


def load_checkpoint(folder: Path, policy: Policy, optimizer: Optimizer) -> TrainState:
    """Put a checkpoint's weights into a policy in place, and its state into the optimizer.

    The policy has been loaded from where the run began, because that is the reference's place.
    """
    update = {"adapter": str(folder)} if policy.is_lora else {"path": str(folder), "revision": None}
    saved = load_policy(policy.config.model_copy(update=update)).model.state_dict()
    current = policy.model.state_dict()
    with torch.no_grad():
        for name, tensor in saved.items():
            current[name].copy_(tensor)
    optimizer.load_state_tensors(load_file(folder / "trainer" / "optimizer.safetensors"))
    return TrainState(**json.loads((folder / "trainer" / "state.json").read_text(encoding="utf-8")))
