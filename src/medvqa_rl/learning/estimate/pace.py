"""Seconds of a training step by phase, before it runs: operations and bytes over the rates of a machine. No torch."""

from __future__ import annotations

from typing import NamedTuple

from medvqa_rl.learning.estimate.cost import (
    BYTES_IN_4BIT,
    Shape,
    backward_flops,
    decode_bytes,
    decode_flops,
    decoder_flops,
    forward_flops,
    head_flops,
    layer_weights,
    projector_flops,
    recompute_flops,
    tower_flops,
)
from medvqa_rl.learning.estimate.footprint import LOGITS_PER_CHUNK
from medvqa_rl.learning.estimate.workload import Workload, trained_parameters

SAMPLING_PASSES = 10
"""Times that sampling reads or writes its float64 table of all words."""


EXPECTED_FLOPS, EXPECTED_BANDWIDTH = 0.45, 0.6
"""Shares of the full rates that large products and decoding reach: this project's aims, met or not."""

HOST_SECONDS = 0.7e-3
"""Time that Python and torch take to start one decoder layer's operations while decoding, whatever the hardware; twice
that with adapters. Rough: hosts differ by several times."""


class Rates(NamedTuple):
    """What a machine can do."""

    flops: float
    """Operations per second of matrix products in the type of the weights."""
    bandwidth: float
    """Bytes per second, read and written ones added up."""


class Seconds(NamedTuple):
    """A step by phase."""

    vision: float
    prefill: float
    decode: float
    reference: float
    update: float

    @property
    def rollout(self) -> float:
        """Vision tower, prefill and decoding."""
        return self.vision + self.prefill + self.decode

    @property
    def total(self) -> float:
        """All phases. Rewards and preprocessing of images are not counted."""
        return sum(self)


def update_shape(work: Workload, completion_tokens: int) -> Shape:
    """What all groups of a step bring through the model in the update, computed pairs counted, not needed ones."""
    prompt, size = work.prompt_tokens, work.generations
    if work.layout == "separate":
        tokens = size * (prompt + completion_tokens)
        pairs = size * (prompt + completion_tokens) * (prompt + completion_tokens + 1) // 2
    else:
        tokens = prompt + size * completion_tokens
        causal = prompt * (prompt + 1) // 2
        # Packed completions attend to their prompt and, the upper triangle masked, to themselves.
        packed = causal + size * completion_tokens * (prompt + completion_tokens)
        pairs = packed if work.layout == "packed" else tokens**2
    return Shape(
        tokens=work.prompts * tokens,
        pairs=work.prompts * pairs,
        scored=work.prompts * size * completion_tokens,
        grids=() if work.vision_is_frozen else work.grids * work.prompts,
    )


def expected_seconds(work: Workload, rates: Rates, *, completion_tokens: int) -> Seconds:
    """The time of a step at the shares of the rates that are expected, decoding not below the host's own time, which
    replayed graphs do without."""
    shared = Rates(EXPECTED_FLOPS * rates.flops, EXPECTED_BANDWIDTH * rates.bandwidth)
    host = 0.0 if work.keeps_cache else HOST_SECONDS * (2 if work.trained.lora_rank else 1)
    return seconds(work, shared, completion_tokens=completion_tokens, host_seconds=host)


def seconds(work: Workload, rates: Rates, *, completion_tokens: int, host_seconds: float = 0.0) -> Seconds:
    """The least time of a step: each phase takes what its operations need or, if more, what its bytes need.

    Args:
        completion_tokens: of a completion, on average.
        host_seconds: least time of a decoder layer in a decoding step.
    """
    model, trained = work.model, work.trained
    grids = work.grids * work.prompts
    vision = (tower_flops(model, grids) + projector_flops(model, grids)) / rates.flops
    prompt = work.prompt_tokens
    prefill = decoder_flops(model, work.prompts * prompt, work.prompts * prompt * (prompt + 1) // 2)
    prefill += head_flops(model, work.prompts)

    decode = 0.0
    for first in range(0, work.prompts, work.prompts_per_rollout_batch):
        prompts = min(work.prompts_per_rollout_batch, work.prompts - first)
        rows, written = prompts * work.generations, completion_tokens // 2
        read: float = decode_bytes(model, prompts * prompt + rows * written, work.bytes)  # a prompt is read once
        read += SAMPLING_PASSES * 8 * rows * model.vocabulary
        # Weights in 4 bits are read and written out before they are read as those that decode_bytes counts.
        read += work.is_4bit * layer_weights(model) * (BYTES_IN_4BIT + work.bytes)
        least = (decode_flops(model, rows, prompt + written, trained) / rates.flops, read / rates.bandwidth)
        decode += (completion_tokens - 1) * max(*least, model.layers * host_seconds)

    shape = update_shape(work, completion_tokens)
    bare = trained._replace(lora_rank=0)  # the reference of adapters is the model without them
    reference = forward_flops(model, shape, bare) / rates.flops if work.has_reference else 0.0
    scored = work.groups_per_micro_batch * work.generations * completion_tokens
    round_trip = forward_flops(model, shape, trained) + backward_flops(model, shape, trained)
    round_trip += recompute_flops(model, shape, trained, head_again=scored * model.vocabulary > LOGITS_PER_CHUNK)
    # AdamW reads a gradient and reads and writes two means and the weight, and its copy where there is one.
    moved = trained_parameters(work) * (work.bytes + 2 * (8 + 4) + (work.bytes + 4) * work.is_bfloat16)
    update = work.iterations * (round_trip / rates.flops + moved / rates.bandwidth)
    return Seconds(vision, prefill / rates.flops, decode, reference, update)
