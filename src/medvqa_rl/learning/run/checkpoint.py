"""Checkpoints: the model in standard format, and in trainer/ the state needed to resume exactly.

A checkpoint gets its name only when it is complete and on disk; the next run removes partial ones. Its manifest, which
is written last, has the checksums of its files, and a run continues only from a checkpoint that fits it. There is no
random-generator state to save, because random numbers are pure functions of their address (core/randomness.py).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import BaseModel, TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from medvqa_rl.core.files import checkpoint_folder, list_checkpoints, parse_json, step_of, write_json
from medvqa_rl.learning.distributed.trained import LazyTensors, TrainedPolicy
from medvqa_rl.models.adapters import fill_adapter
from medvqa_rl.models.checkpoints import atomic_folder, write_model
from medvqa_rl.models.loading import Policy, load_policy

BYTES_PER_FILE = 4 * 2**30
"""Size limit of an optimizer file, and of the optimizer state that the writing process holds in memory."""

MANIFEST = "manifest.json"

_LEFTOVER = re.compile(r"\.(?P<name>best|step_\d+)\.(\d+\.(tmp|(?P<old>old))|.*\.partial)")
"""Temporary folders of :func:`medvqa_rl.models.checkpoints.atomic_folder`; those of older versions end in tmp."""


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
        OSError: it cannot be written; earlier checkpoints are unchanged.
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
        _write_manifest(temporary)


def _write_manifest(folder: Path) -> None:
    """Write manifest.json, last: size and SHA-256 of every file in the checkpoint."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    described = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files
    }
    write_json(folder / MANIFEST, {"files": described})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest, and return what is wrong; None if it is sound.

    Files that the manifest does not list, such as a model card, are ignored. A checkpoint of an older version has no
    manifest; only its training state can be checked.
    """
    manifest = folder / MANIFEST
    if not manifest.exists() and not list((folder / "trainer").glob("optimizer*.safetensors")):
        return "it has no trainer/optimizer.safetensors"
    try:
        for name, expected in _read_manifest(manifest).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected.bytes:
                return f"{name} has {path.stat().st_size:,} bytes instead of {expected.bytes:,}"
            if _digest(path) != expected.sha256:
                return f"the content of {name} has changed since it was written (its checksum differs)"
        state = read_state(folder)
    except ValueError as error:
        return str(error)
    if state.step != step_of(folder):
        return f"trainer/state.json is of step {state.step}"
    return None


class _File(BaseModel):
    bytes: int
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _File]


class _State(BaseModel, extra="forbid"):
    """The fields of :class:`TrainState`, all of which a state.json has; is_evaluated is not in older ones."""

    step: int
    num_tokens: int
    best_accuracy: float | None
    best_step: int | None
    metrics_bytes: int
    is_evaluated: bool = True


_MANIFEST, _STATE = TypeAdapter(_Manifest), TypeAdapter(_State)


def _read_manifest(path: Path) -> Mapping[str, _File]:
    """Read the files listed in a manifest; a missing manifest lists none.

    Raises:
        ValueError: it is damaged.
    """
    if not path.exists():
        return {}
    return parse_json(_MANIFEST, path.read_bytes(), path.name).files


def read_state(folder: Path) -> TrainState:
    """Read the progress of the run at a checkpoint.

    Raises:
        ValueError: the file is missing or damaged; the message names the file and the field.
    """
    path = folder / "trainer" / "state.json"
    if not path.is_file():
        raise ValueError("trainer/state.json is missing")
    return TrainState(**parse_json(_STATE, path.read_bytes(), "trainer/state.json").model_dump())


def choose_checkpoint(run: Path, wanted: int | None, command: str, *, is_main: bool) -> Path | None:
    """Return the checkpoint to resume from: that of the step ``wanted``, else the newest; None if there is none.

    Args:
        command: continues the run, for messages.
        is_main: whether this process is the one that reads all files to check them.

    Raises:
        ValueError: it does not exist or is damaged; the message names the file and a sound checkpoint.
    """
    checkpoints = list_checkpoints(run)
    steps = [step_of(path) for path in checkpoints]
    if wanted is not None and wanted not in steps:
        raise ValueError(
            f"--resume-from is {wanted}, but {run} has no checkpoint of that step: give one of "
            f"{', '.join(map(str, steps)) or 'none, since it has no checkpoint; use --resume to start over'}."
        )
    if not checkpoints:
        return None
    chosen = checkpoints[-1 if wanted is None else steps.index(wanted)]
    damage = find_damage(chosen) if is_main else None
    if damage is None:
        return chosen
    sound = next((path for path in reversed(checkpoints) if path != chosen and find_damage(path) is None), None)
    raise ValueError(
        f"The checkpoint {chosen} is damaged: {damage}. "
        + (
            f"Continue from the newest sound one with `{command} --resume-from {step_of(sound)}`."
            if sound is not None
            else f"No other checkpoint is sound: move {run / 'checkpoints'} away to start over with `{command}`."
        )
    )


def describe_start(checkpoint: Path | None, wanted: int | None) -> str:
    """Say where a resumed run starts and why, and rename newer checkpoints, so that no later resume takes them.

    Args:
        checkpoint, wanted: as for :func:`choose_checkpoint`.
    """
    if checkpoint is None:
        return "the beginning, because it has no checkpoint yet"
    why = "the newest checkpoint" if wanted is None else "given by --resume-from"
    checkpoints = list_checkpoints(checkpoint.parents[1])
    for path in checkpoints[checkpoints.index(checkpoint) + 1 :]:
        target = path.with_name(f"{path.name}.unused")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        why += f"; the newer {path.name} is renamed to {target.name}"
    return f"step {step_of(checkpoint)} ({why})"


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
        _write_best(temporary, state)


def restore_best(run: Path, state: TrainState) -> str | None:
    """If ``best/`` was removed, write it again from the checkpoint of its step.

    Returns:
        A sentence on what was done, or cannot be done; None if it was not removed.
    """
    best = run / "best"
    if not state.best_step or best.is_dir():
        return None
    source = checkpoint_folder(run, state.best_step)
    if not source.is_dir():
        return (
            f"{best} was removed and cannot be written again, because there is no checkpoint of its step "
            f"{state.best_step}: the next evaluation with an accuracy above {state.best_accuracy:.1%} writes it."
        )
    with atomic_folder(best) as temporary:
        for path in source.iterdir():
            if path.is_file() and path.name not in (MANIFEST, "README.md"):
                shutil.copyfile(path, temporary / path.name)
        _write_best(temporary, state)
    return f"{best} was removed, and is written again from {source}."


def _write_best(folder: Path, state: TrainState) -> None:
    write_json(folder / "best.json", {"step": state.best_step, "accuracy": state.best_accuracy})


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
            if match["old"] and not target.exists():
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
    return read_state(folder)


def load_optimizer(folder: Path, trained: TrainedPolicy) -> None:
    """Restore a checkpoint's optimizer state into a policy that was wrapped with the checkpoint's weights."""
    files: list[Any] = [
        safe_open(path, framework="pt") for path in (folder / "trainer").glob("optimizer*.safetensors")
    ]
    file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a mapping
    trained.load_state_tensors(LazyTensors(file_of, lambda name: file_of[name].get_tensor(name)))
