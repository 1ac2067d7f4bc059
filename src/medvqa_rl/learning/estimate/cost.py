"""The cost of a model: parameters, floating-point operations (FLOPs) and bytes. Imports no torch.

A product of (m, k) and (k, n) matrices takes 2 m k n FLOPs; everything else (norms, activations, rotary
embedding, softmax) is left out, as usual: a few percent for large models, more for tiny ones. Tests compare parameters
with real models (equal) and FLOPs with torch's counter.

Legend: P prompt tokens, R completion tokens, V vocabulary. A *pair* is a query and a key that it attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from medvqa_rl.models.dimensions import Architecture, Grid

BYTES_IN_4BIT = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight in NF4: half a byte, a one-byte scale per 64 weights, and a float32 per 256 scales."""

ATTENTION_BACKWARD = 2.5
"""Backward FLOPs of attention as a multiple of its forward when scores are recomputed (FlashAttention, Dao et al.
2022, arXiv 2205.14135: five products for two). 2.0 when they are stored."""


def lora_parameters(model: Architecture, rank: int, targets: Sequence[str]) -> int:
    """Parameters of LoRA adapters: rank * (inputs + outputs) per target and layer (arXiv 2106.09685).

    Raises:
        ValueError: a target is not a linear layer of the language model.
    """
    unknown = sorted(set(targets) - model.linears.keys())
    if unknown:
        raise ValueError(
            f"model.lora.targets names {', '.join(unknown)}, but the linear layers of this language model are "
            f"{', '.join(sorted(model.linears))}: choose among these."
        )
    return model.layers * rank * sum(sum(model.linears[target]) for target in set(targets))


def image_tokens(model: Architecture, grids: Sequence[Grid]) -> int:
    """Image tokens in the language model."""
    return sum(down * across for down, across in grids) // model.patches_per_token


def group_pairs(prompt: int, completions: Sequence[int]) -> int:
    """Attention pairs of a group that shares its prompt: the prompt is causal, each completion attends to the prompt
    and causally to itself. P (P + 1) / 2 + the sum of R P + R (R + 1) / 2."""
    return prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in completions)


def vision_pairs(model: Architecture, grids: Sequence[Grid]) -> int:
    """Attention pairs of all vision layers: the square of the patches of each image, or of each window (windows at the
    right and bottom edges are cropped, not padded)."""
    whole = sum((down * across) ** 2 for down, across in grids)
    if not model.window:
        return model.vision_layers * whole

    def cut(length: int) -> list[int]:
        return [min(model.window, length - start) for start in range(0, length, model.window)]

    windowed = sum((a * b) ** 2 for down, across in grids for a in cut(down) for b in cut(across))
    num_global = len({layer for layer in model.global_layers if layer < model.vision_layers})
    return num_global * whole + (model.vision_layers - num_global) * windowed


def layer_weights(model: Architecture) -> int:
    """Weights of the linear layers of all decoder layers, each used once per token."""
    return model.layers * sum(inputs * outputs for inputs, outputs in model.linears.values())


def tower_flops(model: Architecture, grids: Sequence[Grid]) -> int:
    """Forward FLOPs of patch embedding and vision layers: 2 per weight and patch, 4 * width per pair."""
    patches = sum(down * across for down, across in grids)
    linear = model.patch_values * model.vision_hidden + model.tower_weights
    return 2 * linear * patches + 4 * model.vision_hidden * vision_pairs(model, grids)


def projector_flops(model: Architecture, grids: Sequence[Grid]) -> int:
    """Forward FLOPs of the projector: 2 per weight and image token."""
    return 2 * model.projector_weights * image_tokens(model, grids)


def decoder_flops(model: Architecture, tokens: int, pairs: int) -> int:
    """Forward FLOPs of the decoder layers: 2 per weight and token, 4 * the width of the queries per pair and layer."""
    return 2 * layer_weights(model) * tokens + 4 * model.query_hidden * model.layers * pairs


def head_flops(model: Architecture, tokens: int) -> int:
    """Forward FLOPs of the output layer."""
    return 2 * model.hidden * model.vocabulary * tokens


def lora_flops(model: Architecture, rank: int, targets: Sequence[str], tokens: int) -> int:
    """Forward FLOPs of adapters: 2 per parameter and token."""
    return 2 * lora_parameters(model, rank, targets) * tokens


class Trained(NamedTuple):
    """Which parts have weight gradients."""

    lora_rank: int = 0
    """0 for full fine-tuning of the language model."""
    lora_targets: tuple[str, ...] = ()
    tower: bool = False
    projector: bool = False
    checkpointing: bool = False
    """Recompute decoder layers, and vision layers if trained, in the backward pass."""


