"""What may change when a run is resumed, what the resumed run promises, and its record. Imports no torch.

A run folder keeps config.yaml and config.resolved.json of its first start. Each resume adds a line to resumes.jsonl,
and config.resume_N.yaml if its settings differ from those of the start before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medvqa_rl.config import Config, differences, leaves
from medvqa_rl.config.schema import on_resume

Change = tuple[Any, Any]
"""Values of a setting: at the first start, and now."""

_BATCH_SHAPES = {
    *("train.prompts_per_micro_batch", "train.max_tokens_per_micro_batch", "sft.samples_per_micro_batch"),
    *("train.engine", "model.attention", "ranks", "engine"),
}
"""What decides how dropout's random numbers are shared out."""


class Resume(BaseModel):
    """A line of resumes.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = Field(ge=0)
    """The completed step that the run continued from."""
    checkpoint: str | None
    """Its folder, relative to the run; None if there was no checkpoint yet."""
    settings: dict[str, Change]
    """The settings that differ from those of the first start, by dotted path."""
    functions: dict[str, Change] = {}
    """The reward functions whose source differs from that of the first start, with its hashes."""
    environment: list[str]
    """What else differs from the first start, as ``name (old -> new)``."""
    promise: str = ""
    """How the results relate to those of an uninterrupted run."""
    time: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def read_resumes(path: Path) -> list[Resume]:
    """Read resumes.jsonl, oldest first; a missing file is empty.

    Raises:
        ValueError: a line is damaged; the message names it and the field.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                found.append(Resume.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "the line"
                raise ValueError(
                    f"{path} is damaged: line {number}, {where}: {first['msg']}. Remove the line if you no longer "
                    "need to know what changed with that resume."
                ) from error
    return found


def changed_settings(first: Config, now: Config) -> dict[str, Change]:
    """Return the settings that differ, by dotted path.

    Raises:
        ValueError: some of them must not change; the message lists these.
    """
    old, new = (leaves(config.model_dump(mode="json")) for config in (first, now))
    changes = {path: (old.get(path), new.get(path)) for path in differences(first, now)}
    refused = {path: change for path, change in changes.items() if on_resume(path) == "identity"}
    if refused:
        raise ValueError(
            f"These settings must not change when a run is resumed: {', '.join(_shown(refused))}. Set them back (the "
            "run's config.yaml contains the old ones), or start a new run in another output_dir. `medvqa-rl config "
            "tables` lists the settings that may change."
        )
    return changes


def still_counts(resumes: Sequence[Resume], step: int) -> list[Resume]:
    """Return the resumes that computed steps which are kept, if the run now continues from ``step``."""
    starts = [*(resume.step for resume in resumes), step]
    return [resume for index, resume in enumerate(resumes) if min(starts[index + 1 :]) > resume.step]


def promise(resumes: Sequence[Resume], config: Config, *, is_gpu: bool) -> str:
    """Say how the results relate to those of an uninterrupted run with the settings of the first start.

    Args:
        resumes: those that count (:func:`still_counts`), and the current one last.
        config: the current settings.
        is_gpu: whether the policy is on a GPU.
    """
    later: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for resume in resumes:
        for path, change in resume.settings.items():
            kind = on_resume(path)
            if kind == "later":
                later[path] = _later(path, change, config, resume.step)
            elif kind == "rounding":
                reasons[path] = _shown({path: change})[0]
        later |= {
            f"functions.{name}": f"From step {resume.step + 1} on, the reward function {name} has another source"
            for name in resume.functions
        }
        reasons |= {change.partition(" ")[0]: change for change in resume.environment}
    if config.rollout.engine == "vllm":
        text = "similar to those of an uninterrupted run, not equal: what vLLM samples depends on its batches"
    elif reasons or is_gpu:
        named = [*reasons.values(), *(["GPU kernels, which add in no fixed order"] if is_gpu else [])]
        text = f"equal to those of an uninterrupted run within rounding, because of {', '.join(named)}"
        if config.model.lora is not None and config.model.lora.dropout and reasons.keys() & _BATCH_SHAPES:
            text += "; LoRA's dropout draws other masks"
    else:
        text = "equal to those of an uninterrupted run bit for bit"
    if not later:
        return f"The results are {text}."
    return f"{'. '.join(later.values())}. Apart from that, the results are {text}."


def _later(path: str, change: Change, config: Config, step: int) -> str:
    """Say what a setting changes in the steps after a resume."""
    if path == "train.steps":
        schedule = config.optimizer.lr_scheduler_type
        follows = "" if schedule == "constant" else f", and the {schedule} learning rate follows the new number"
        return f"From step {step + 1} on, the run has {change[1]} steps in place of {change[0]}{follows}"
    assert path == "data.skip_images", path
    count = len(change[1])
    images = "image" if count == 1 else "images"
    return f"From step {step + 1} on, other questions take the place of those about {count} skipped {images}"


def _shown(changes: Mapping[str, Change]) -> list[str]:
    return [f"{path} ({json.dumps(old)} -> {json.dumps(new)})" for path, (old, new) in changes.items()]
