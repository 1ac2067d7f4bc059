"""Which settings to change when a step does not fit into memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medvqa_rl.config import Config, LoraConfig
from medvqa_rl.learning.estimate.estimate import Estimate


@dataclass(frozen=True)
class Change:
    """A change of settings that saves memory."""

    override: str
    apply: Callable[[Config], Config]
    keeps_results: bool
    """It only costs time, and does not change what is learned."""


def advise(config: Config, first: Estimate, redo: Callable[[Config], Estimate]) -> list[tuple[Change, Estimate]]:
    """Apply changes that lower the peak, one on top of the other, until the step fits or there are no more.

    Args:
        config: the settings.
        first: their estimate.
        redo: estimates other settings.

    Returns:
        The changes, each with the estimate after it.
    """
    taken: list[tuple[Change, Estimate]] = []
    current = first
    for change in _changes(config):
        if current.fits:
            break
        changed = change.apply(config)
        result = redo(changed)
        if result.peak < 0.995 * current.peak:
            config, current = changed, result
            taken.append((change, result))
    return taken


def _changes(config: Config) -> list[Change]:
    """All changes, those that only cost time first."""
    pixels, length = 200_704, config.rollout.max_completion_length // 2
    changes = [
        Change("train.prompts_per_micro_batch=1", _set("train", prompts_per_micro_batch=1), True),
        Change("model.gradient_checkpointing=true", _set("model", gradient_checkpointing=True), True),
        Change("rollout.max_batch=1", _set("rollout", max_batch=1), True),
        Change("model.dtype=bfloat16", _set("model", dtype="bfloat16"), False),
        Change("model.train_vision=false", _set("model", train_vision=False), False),
    ]
    if config.model.max_pixels is None or config.model.max_pixels > pixels:
        changes.append(Change(f"model.max_pixels={pixels}", _set("model", max_pixels=pixels), False))
    if config.model.lora is None:
        changes.append(Change("loss.beta=0", _set("loss", beta=0.0), False))
        changes.append(Change("'model.lora={rank: 16}'", _set("model", lora=LoraConfig()), False))
    if config.train.engine in ("auto", "ddp") and config.rollout.engine == "eager":
        changes.append(Change("model.load_in_4bit=true", _set("model", load_in_4bit=True), False))
    changes.append(
        Change(f"rollout.max_completion_length={length}", _set("rollout", max_completion_length=length), False)
    )
    return changes


def _set(section: str, **values: Any) -> Callable[[Config], Config]:
    """A function that changes settings of a section."""

    def apply(config: Config) -> Config:
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    return apply
