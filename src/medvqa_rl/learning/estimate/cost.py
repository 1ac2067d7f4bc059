"""What a model costs, from the numbers in its config.json: parameters, floating-point operations, bytes. No torch.

All formulas are counted from the layers of Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (arXiv 2502.13923) as
transformers implements them. A product of (m, k) and (k, n) matrices is 2 m k n operations; what is not a matrix
product (norms, activations, rotations, softmax) is left out, as usual: a few percent of the operations of large
models, more for tiny ones. Tests compare parameters with real models (equal) and operations with torch's counter.

Legend: P prompt tokens, R completion tokens, G completions per prompt, V words. A *pair* is a query and a key that it
attends to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BYTES_IN_4BIT = 0.5 + (1 + 4 / 256) / 64
"""Of a weight in NF4: half a byte, and for every 64 a constant in one byte, of which 256 share a float32."""

Grid = tuple[int, int]
"""Patches of an image, down and across."""

ATTENTION_BACKWARD = 2.5
"""Backward over forward operations of attention where the scores are computed again (flash attention, Dao et al.
2022, arXiv 2205.14135: five products for two). 2.0 where they are kept."""


@dataclass(frozen=True)
class Architecture:
    """The sizes that decide what a Qwen2-VL or Qwen2.5-VL costs."""

    vocabulary: int
    """V, rows of the embedding, the padding rows included."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    is_tied: bool
    """The output layer is the embedding."""
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int
    vision_is_gated: bool
    """Qwen2.5-VL: gated MLP with biases, RMS norms, attention in windows. Qwen2-VL: plain MLP, layer norms."""
    window_pixels: int = 0
    """Side of an attention window in pixels; 0 where every patch attends to its whole image."""
    global_layers: tuple[int, ...] = ()
    """Vision layers without windows, where there are windows."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    channels: int = 3

    @property
    def kv_hidden(self) -> int:
        """Width of the keys, and of the values, of one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer of one decoder layer."""
        h, i, kv = self.hidden, self.intermediate, self.kv_hidden
        return {
            "q_proj": (h, h),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (h, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def patch_values(self) -> int:
        """Numbers in one patch, as the image processor hands it over."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The sizes in a config.json, as the Hub has it (language model at the top level) or as transformers 5 writes it.

    Raises:
        ValueError: it is of another architecture, or a size is missing or not a positive whole number.
    """
    kind = config.get("model_type")
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(
            f"The config.json is of a {kind} model, but only Qwen2-VL (qwen2_vl) and Qwen2.5-VL (qwen2_5_vl) are "
            "supported: choose one of these."
        )
    text: Mapping[str, Any] = config.get("text_config") or config
    vision: Mapping[str, Any] = config.get("vision_config") or {}

    def size(section: Mapping[str, Any], name: str, default: int | None = None) -> int:
        value = section.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            where = "vision_config." if section is vision else ""
            raise ValueError(
                f"The config.json has {value!r} for {where}{name}, but it must be a positive whole number: take the "
                "file from the checkpoint."
            )
        return value

    is_gated = kind == "qwen2_5_vl"
    width = size(vision, "hidden_size" if is_gated else "embed_dim")
    heads = size(text, "num_attention_heads")
    return Architecture(
        vocabulary=size(text, "vocab_size"),
        hidden=size(text, "hidden_size"),
        intermediate=size(text, "intermediate_size"),
        layers=size(text, "num_hidden_layers"),
        heads=heads,
        kv_heads=size(text, "num_key_value_heads", heads),
        is_tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        vision_layers=size(vision, "depth"),
        vision_hidden=width,
        vision_intermediate=size(vision, "intermediate_size") if is_gated else width * size(vision, "mlp_ratio", 4),
        vision_heads=size(vision, "num_heads"),
        vision_is_gated=is_gated,
        window_pixels=size(vision, "window_size", 112) if is_gated else 0,
        global_layers=tuple(vision.get("fullatt_block_indexes", (7, 15, 23, 31))) if is_gated else (),
        patch_size=size(vision, "patch_size", 14),
        temporal_patch_size=size(vision, "temporal_patch_size", 2),
        merge_size=size(vision, "spatial_merge_size", 2),
        channels=size(vision, "in_channels", 3),
    )


class Parameters(NamedTuple):
    """Numbers of parameters by part; no parameter is in two parts."""

    layers: int
    """Decoder layers and the final norm."""
    embedding: int
    head: int
    """The output layer; 0 where it is the embedding."""
    tower: int
    """Patch embedding and vision layers."""
    projector: int
    """The merger between tower and language model."""

    @property
    def language(self) -> int:
        """All of the language model, as full fine-tuning trains it."""
        return self.layers + self.embedding + self.head

    @property
    def vision(self) -> int:
        """Tower and projector."""
        return self.tower + self.projector


def count_parameters(model: Architecture) -> Parameters:
    """Parameters of a model: weights, biases (of queries, keys, values, and all vision linears) and norms."""
    h, d, m = model.hidden, model.vision_hidden, model.vision_intermediate
    layer = sum(inputs * outputs for inputs, outputs in model.linears.values())
    layer += h + 2 * model.kv_hidden  # biases of q, k, v
    layer += 2 * h  # norms
    norm = d if model.vision_is_gated else 2 * d
    mlp = 3 * d * m + 2 * m + d if model.vision_is_gated else 2 * d * m + m + d
    block = 2 * norm + (3 * d * d + 3 * d) + (d * d + d) + mlp
    merged = d * model.merge_size**2
    return Parameters(
        layers=model.layers * layer + h,
        embedding=model.vocabulary * h,
        head=0 if model.is_tied else model.vocabulary * h,
        tower=model.patch_values * d + model.vision_layers * block,
        projector=norm + merged * merged + merged + merged * h + h,
    )


def lora_parameters(model: Architecture, rank: int, targets: Sequence[str]) -> int:
    """Parameters of adapters of a rank: rank * (inputs + outputs) for each target of each layer (arXiv 2106.09685).

    Raises:
        ValueError: a target is no linear layer of the language model.
    """
    unknown = sorted(set(targets) - model.linears.keys())
    if unknown:
        raise ValueError(
            f"model.lora.targets names {', '.join(unknown)}, but the linear layers of this language model are "
            f"{', '.join(sorted(model.linears))}: choose among these."
        )
    return model.layers * rank * sum(sum(model.linears[target]) for target in set(targets))


def image_tokens(model: Architecture, grids: Sequence[Grid]) -> int:
    """Tokens that the language model reads for images: one per square of merge_size patches."""
    return sum(down * across for down, across in grids) // model.merge_size**2


def group_pairs(prompt: int, completions: Sequence[int]) -> int:
    """Pairs that a group needs when its prompt is computed once: causal in the prompt, each completion sees the prompt
    and itself. P (P + 1) / 2 + sum of R P + R (R + 1) / 2."""
    return prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in completions)


def vision_pairs(model: Architecture, grids: Sequence[Grid]) -> int:
    """Pairs of all vision layers together: the square of an image's patches, or of a window's where there are
    windows (windows at the right and lower edge are cut, not padded)."""
    whole = sum((down * across) ** 2 for down, across in grids)
    if not model.window_pixels:
        return model.vision_layers * whole
    side = model.window_pixels // model.merge_size // model.patch_size * model.merge_size

    def cut(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    windowed = sum((a * b) ** 2 for down, across in grids for a in cut(down) for b in cut(across))
    num_global = len({layer for layer in model.global_layers if layer < model.vision_layers})
    return num_global * whole + (model.vision_layers - num_global) * windowed


def _tower_weights(model: Architecture) -> int:
    """Weights of the linears of all vision layers, each used once per patch."""
    d, m = model.vision_hidden, model.vision_intermediate
    return model.vision_layers * (4 * d * d + (3 if model.vision_is_gated else 2) * d * m)


def layer_weights(model: Architecture) -> int:
    """Weights of the linears of all decoder layers, each used once per token."""
    return model.layers * sum(inputs * outputs for inputs, outputs in model.linears.values())


def tower_flops(model: Architecture, grids: Sequence[Grid]) -> int:
    """Forward operations of patch embedding and vision layers: 2 per weight and patch, 4 * width per pair."""
    patches = sum(down * across for down, across in grids)
    linear = model.patch_values * model.vision_hidden + _tower_weights(model)
    return 2 * linear * patches + 4 * model.vision_hidden * vision_pairs(model, grids)


def projector_flops(model: Architecture, grids: Sequence[Grid]) -> int:
    """Forward operations of the merger: two linears per image token."""
    merged = model.vision_hidden * model.merge_size**2
    return 2 * merged * (merged + model.hidden) * image_tokens(model, grids)


def decoder_flops(model: Architecture, tokens: int, pairs: int) -> int:
    """Forward operations of the decoder layers: 2 per weight and token, 4 * hidden per pair and layer."""
    return 2 * layer_weights(model) * tokens + 4 * model.hidden * model.layers * pairs


def head_flops(model: Architecture, tokens: int) -> int:
    """Forward operations of the output layer."""
    return 2 * model.hidden * model.vocabulary * tokens


def lora_flops(model: Architecture, rank: int, targets: Sequence[str], tokens: int) -> int:
    """Forward operations of adapters: 2 per parameter and token."""
    return 2 * lora_parameters(model, rank, targets) * tokens


class Trained(NamedTuple):
    """What has gradients; of everything else no weight gradient is computed."""

    lora_rank: int = 0
    """0 trains the language model itself."""
    lora_targets: tuple[str, ...] = ()
    tower: bool = False
    projector: bool = False
    checkpointing: bool = False
    """Decoder layers, and vision layers that are trained, run forward again in the backward pass."""


class Shape(NamedTuple):
    """What goes through the model in one pass: of a prompt, a group, a micro-batch or a step."""

    tokens: int
    """Tokens of the rows, padding included where it is computed."""
    pairs: int
    """Pairs that are computed, or needed: see :func:`group_pairs`."""
    scored: int
    """Tokens whose logits are computed."""
    grids: tuple[Grid, ...] = ()
    """Images that the vision tower encodes; none where their features are kept."""


def forward_flops(model: Architecture, shape: Shape, trained: Trained = Trained()) -> int:
    """Operations of a forward pass without gradients."""
    flops = decoder_flops(model, shape.tokens, shape.pairs) + head_flops(model, shape.scored)
    if trained.lora_rank:
        flops += lora_flops(model, trained.lora_rank, trained.lora_targets, shape.tokens)
    return flops + tower_flops(model, shape.grids) + projector_flops(model, shape.grids)


def backward_flops(
    model: Architecture, shape: Shape, trained: Trained, *, attention: float = ATTENTION_BACKWARD
) -> float:
    """Operations of a backward pass, recomputation left out.

    Every linear through which gradients flow costs its forward once for the gradient of its inputs, and once more for
    that of its weights where they are trained. Where nothing below the first decoder layer is trained, its queries,
    keys and values need no gradient of their inputs. Attention counts whole in every layer: kernels compute all
    three gradients even where adapters leave out the first layer's k or v.

    Args:
        attention: backward over forward operations of attention.
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
        flops += embedding + 4 * _tower_weights(model) * patches
        flops += attention * 4 * model.vision_hidden * vision_pairs(model, shape.grids)
    return flops


