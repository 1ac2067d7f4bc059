"""Memory of a training step by part, before it runs. Imports no torch.

The tensors saved by autograd were counted one by one (``saved_tensors_hooks``), and the moments at which memory peaks
were found with torch's allocation profiler, on a CPU in float32 and bfloat16; docs/estimate.md has the comparison.
What a GPU adds (AdamW's batched temporaries, the CUDA context) and what sharding saves are derived from the code, not
measured.

Legend: h hidden size, i intermediate size, d and m the same of the vision tower; e bytes per weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from medvqa_rl.learning.estimate.cost import (
    BYTES_IN_4BIT,
    image_tokens,
    kv_bytes,
    layer_weights,
    lora_parameters,
)
from medvqa_rl.learning.estimate.workload import Workload, trained_parameters
from medvqa_rl.learning.objective.layout import Layout

LOGITS_PER_CHUNK = 2**25
"""As in ``learning.objective.logprobs``, which imports torch; a test checks that they are equal."""

PARTS = ("process", "weights", "reference", "optimizer", "gradients", "KV cache", "activations", "logits", "vision")
"""What memory is used for, in the order of the printed table."""


def _static(work: Workload) -> dict[str, float]:
    """Bytes that are allocated all the time."""
    counts, trained, e = work.model.parameters, work.trained, work.bytes
    weights = sum(counts) * e - work.is_4bit * layer_weights(work.model) * (e - BYTES_IN_4BIT)
    adapters = 0
    if trained.lora_rank:
        # PEFT keeps adapters in float32 whatever the model's dtype, and trains copies of modules_to_save.
        adapters = lora_parameters(work.model, trained.lora_rank, trained.lora_targets)
        weights += 4 * adapters + e * (trained.tower * counts.tower + trained.projector * counts.projector)
    whole = trained_parameters(work) - adapters
    masters = 4 * whole if work.is_bfloat16 else 0
    # In full fine-tuning the reference copies the trained weights; with LoRA it is the model without adapters.
    reference = e * whole if work.has_reference and not trained.lora_rank else 0
    share = 1 / work.ranks if work.shards_state else 1
    return {
        "weights": weights / work.ranks if work.shards_weights else weights,
        "reference": share * reference,
        "optimizer": share * (8 * trained_parameters(work) + masters),
    }


def _gathered(work: Workload) -> tuple[float, float]:
    """Bytes of the weights that a rank gathers: all of them where nothing needs gradients, and in the update those of
    a decoder layer and the next one, or of the embedding."""
    if not work.shards_weights:
        return 0.0, 0.0
    model, e = work.model, work.bytes
    layers = 2 * layer_weights(model) / model.layers
    return float(sum(model.parameters) * e), max(layers, model.vocabulary * model.hidden) * e


def _largest_trained(work: Workload) -> int:
    """Number of elements of the largest trained tensor."""
    model, trained = work.model, work.trained
    return max(
        trained.lora_rank * model.intermediate if trained.lora_rank else model.vocabulary * model.hidden,
        trained.tower * model.vision_hidden * max(model.vision_intermediate, 3 * model.vision_hidden),
        trained.projector * model.largest_projector_weight,
    )


def _gradient_bytes(work: Workload) -> int:
    """Bytes of the gradients, each in the dtype of its parameter; a rank's part if they are sharded."""
    adapters = (
        lora_parameters(work.model, work.trained.lora_rank, work.trained.lora_targets) if work.trained.lora_rank else 0
    )
    whole = 4 * adapters + work.bytes * (trained_parameters(work) - adapters)
    return whole // work.ranks if work.shards_state else whole


def saved_per_layer(work: Workload) -> int:
    """Bytes that autograd saves per decoder layer for a micro-batch.

    Full fine-tuning saves per token: of each norm the input in float32, the normalised input and the output; the MLP's
    gate, its activation, up and their product; the input of attention's output projection. LoRA does not save the
    normalised inputs, but in bfloat16 each adapter saves a float32 copy of its input, because PEFT casts to the
    adapter's dtype. What attention itself saves is in :func:`_saved_attention`.
    """
    h, i, e, rank = work.model.hidden, work.model.intermediate, work.bytes, work.trained.lora_rank
    per_token = 2 * 4 * h + 3 * i * e  # inputs of the norms; gate, its activation, up
    if rank:
        inputs: dict[str, int] = {}  # distinct inputs of adapters, by name
        for name in work.trained.lora_targets:
            source = {"o_proj": "attention", "down_proj": "product"}.get(name, name if work.is_bfloat16 else "")
            shared = source or ("first norm" if name in ("q_proj", "k_proj", "v_proj") else "second norm")
            inputs[shared] = work.model.linears[name][0]
        per_token += 4 * (sum(inputs.values()) + rank * len(work.trained.lora_targets))
    else:
        per_token += 5 * h * e + i * e
    return work.rows * work.row_tokens * per_token + _saved_attention(work)


