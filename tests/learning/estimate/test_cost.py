"""Costs computed from config.json equal those of real models: parameters, and FLOPs as counted by torch."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache
from transformers.vision_utils import get_vision_window_index

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.estimate.cost import (
    Shape,
    Trained,
    backward_flops,
    decode_bytes,
    decode_flops,
    forward_flops,
    group_pairs,
    image_tokens,
    lora_flops,
    lora_parameters,
    projector_flops,
    recompute_flops,
    tower_flops,
    vision_pairs,
)
from medvqa_rl.learning.objective.logprobs import collate
from medvqa_rl.models.cache import cache_argument
from medvqa_rl.models.families.costs import read_architecture
from medvqa_rl.models.families.parts import backbone, causal_model
from medvqa_rl.models.prefix.group_attention import attention_mask

BOTH = pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
TARGETS = LoraConfig().targets
QWEN2_VL_2B = {  # config.json of Qwen/Qwen2-VL-2B-Instruct: the language model's sizes at the top level
    **{"model_type": "qwen2_vl", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960},
    **{"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN2_5_VL_7B = {
    **{"model_type": "qwen2_5_vl", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "vision_config": {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
        **{"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}

WINDOWED = read_architecture(QWEN2_5_VL_7B)


def architecture(model):
    """The dimensions in the config.json that the model would be saved with."""
    return read_architecture(json.loads(causal_model(model).config.to_json_string(use_diff=False)))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def parts(model):
    """Parameters of a real model by part."""
    visual, text = model.model.visual, model.model.language_model
    head = 0 if model.lm_head.weight is text.embed_tokens.weight else count(model.lm_head)
    return (
        count(text.layers) + count(text.norm),
        count(text.embed_tokens),
        head,
        count(visual.patch_embed) + count(visual.blocks),
        count(visual.merger),
    )


@pytest.mark.parametrize(
    ("config", "kind", "settings", "total"),
    [
        (Qwen2VLConfig, Qwen2VLForConditionalGeneration, QWEN2_VL_2B, 2_208_985_600),
        (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, QWEN2_5_VL_7B, 8_292_166_656),
    ],
)
def test_parameters_of_published_models(config, kind, settings, total):
    with torch.device("meta"):
        model = kind(config(**settings))
        model.tie_weights()
    counted = read_architecture(settings).parameters
    assert tuple(counted) == parts(model)
    assert sum(counted) == count(model) == total  # as the Hub shows for these checkpoints
    assert architecture(model) == read_architecture(settings)


def test_the_published_config_file(shared_data):
    config = json.loads((shared_data / "qwen2_vl" / "instruct" / "config.json").read_text())
    assert read_architecture(config) == read_architecture(QWEN2_VL_2B)


@BOTH
def test_parameters_of_tiny_models(tiny_policy, arch):
    model = tiny_policy(arch).model
    counted = architecture(model).parameters
    assert tuple(counted) == parts(model)
    assert (counted.language, counted.vision) == (count(model.model.language_model), count(model.model.visual))


@BOTH
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")])
def test_lora_parameters(tiny_policy, arch, targets):
    policy = tiny_policy(arch, lora=LoraConfig(rank=3, targets=targets))
    added = sum(p.numel() for name, p in policy.model.named_parameters() if ".lora_" in name)
    assert lora_parameters(architecture(policy.model), 3, targets) == added


def test_unknown_targets_are_refused(tiny_policy):
    with pytest.raises(ValueError, match=r"names qkv, but the linear layers .* are down_proj, gate_proj"):
        lora_parameters(architecture(tiny_policy().model), 3, ("qkv", "q_proj"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "of a llava model, but estimates are for Qwen2-VL"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"vision_config": 7}, "describes no Qwen2-VL model"),
        ({"hidden_size": -4}, "describes no Qwen2-VL model"),
        ({"num_hidden_layers": 2.5}, "Field 'num_hidden_layers' expected int, got float"),
        ({"vocab_size": True}, "Field 'vocab_size' expected int, got bool"),
    ],
)
def test_other_config_files_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        read_architecture(QWEN2_VL_2B | change)


def torch_flops(run):
    """FLOPs as counted by torch, with attention as two products forward and four backward."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops()


def a_prompt(policy, make_sample, make_image):
    """An image of 3 x 5 merged patches, whose windows of 56 pixels are cropped at two edges."""
    prompt = policy.processor.encode(make_sample(images=(make_image(140, 84),)))
    (grid,) = prompt.image_inputs["image_grid_thw"][:, 1:].tolist()
    return prompt, (tuple(grid),)


@BOTH
def test_vision_flops(tiny_policy, make_sample, make_image, arch):
    policy = tiny_policy(arch)
    prompt, grids = a_prompt(policy, make_sample, make_image)
    assert grids == ((6, 10),)
    model = architecture(policy.model)
    with torch.no_grad():
        counted = torch_flops(lambda: policy.family.image_features(policy.model, [prompt], "cpu"))
    assert tower_flops(model, grids) + projector_flops(model, grids) == counted
    (features,) = policy.family.image_features(policy.model, [prompt], "cpu")
    assert image_tokens(model, grids) == len(features) == 15


SOME = LoraConfig(rank=3, targets=("q_proj", "down_proj"))
OTHERS = LoraConfig(rank=3, targets=("v_proj", "o_proj"))