class Shape(NamedTuple):
    """Input sizes of a forward pass: of a prompt, a group, a micro-batch or a step."""

    tokens: int
    """Tokens, including padding that is computed."""
    pairs: int
    """Attention pairs, see :func:`group_pairs`."""
    scored: int
    """Tokens whose logits are computed."""
    grids: tuple[Grid, ...] = ()
    """Images that the vision tower encodes; empty if their features are cached."""


def forward_flops(model: Architecture, shape: Shape, trained: Trained = Trained()) -> int:
    """FLOPs of a forward pass without gradients."""
    flops = decoder_flops(model, shape.tokens, shape.pairs) + head_flops(model, shape.scored)
    if trained.lora_rank:
        flops += lora_flops(model, trained.lora_rank, trained.lora_targets, shape.tokens)
    return flops + tower_flops(model, shape.grids) + projector_flops(model, shape.grids)


def backward_flops(
    model: Architecture, shape: Shape, trained: Trained, *, attention: float = ATTENTION_BACKWARD
) -> float:
    """FLOPs of a backward pass, without recomputation.

    A linear layer costs its forward FLOPs once for the gradient of its inputs, and once more for that of its weights
    if they are trained. If nothing below the first decoder layer is trained, its query, key and value projections need
    no input gradient. Attention counts in full in every layer, because kernels compute all three gradients even if the
    first layer's keys or values need none.

    Args:
        attention: backward FLOPs of attention as a multiple of its forward.
    """
    linear = decoder_flops(model, shape.tokens, 0)
    flops = attention * decoder_flops(model, 0, shape.pairs)
    if trained.lora_rank:
        flops += linear + head_flops(model, shape.scored)
        flops += 2 * lora_flops(model, trained.lora_rank, trained.lora_targets, shape.tokens)
        if not trained.tower and not trained.projector:
            first = ("q_proj", "k_proj", "v_proj")
            flops -= 2 * shape.tokens * sum(model.linears[name][0] * model.linears[name][1] for name in first)
            ranks = sum(model.linears[name][0] for name in first if name in trained.lora_targets)
            flops -= 2 * shape.tokens * trained.lora_rank * ranks
    else:
        flops += 2 * linear + 2 * head_flops(model, shape.scored)
    if trained.tower or trained.projector:
        flops += (1 + trained.projector) * projector_flops(model, shape.grids)
    if trained.tower:
        patches = sum(down * across for down, across in shape.grids)
        embedding = 2 * model.patch_values * model.vision_hidden * patches  # pixels have no gradient
        flops += embedding + 4 * model.tower_weights * patches
        flops += attention * 4 * model.vision_hidden * vision_pairs(model, shape.grids)
    return flops


def recompute_flops(model: Architecture, shape: Shape, trained: Trained, *, head_again: bool = False) -> int:
    """FLOPs that the backward pass recomputes.

    Checkpointed layers run forward again (Chen et al. 2016, arXiv 1604.06174), but torch stops before the last product
    of a layer, whose result is not needed: that of ``down_proj`` or of its adapter. The output layer runs again if its
    logits are computed in chunks.

    Args:
        head_again: logits are computed in chunks, which are not stored.
    """
    flops = head_flops(model, shape.scored) if head_again else 0
    if trained.checkpointing:
        inputs, outputs = model.linears["down_proj"]
        last = (trained.lora_rank if "down_proj" in trained.lora_targets else inputs) * outputs
        flops += decoder_flops(model, shape.tokens, shape.pairs) - 2 * model.layers * last * shape.tokens
        if trained.lora_rank:
            flops += lora_flops(model, trained.lora_rank, trained.lora_targets, shape.tokens)
        if trained.tower:
            patches = sum(down * across for down, across in shape.grids)
            embedding = 2 * model.patch_values * model.vision_hidden * patches
            last = 2 * model.vision_layers * model.vision_hidden * model.vision_intermediate * patches
            flops += tower_flops(model, shape.grids) - embedding - last
    return flops


def decode_flops(model: Architecture, rows: int, keys: int, trained: Trained = Trained()) -> int:
    """FLOPs of a decoding step of ``rows`` sequences that attend to ``keys`` keys each."""
    return forward_flops(model, Shape(tokens=rows, pairs=rows * keys, scored=rows), trained)


def kv_bytes(model: Architecture, bytes_per_number: int) -> int:
    """Bytes of the KV cache per token."""
    return 2 * model.layers * model.kv_hidden * bytes_per_number


def decode_bytes(model: Architecture, keys: int, bytes_per_number: int) -> int:
    """Bytes that a decoding step reads: the weights of decoder and output layer once, and the KV cache.

    Args:
        keys: cached tokens of all sequences; a shared prompt counts once.
        bytes_per_number: 2 for bfloat16, 4 for float32.
    """
    weights = model.parameters.layers + model.vocabulary * model.hidden
    return weights * bytes_per_number + keys * kv_bytes(model, bytes_per_number)
