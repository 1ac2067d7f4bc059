"""A lower bound on the time of a step, from its FLOPs and bytes.

It assumes the least possible work. With a frozen tower every image is encoded once per step, otherwise once each for
rollout, reference and update. Every prompt is prefilled once. A decoding step reads every weight once, and every key
and value of a prompt once for all its completions. The update computes one row per group, no masked pairs and no
recomputation. FLOPs are counted as in :mod:`medvqa_rl.learning.estimate.cost`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Rates, Workload
from medvqa_rl.config import LoraConfig
from medvqa_rl.learning.estimate.cost import (
    Shape,
    Trained,
    backward_flops,
    decode_bytes,
    decode_flops,
    forward_flops,
    group_pairs,
    lora_parameters,
)
from medvqa_rl.models.dimensions import Architecture, Grid
from medvqa_rl.models.families.costs import read_architecture

PATCH_SIZE = 14
"""Pixels along a side of a patch, in all models of the benchmarks."""
OPTIMIZER_BYTES = 28
"""AdamW traffic per trained float32 parameter: read weight, gradient and two moments, write weight and moments."""


@dataclass(frozen=True)
class Floor:
    """FLOPs and bytes of a phase."""

    flops: float
    bytes: float
    seconds: float
    """Sum over passes of the time for the FLOPs or for the bytes, whichever is longer."""

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)


def architecture_of(folder: Path) -> Architecture:
    """Read the dimensions of the model in a folder."""
    return read_architecture(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def trained_of(workload: Workload) -> Trained:
    """The parts of the model that a workload trains."""
    return Trained(
        lora_rank=workload.lora,
        lora_targets=LoraConfig().targets if workload.lora else (),
        tower=workload.train_vision,
        projector=workload.train_vision,
    )


def step_floors(
    model: Architecture, workload: Workload, prompts: Sequence[int], grids: Sequence[Grid], rates: Rates
) -> dict[str, Floor]:
    """The floor of each phase of a step: rollout, reference, update.

    Args:
        prompts: number of tokens of each of the P prompts.
        grids: patches of each image, vertically and horizontally.
        rates: peak throughput of the machine.
    """
    size = 2 if workload.dtype == "bfloat16" else 4
    trained, group = trained_of(workload), [workload.length] * workload.generations
    parameters = model.parameters
    vision = tuple(grids) if workload.train_vision else ()

    def floor(flops: float, moved: float) -> Floor:
        return Floor(flops, moved, max(flops / rates.flops, moved / rates.bytes))

    prefill = Shape(sum(prompts), sum(group_pairs(p, []) for p in prompts), len(prompts), tuple(grids))
    rollout = floor(forward_flops(model, prefill, trained), (parameters.language + parameters.vision) * size)
    rows = workload.generations * len(prompts)
    # The first token comes from the prefill, and the last token is not fed back.
    for position in range(1, workload.length):
        seen = sum(prompts) * workload.generations + rows * position
        stored = sum(prompts) + rows * position
        flops = decode_flops(model, rows, 0, trained) + 4 * model.hidden * model.layers * seen
        rollout += floor(flops, decode_bytes(model, stored, size))
    whole = Shape(
        tokens=sum(prompts) + rows * workload.length,
        pairs=sum(group_pairs(p, group) for p in prompts),
        scored=rows * workload.length,
        grids=vision,
    )
    weights = (parameters.language + (parameters.vision if vision else 0)) * size
    forward = forward_flops(model, whole, trained)
    learned = (
        lora_parameters(model, workload.lora, trained.lora_targets) if workload.lora else parameters.language
    ) + (parameters.vision if workload.train_vision else 0)
    update = floor(forward, weights) + floor(backward_flops(model, whole, trained, attention=2.0), 2 * weights)
    return {
        "rollout": rollout,
        "reference": floor(forward_flops(model, whole), weights) if workload.beta > 0 else Floor(0, 0, 0),
        "update": update + floor(0, OPTIMIZER_BYTES * learned),
    }