def _saved_attention(work: Workload) -> int:
    """Bytes that the attention of one layer saves: queries, keys, values, output, and the sums of its softmax.

    The packed layout also saves each completion's keys and values joined to its prompt's and, with grouped-query
    attention, the queries of the completions. Eager attention saves the weights of all pairs in float32 and in the
    model's dtype, and the mask in each layer; that was not compared with measurements.
    """
    model, e = work.model, work.bytes
    tokens = work.rows * work.row_tokens
    saved = tokens * (2 * model.query_hidden + 2 * model.kv_hidden) * e + tokens * model.heads * 4
    if work.layout == Layout.PACKED:
        completions = work.groups_per_micro_batch * work.generations
        saved += completions * (work.prompt_tokens + work.completion_tokens) * 2 * model.kv_hidden * e
        if model.kv_heads != model.heads:
            saved += completions * work.completion_tokens * model.query_hidden * e
    if work.layout == Layout.ROWS:
        saved += work.rows * work.row_tokens**2 * (model.heads * (4 + e) + e)
    return saved


def _mask_bytes(work: Workload) -> int:
    """Bytes of the attention mask. Packed: completions only, boolean and additive, the latter for each query head of a
    key head; a single prompt needs one mask for all completions. Rows: one value per pair of tokens."""
    model = work.model
    if work.layout == Layout.SEPARATE:
        return 0
    if work.layout == Layout.ROWS:
        return work.rows * work.row_tokens**2 * (1 + work.bytes)
    masks = 1 if work.groups_per_micro_batch == 1 else work.groups_per_micro_batch * work.generations
    pairs = work.completion_tokens * (work.prompt_tokens + work.completion_tokens)
    return masks * pairs * (1 + model.heads // model.kv_heads * work.bytes)


def _pass_bytes(work: Workload, tokens: int, joined: int = 0) -> int:
    """Peak bytes of a decoder layer without gradients: of its MLP, or of attention with the tensors it joins."""
    h, i, e = work.model.hidden, work.model.intermediate, work.bytes
    return max(tokens * (3 * i + 4 * h) * e, tokens * 7 * h * e + joined)


def _dequantized(work: Workload) -> float:
    """Bytes of the largest 4-bit matrix when dequantized, and of its scales in float32."""
    largest = max(inputs * outputs for inputs, outputs in work.model.linears.values())
    return work.is_4bit * largest * (work.bytes + 4 / 64)


def _saved_vision(work: Workload, images: int) -> int:
    """Bytes that autograd saves in vision tower and projector for a number of images."""
    if work.vision_is_frozen or not work.patches:
        return 0
    d, m, e = work.model.vision_hidden, work.model.vision_intermediate, work.bytes
    saved = 4 * d * e  # the projector: its input, the norm's output, the inputs of both linear layers
    if work.trained.tower:
        full = (13 * d + 4 * m) * e if work.model.vision_is_gated else (11 * d + 3 * m) * e
        if work.model.vision_is_gated and work.is_bfloat16:
            full += 2 * 2 * d  # inputs of RMS norms in float32
        layers = work.model.vision_layers
        saved += full + layers * d * e if work.trained.checkpointing else layers * full
        saved += work.model.patch_values * e
    return images * work.patches * saved


def _vision_pass(work: Workload, images: int) -> int:
    """Peak bytes of the vision tower without gradients: the MLP of a layer, and the pixels."""
    d, m, e = work.model.vision_hidden, work.model.vision_intermediate, work.bytes
    return images * work.patches * ((3 * m + 3 * d) * e + 4 * work.model.patch_values)


def step_memory(work: Workload, *, process: float) -> dict[str, dict[str, float]]:
    """Estimate the memory of a step at each moment at which it can peak.

    Args:
        work: the step.
        process: bytes of the process before a model is loaded (on a GPU: the CUDA context).

    Returns:
        moment -> part -> bytes. A moment is named by phase and work, such as ``rollout: decode``.
    """
    model, e = work.model, work.bytes
    h, words = model.hidden, model.vocabulary
    is_full = not work.trained.lora_rank
    static = {"process": process, **_static(work)}
    plain = work.generations * (work.prompt_tokens + work.completion_tokens)
    joined = (work.layout == Layout.PACKED) * work.groups_per_micro_batch * work.generations * 2 * model.kv_hidden * e
    joined *= 2 * work.prompt_tokens + work.completion_tokens  # per completion; the prompt's are repeated first
    gradients = _gradient_bytes(work)

    # Held for the whole step: cached features if the tower is frozen and, on a CPU, pixels, including prefetched ones.
    tokens_of_image = image_tokens(model, work.grids)
    features = work.prompts * tokens_of_image * h * e if work.vision_is_frozen else 0
    pixels = 0 if work.on_gpu else work.prompts * work.patches * model.patch_values * 4
    held = {"vision": features + pixels + min(pixels, work.prefetch_bytes)}

    batch = work.prompts_per_rollout_batch
    rows = batch * work.generations
    prefilled = batch * work.prompt_tokens * kv_bytes(model, e)
    dequantized = _dequantized(work)
    # A prompt's keys and values are stored once. If prompts wait, there are slots for twice as many as are decoded at
    # a time (see RolloutEngine).
    slots = min(2 * batch, rows) if work.prompts > batch else batch
    cache = (slots * work.prompt_tokens + rows * work.completion_tokens) * kv_bytes(model, e)
    # Sampling works on the whole vocabulary in float64: scores, mass, its cumulative sum, and comparisons.
    sampling = rows * words * (4 * 8 + e)

    tokens = work.rows * work.row_tokens
    scored = work.groups_per_micro_batch * work.generations * work.completion_tokens
    chunk = min(scored, max(1, LOGITS_PER_CHUNK // words))
    layer = saved_per_layer(work)
    rotations = 2 * tokens * model.head_size * e
    saved = rotations + tokens * h * (4 + e * is_full) + scored * h * e  # final norm, hidden states of scored tokens
    saved += model.layers * tokens * h * e if work.trained.checkpointing else model.layers * layer
    saved += _mask_bytes(work)
    again = layer if work.trained.checkpointing else 0
    tower = _saved_vision(work, work.groups_per_micro_batch)
    carried = gradients if work.num_micro_batches > 1 else 0
    # The gradient of the output layer, a second one while chunks are summed, and that of the embedding at the end.
    head = words * h * e if is_full else 0
    # Gradients of the MLP's product, gate and up; the product itself is freed by then.
    backward = tokens * (2 * model.intermediate + 2 * h) * e
    # The current layer has no gradients yet. If the embedding is also the output layer, the gradients of both uses and
    # their sum exist at once.
    nearly_all = carried + head if carried else gradients - is_full * gradients / model.layers
    all_but_embedding = carried or max(0, gradients - head)
    updated = trained_parameters(work) / (work.ranks if work.shards_state else 1)
    step = 2 * (4 * updated - gradients)  # float32 copies of bfloat16 gradients
    # AdamW's square roots: of all parameters at once on a GPU, two of one parameter at a time on a CPU.
    step += 4 * updated if work.on_gpu else 2 * 4 * _largest_trained(work)
    everything, some = _gathered(work)

    def moment(kv: float = work.keeps_cache * cache, gathered: float = some, **parts: float) -> dict[str, float]:
        named = {"gradients": 0.0, "KV cache": kv, "activations": 0.0, "logits": 0.0, **static, **held}
        for name, value in (*parts.items(), ("weights", gathered)):
            named[name] += value
        return {name: float(named[name]) for name in PARTS}

    return {
        "rollout: vision": moment(gathered=everything, vision=_vision_pass(work, batch)),
        "rollout: prefill": moment(
            gathered=everything,
            kv=prefilled + work.keeps_cache * cache,
            activations=_pass_bytes(work, batch * work.prompt_tokens) + dequantized,
        ),
        "rollout: decode": moment(
            gathered=everything, kv=prefilled + cache, logits=max(sampling, dequantized)
        ),  # not at the same time
        "update: self-check": moment(
            gathered=everything, activations=work.checks_itself * (_pass_bytes(work, plain) + dequantized)
        ),
        "update: reference": moment(
            gathered=everything,
            activations=work.has_reference * (_pass_bytes(work, tokens, joined) + _mask_bytes(work) + dequantized),
            vision=0 if work.vision_is_frozen else _vision_pass(work, work.groups_per_micro_batch),
        ),
        # Logits, probabilities and their product. The layers need less in this pass than with gradients.
        "update: entropy": moment(
            activations=work.has_entropy_pass * scored * h * e,
            logits=work.has_entropy_pass * 3 * 4 * chunk * words,
        ),
        # Five logits-sized tensors exist at once in the backward pass of the log-normaliser, also with that of the
        # entropy.
        "update: output layer": moment(
            gradients=carried,
            activations=saved,
            logits=5 * 4 * chunk * words + 2 * head * (chunk < scored),
            vision=tower,
        ),
        "update: layers": moment(
            gradients=carried + head, activations=saved + again + backward + dequantized, vision=tower
        ),
        "update: first layer": moment(
            gradients=nearly_all, activations=layer + backward + dequantized + tokens * h * e, vision=tower
        ),
        "update: embedding": moment(
            gradients=all_but_embedding + (3 if model.is_tied else 1) * head,
            activations=tokens * h * e,
            vision=tower,
        ),
        "update: optimizer": moment(gathered=0.0, gradients=gradients, optimizer=step),
    }


def peak(moments: Mapping[str, Mapping[str, float]], phase: str = "") -> str:
    """The moment of a phase (``rollout``, ``update``, or any) with the most memory."""
    return max((name for name in moments if name.startswith(phase)), key=lambda name: sum(moments[name].values()))
