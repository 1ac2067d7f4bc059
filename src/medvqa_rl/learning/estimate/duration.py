"""Seconds of a training step by phase, before it runs: FLOPs and bytes over a machine's rates. Imports no torch."""

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
from medvqa_rl.learning.estimate.hardware import Rates
from medvqa_rl.learning.estimate.memory import LOGITS_PER_CHUNK
from medvqa_rl.learning.estimate.workload import Workload, trained_parameters
from medvqa_rl.learning.objective.layout import Layout

SAMPLING_PASSES = 10
"""How often sampling reads or writes its (rows, V) float64 table."""

EXPECTED_FLOPS, EXPECTED_BANDWIDTH = 0.45, 0.6
"""Shares of the peak rates that large products and decoding reach: this project's targets, not measurements."""

HOST_SECONDS = 0.7e-3
"""Time that Python and torch take to launch a decoder layer while decoding, on any hardware; twice that with adapters.
A rough figure: hosts differ several times over."""


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
        """All phases, without rewards and image preprocessing."""
        return sum(self)


def update_shape(work: Workload, completion_tokens: int) -> Shape:
    """Input sizes of the update, over all groups of a step. Pairs that are computed and then masked are included."""
    prompt, size = work.prompt_tokens, work.generations
    if work.layout == Layout.SEPARATE:
        tokens = size * (prompt + completion_tokens)
        pairs = size * (prompt + completion_tokens) * (prompt + completion_tokens + 1) // 2
    else:
        tokens = prompt + size * completion_tokens
        causal = prompt * (prompt + 1) // 2
        # Packed completions attend to their prompt and, with the upper triangle masked, to themselves.
        packed = causal + size * completion_tokens * (prompt + completion_tokens)
        pairs = packed if work.layout == Layout.PACKED else tokens**2
    return Shape(
        tokens=work.prompts * tokens,
        pairs=work.prompts * pairs,
        scored=work.prompts * size * completion_tokens,
        grids=() if work.vision_is_frozen else work.grids * work.prompts,
    )


def expected_seconds(work: Workload, rates: Rates, *, completion_tokens: int) -> Seconds:
    """The time of a step at the expected shares of the rates. Decoding takes at least the host's time, which CUDA
    graphs avoid."""
    shared = Rates(EXPECTED_FLOPS * rates.flops, EXPECTED_BANDWIDTH * rates.bandwidth)
    host = 0.0 if work.keeps_cache else HOST_SECONDS * (2 if work.trained.lora_rank else 1)
    return least_seconds(work, shared, completion_tokens=completion_tokens, host_seconds=host)


def least_seconds(work: Workload, rates: Rates, *, completion_tokens: int, host_seconds: float = 0.0) -> Seconds:
    """The least time of a step: each phase takes the time of its FLOPs or of its bytes, whichever is longer.

    Args:
        work: the step.
        rates: of the machine.
        completion_tokens: mean length of a completion.
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
        read: float = decode_bytes(model, prompts * prompt + rows * written, work.bytes)
        read += SAMPLING_PASSES * 8 * rows * model.vocabulary
        # 4-bit weights are read and dequantized to memory before the products read them (decode_bytes).
        read += work.is_4bit * layer_weights(model) * (BYTES_IN_4BIT + work.bytes)
        least = (decode_flops(model, rows, prompt + written, trained) / rates.flops, read / rates.bandwidth)
        decode += (completion_tokens - 1) * max(*least, model.layers * host_seconds)

    shape = update_shape(work, completion_tokens)
    bare = trained._replace(lora_rank=0)  # with adapters, the reference is the model without them
    reference = forward_flops(model, shape, bare) / rates.flops if work.has_reference else 0.0
    scored = work.groups_per_micro_batch * work.generations * completion_tokens
    round_trip = forward_flops(model, shape, trained) + backward_flops(model, shape, trained)
    round_trip += recompute_flops(model, shape, trained, head_again=scored * model.vocabulary > LOGITS_PER_CHUNK)
    # AdamW reads the gradient, and reads and writes both moments, the weight and its float32 copy if there is one.
    moved = trained_parameters(work) * (work.bytes + 2 * (8 + 4) + (work.bytes + 4) * work.is_bfloat16)
    entropy = forward_flops(model, shape, trained) / rates.flops if work.has_entropy_pass else 0.0
    update = entropy + work.iterations * (round_trip / rates.flops + moved / rates.bandwidth)
    return Seconds(vision, prefill / rates.flops, decode, reference, update)
