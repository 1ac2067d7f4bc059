"""Memory of a training step by part, before it runs: pure arithmetic on a model's sizes and the settings. No torch.

What autograd keeps was counted tensor by tensor (``saved_tensors_hooks``) and the moments at which memory peaks were
found with torch's allocation profiler, on a CPU, in float32 and bfloat16; docs/estimate.md has the comparison. What a
GPU adds (AdamW's batched temporaries, its context) is computed from torch's code, not measured.

Legend: P prompts, G completions per prompt, N completion tokens, T tokens of a row, V words, L layers; per token
h hidden, i intermediate, kv width of keys; per patch d, m the same of the vision tower; e bytes of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from medvqa_rl.learning.estimate.cost import (
    BYTES_IN_4BIT,
    count_parameters,
    image_tokens,
    kv_bytes,
    layer_weights,
    lora_parameters,
)
from medvqa_rl.learning.estimate.workload import Workload, trained_parameters

LOGITS_PER_CHUNK = 2**25
"""As in ``learning.logprobs``, which imports torch; a test holds them equal."""

PARTS = ("process", "weights", "reference", "optimizer", "gradients", "KV cache", "activations", "logits", "vision")
"""What memory is used for, in the order of tables."""


def _static(work: Workload) -> dict[str, float]:
    """Bytes that are there all the time."""
    counts, trained, e = count_parameters(work.model), work.trained, work.bytes
    weights = sum(counts) * e - work.is_4bit * layer_weights(work.model) * (e - BYTES_IN_4BIT)
    adapters = 0
    if trained.lora_rank:
        # PEFT keeps adapters in float32 whatever the model is in, and trains a copy of what is trained whole.
        adapters = lora_parameters(work.model, trained.lora_rank, trained.lora_targets)
        weights += 4 * adapters + e * (trained.tower * counts.tower + trained.projector * counts.projector)
    whole = trained_parameters(work) - adapters
    masters = 4 * whole if work.is_bfloat16 else 0
    # The reference of full fine-tuning is a copy of what is trained; with adapters it is the model without them.
    reference = e * whole if work.has_reference and not trained.lora_rank else 0
    return {
        "weights": weights,
        "reference": reference,
        "optimizer": 8 * trained_parameters(work) + masters,
    }


def _largest_trained(work: Workload) -> int:
    """Numbers in the largest tensor that is trained."""
    model, trained = work.model, work.trained
    merged = model.vision_hidden * model.merge_size**2
    return max(
        trained.lora_rank * model.intermediate if trained.lora_rank else model.vocabulary * model.hidden,
        trained.tower * model.vision_hidden * max(model.vision_intermediate, 3 * model.vision_hidden),
        trained.projector * merged * max(merged, model.hidden),
    )


def _gradient_bytes(work: Workload) -> int:
    """Gradients have the type of what they are of."""
    adapters = (
        lora_parameters(work.model, work.trained.lora_rank, work.trained.lora_targets) if work.trained.lora_rank else 0
    )
    return 4 * adapters + work.bytes * (trained_parameters(work) - adapters)


def kept_per_layer(work: Workload) -> int:
    """Bytes that autograd keeps of one decoder layer for a micro-batch.

    Full fine-tuning, per token: each norm its input in float32, its normalised input and its output; the MLP gate, its
    activation, up and their product; the input of the last projection of attention. With adapters the normalised
    inputs are not kept, but in bfloat16 each adapter keeps a float32 copy of its input (PEFT casts to the adapter's
    type). What attention itself keeps is in :func:`_kept_attention`.
    """
    h, i, e, rank = work.model.hidden, work.model.intermediate, work.bytes, work.trained.lora_rank
    per_token = 2 * 4 * h + 3 * i * e  # inputs of the norms; gate, its activation, up
    if rank:
        inputs: dict[str, int] = {}  # tensors that adapters read, by what they are
        for name in work.trained.lora_targets:
            source = {"o_proj": "attention", "down_proj": "product"}.get(name, name if work.is_bfloat16 else "")
            shared = source or ("first norm" if name in ("q_proj", "k_proj", "v_proj") else "second norm")
            inputs[shared] = work.model.linears[name][0]
        per_token += 4 * (sum(inputs.values()) + rank * len(work.trained.lora_targets))
    else:
        per_token += 5 * h * e + i * e
    return work.rows * work.row_tokens * per_token + _kept_attention(work)


def _kept_attention(work: Workload) -> int:
    """Bytes that the attention of one layer keeps: queries, keys, values, output, sums of its softmax.

    Packed, the keys and values of every completion with its prompt's once more, and where query heads share keys, the
    queries of the completions as well. Eager, the weights of all pairs in float32 and in the type of the model, and
    the mask is kept by each layer; that was not compared with measurements.
    """
    model, e = work.model, work.bytes
    tokens = work.rows * work.row_tokens
    kept = tokens * (2 * model.hidden + 2 * model.kv_hidden) * e + tokens * model.heads * 4
    if work.layout == "packed":
        completions = work.groups_per_micro_batch * work.generations
        kept += completions * (work.prompt_tokens + work.completion_tokens) * 2 * model.kv_hidden * e
        if model.kv_heads != model.heads:
            kept += completions * work.completion_tokens * model.hidden * e
    if work.layout == "rows":
        kept += work.rows * work.row_tokens**2 * (model.heads * (4 + e) + e)
    return kept


def _mask_bytes(work: Workload) -> int:
    """The mask of a pass. Packed, that of completions, as flags and as numbers for each query of a key; one for all of
    them where there is one prompt. Rows, a number for each pair of tokens."""
    model = work.model
    if work.layout == "separate":
        return 0
    if work.layout == "rows":
        return work.rows * work.row_tokens**2 * (1 + work.bytes)
    masks = 1 if work.groups_per_micro_batch == 1 else work.groups_per_micro_batch * work.generations
    pairs = work.completion_tokens * (work.prompt_tokens + work.completion_tokens)
    return masks * pairs * (1 + model.heads // model.kv_heads * work.bytes)


def _pass_bytes(work: Workload, tokens: int, joined: int = 0) -> int:
    """The most that a decoder layer needs at a time without gradients: its MLP, or attention with what it joins."""
    h, i, e = work.model.hidden, work.model.intermediate, work.bytes
    return max(tokens * (3 * i + 4 * h) * e, tokens * 7 * h * e + joined)


def _written_out(work: Workload) -> float:
    """Bytes of the largest matrix of weights in 4 bits while it is used, and of its constants in float32."""
    largest = max(inputs * outputs for inputs, outputs in work.model.linears.values())
    return work.is_4bit * largest * (work.bytes + 4 / 64)


def _kept_vision(work: Workload, images: int) -> int:
    """Bytes that autograd keeps of the tower and the projector for so many images."""
    if work.vision_is_frozen or not work.patches:
        return 0
    d, m, e = work.model.vision_hidden, work.model.vision_intermediate, work.bytes
    kept = 4 * d * e  # the merger: its input, the norm's output, the inputs of both of its other products
    if work.trained.tower:
        full = (13 * d + 4 * m) * e if work.model.vision_is_gated else (11 * d + 3 * m) * e
        if work.model.vision_is_gated and work.is_bfloat16:
            full += 2 * 2 * d  # inputs of RMS norms in float32
        layers = work.model.vision_layers
        kept += full + layers * d * e if work.trained.checkpointing else layers * full
        kept += work.model.patch_values * e
    return images * work.patches * kept


def _vision_pass(work: Workload, images: int) -> int:
    """The most that the tower needs at a time without gradients: a layer's MLP, and the pixels."""
    d, m, e = work.model.vision_hidden, work.model.vision_intermediate, work.bytes
    return images * work.patches * ((3 * m + 3 * d) * e + 4 * work.model.patch_values)