@pytest.mark.parametrize(
    ("arch", "lora", "tower", "projector", "checkpointing"),
    [
        *(("qwen2_vl", lora, False, False, False) for lora in (None, LoraConfig(rank=3), SOME, OTHERS)),
        *(("qwen2_vl", lora, False, False, True) for lora in (None, LoraConfig(rank=3), SOME, OTHERS)),
        *(("qwen2_vl", None, tower, projector, False) for tower, projector in ((True, False), (False, True))),
        *(("qwen2_vl", lora, True, True, True) for lora in (None, LoraConfig(rank=3))),
        *(("qwen2_5_vl", None, True, tower, tower) for tower in (False, True)),
        ("qwen2_5_vl", LoraConfig(rank=3), False, False, True),
    ],
)
def test_flops_of_forward_and_backward(
    tiny_policy, model_inputs, make_sample, make_image, arch, lora, tower, projector, checkpointing
):
    policy = tiny_policy(
        arch, lora=lora, train_vision=tower, train_projector=projector, gradient_checkpointing=checkpointing
    )
    policy.model.train()
    prompt, grids = a_prompt(policy, make_sample, make_image)
    inputs = model_inputs(causal_model(policy.model), prompt, tuple(range(20)))
    length = inputs["input_ids"].shape[1]
    model = architecture(policy.model)
    trained = Trained(3 if lora else 0, lora.targets if lora else (), tower, projector, checkpointing)
    shape = Shape(tokens=length, pairs=length * length, scored=length, grids=grids)
    expected = forward_flops(model, shape, trained)

    with torch.no_grad():
        assert torch_flops(lambda: policy.model(**inputs, use_cache=False)) == expected
    expected += backward_flops(model, shape, trained, attention=2.0) + recompute_flops(model, shape, trained)
    if lora and not tower and not projector:
        # Unlike a fused kernel, separate products skip the gradients of keys and values that need none.
        expected -= 2 * model.hidden * shape.pairs * len({"k_proj", "v_proj"} - set(lora.targets))
        # Without a gradient of queries and keys, the scores have none either.
        if not {"q_proj", "k_proj"} & set(lora.targets):
            expected -= 2 * 2 * model.hidden * shape.pairs
    assert torch_flops(lambda: policy.model(**inputs, use_cache=False).logits.sum().backward()) == expected


def test_decoding_flops(tiny_policy):
    policy = tiny_policy()
    model = architecture(policy.model)
    text = backbone(policy.model).language_model
    ids = torch.zeros(3, 7, dtype=torch.long)
    with torch.no_grad():
        cache = cache_argument(text, DynamicCache())
        text(input_ids=ids, use_cache=True, **cache)
        counted = torch_flops(lambda: policy.model.lm_head(text(input_ids=ids[:, :1], **cache).last_hidden_state))
    assert decode_flops(model, rows=3, keys=8) == counted


def test_decoding_reads_the_weights_and_the_cache(tiny_policy):
    policy = tiny_policy()
    text = backbone(policy.model).language_model
    cache = DynamicCache()
    text(input_ids=torch.zeros(3, 7, dtype=torch.long), use_cache=True, **cache_argument(text, cache))
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    weights = count(text.layers) + count(text.norm) + policy.model.lm_head.weight.numel()
    assert decode_bytes(architecture(policy.model), keys=21, bytes_per_number=4) == 4 * (weights + numbers)


@given(st.integers(1, 30), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_pairs_equal_the_mask(prompt, completions):
    segments = torch.tensor([[0] * prompt + [s for s, n in enumerate(completions, start=1) for _ in range(n)]])
    assert group_pairs(prompt, completions) == int(attention_mask(segments).sum())


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3))
def test_windows_equal_those_of_transformers(sides):
    grids = [(2 * down, 2 * across) for down, across in sides]
    whole = sum((down * across) ** 2 for down, across in grids)
    _, edges = get_vision_window_index(torch.tensor([(1, *grid) for grid in grids]), 2, 112, 14)
    windows = sum((end - start) ** 2 for start, end in pairwise(edges.tolist()))
    assert vision_pairs(WINDOWED, grids) == 4 * whole + 28 * windows


def test_pairs_of_a_collated_batch(tiny_policy, make_sample):
    """The formulas count what the update runs."""
    policy = tiny_policy()
    prompt = policy.processor.encode(make_sample())
    group = Group(make_sample(), prompt, [Completion(tuple(range(n)), "", False) for n in (3, 5, 4)])
    together, apart = (collate([group], policy.processor, "cpu", layout=layout) for layout in ("rows", "separate"))
    length = len(prompt.input_ids)
    assert together.input_ids.numel() == length + 12
    assert int(attention_mask(together.segments).sum()) == group_pairs(length, (3, 5, 4))
    is_causal = np.tri(length + 5, dtype=bool) & (apart.segments.numpy()[:, None, :] >= 0)
    assert (is_causal & (apart.segments.numpy()[:, :, None] >= 0)).sum() == group_pairs(
        0, [length + 3, length + 5, length + 4]
    )


def test_lora_flops():
    model = read_architecture(QWEN2_VL_2B)
    assert lora_flops(model, 16, TARGETS, 10) == 20 * lora_parameters(model, 16, TARGETS)
    assert (
        lora_parameters(model, 16, TARGETS) == 18_464_768
    )  # as PEFT prints for Qwen2-1.5B, which is this language model