def recompute_flops(model: Architecture, shape: Shape, trained: Trained, *, head_again: bool = False) -> int:
    """Operations that run again in the backward pass.

    Checkpointed layers run forward once more (Chen et al. 2016, arXiv 1604.06174), but torch stops before the last
    product of a layer, whose result nothing needs: that of ``down_proj``, or of the adapter on it. The output layer
    runs again where its logits come in chunks.

    Args:
        head_again: the logits were computed in chunks that were not kept.
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
    """Operations of one decoding step: one token for each row, each of which attends to so many keys."""
    return forward_flops(model, Shape(tokens=rows, pairs=rows * keys, scored=rows), trained)


def kv_bytes(model: Architecture, bytes_per_number: int) -> int:
    """Bytes of the keys and values of one token in all layers."""
    return 2 * model.layers * model.kv_hidden * bytes_per_number


def decode_bytes(model: Architecture, keys: int, bytes_per_number: int) -> int:
    """Bytes that one decoding step has to read: every weight of layers and output layer once, whatever the number of
    rows, and the keys and values of all rows.

    Args:
        keys: cached tokens to read, summed over the rows; a prompt that its rows share counts once.
        bytes_per_number: 2 for bfloat16, 4 for float32.
    """
    weights = count_parameters(model).layers + model.vocabulary * model.hidden
    return weights * bytes_per_number + keys * kv_bytes(model, bytes_per_number)