def memory(work: Workload, *, process: float) -> dict[str, dict[str, float]]:
    """Bytes by part at every moment at which memory can peak.

    Args:
        process: bytes that the process has before a model is loaded (on a GPU: the context).

    Returns:
        moment -> part -> bytes. A moment is a phase, ``rollout`` or ``update``, and what it does: ``rollout: decode``.
    """
    model, e = work.model, work.bytes
    h, words = model.hidden, model.vocabulary
    is_full = not work.trained.lora_rank
    static = {"process": process, **_static(work)}
    plain = work.generations * (work.prompt_tokens + work.completion_tokens)
    joined = (work.layout == "packed") * work.groups_per_micro_batch * work.generations * 2 * model.kv_hidden * e
    joined *= 2 * work.prompt_tokens + work.completion_tokens  # of every completion; its prompt's are repeated first
    gradients = _gradient_bytes(work)

    # Kept for the whole step: features of all prompts where the tower is frozen, and on a CPU the pixels, those of the
    # next step too.
    tokens_of_image = image_tokens(model, work.grids)
    features = work.prompts * tokens_of_image * h * e if work.vision_is_frozen else 0
    pixels = 0 if work.on_gpu else work.prompts * work.patches * model.patch_values * 4
    held = {"vision": features + pixels + min(pixels, work.prefetch_bytes)}

    batch = work.prompts_per_rollout_batch
    rows = batch * work.generations
    prefilled = batch * work.prompt_tokens * kv_bytes(model, e)
    written = _written_out(work)
    # A prompt's keys and values are stored once. Where prompts wait there are slots for twice as many as are completed
    # at a time, for when stragglers remain.
    slots = min(2 * batch, rows) if work.prompts > batch else batch
    cache = (slots * work.prompt_tokens + rows * work.completion_tokens) * kv_bytes(model, e)
    # Sampling works in float64 on all words: scores, mass, its sum, and a comparison or two.
    sampling = rows * words * (4 * 8 + e)

    tokens = work.rows * work.row_tokens
    scored = work.groups_per_micro_batch * work.generations * work.completion_tokens
    chunk = min(scored, max(1, LOGITS_PER_CHUNK // words))
    layer = kept_per_layer(work)
    rotations = 2 * tokens * (h // model.heads) * e
    kept = rotations + tokens * h * (4 + e * is_full) + scored * h * e  # final norm, states that predict
    kept += model.layers * tokens * h * e if work.trained.checkpointing else model.layers * layer
    kept += _mask_bytes(work)
    again = layer if work.trained.checkpointing else 0
    tower = _kept_vision(work, work.groups_per_micro_batch)
    carried = gradients if work.num_micro_batches > 1 else 0
    # The gradient of the output layer, one more while chunks are summed, and of the embedding at the end.
    head = words * h * e if is_full else 0
    # Gradients of the MLP's product, of its gate and of up; the product itself is gone by then.
    backward = tokens * (2 * model.intermediate + 2 * h) * e
    # The layer whose turn it is has no gradients yet. Where the embedding is the output layer, the gradient of one use
    # waits for that of the other, and both for their sum.
    nearly_all = carried + head if carried else gradients - is_full * gradients / model.layers
    all_but_embedding = carried or gradients - head
    step = 2 * (4 * trained_parameters(work) - gradients)  # float32 copies of gradients in two bytes
    # AdamW's square roots: of all parameters at once on a GPU, of one after the other on a CPU, twice.
    step += 4 * trained_parameters(work) if work.on_gpu else 2 * 4 * _largest_trained(work)

    def at(kv: float = work.keeps_cache * cache, **parts: float) -> dict[str, float]:
        named = {"gradients": 0.0, "KV cache": kv, "activations": 0.0, "logits": 0.0, **static, **held}
        for name, value in parts.items():
            named[name] += value
        return {name: float(named[name]) for name in PARTS}

    return {
        "rollout: vision": at(vision=_vision_pass(work, batch)),
        "rollout: prefill": at(
            kv=prefilled + work.keeps_cache * cache,
            activations=_pass_bytes(work, batch * work.prompt_tokens) + written,
        ),
        "rollout: decode": at(kv=prefilled + cache, logits=max(sampling, written)),  # one after the other
        "update: self-check": at(activations=work.checks_itself * (_pass_bytes(work, plain) + written)),
        "update: reference": at(
            activations=work.has_reference * (_pass_bytes(work, tokens, joined) + _mask_bytes(work) + written),
            vision=0 if work.vision_is_frozen else _vision_pass(work, work.groups_per_micro_batch),
        ),
        # Five tables of logits meet in the backward of the normaliser.
        "update: output layer": at(
            gradients=carried,
            activations=kept,
            logits=5 * 4 * chunk * words + 2 * head * (chunk < scored),
            vision=tower,
        ),
        "update: layers": at(gradients=carried + head, activations=kept + again + backward + written, vision=tower),
        "update: first layer": at(
            gradients=nearly_all, activations=layer + backward + written + tokens * h * e, vision=tower
        ),
        "update: embedding": at(
            gradients=all_but_embedding + (3 if model.is_tied else 1) * head,
            activations=tokens * h * e,
            vision=tower,
        ),
        "update: optimizer": at(gradients=gradients, optimizer=step),
    }


def peak(moments: Mapping[str, Mapping[str, float]], phase: str = "") -> str:
    """The moment of a phase (``rollout``, ``update``, or all) at which memory is largest."""
    return max((name for name in moments if name.startswith(phase)), key=lambda name: sum(moments[name].values()))
