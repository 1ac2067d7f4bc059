"""The parts of vLLM that need no engine, against what is sent to it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medvqa_rl.config import LoraConfig, RolloutConfig
from medvqa_rl.rollout.vllm.engine import LORA_RANKS, VllmEngine, collapsed, write_adapter
from medvqa_rl.rollout.vllm.server import as_url

FAKES = Path(__file__).parents[1] / "fakes"


@pytest.fixture
def params(tiny_policy) -> dict[str, Any]:
    engine = VllmEngine(tiny_policy(), SimpleNamespace())
    return engine._params(RolloutConfig(), (0, "train", 1, "sample", 0))


def test_signatures_equal_those_of_the_stand_in():
    """Also fields and routes; the release may have more."""
    import vllm

    spec = importlib.util.spec_from_file_location("released", FAKES / "released.py")
    released = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(released)
    found = released.read(Path(vllm.__file__).parents[1])
    known = json.loads((FAKES / "released.json").read_text())
    for name, function in known["functions"].items():
        own = {row[0]: row for row in found["functions"][name]["parameters"]}
        assert all(own[row[0]] == row for row in function["parameters"]), name
    for name, fields in known["fields"].items():
        assert set(fields["names"]) <= set(found["fields"][name]["names"]), name
    assert known["routes"].keys() <= found["routes"].keys()


def test_requests_are_accepted(params, mixed_samples, tiny_policy):
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.sampling_params import SamplingParams

    assert SamplingParams(**params).logit_bias == params["logit_bias"]
    processor = tiny_policy().processor
    for sample in mixed_samples:
        prompt = processor.encode(sample)
        body = {
            "token_ids": collapsed(prompt, processor),
            "sampling_params": params,
            "return_token_ids": True,
            "model": "policy",
            "content_parts": [{"type": "image_url", "url": as_url(image)} for image in sample.images],
        }
        request = GenerateRequest.model_validate_json(json.dumps(body))
        for name, value in params.items():
            assert getattr(request.sampling_params, name) == value, name


def test_adapters_are_accepted(tiny_policy, tmp_path):
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import parse_fine_tuned_lora_name
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration as Released

    policy = tiny_policy(lora=LoraConfig(rank=2), train_projector=True)
    write_adapter(policy, tmp_path)
    helper = PEFTHelper.from_local_dir(str(tmp_path), 2048)
    helper.validate_legal(LoRAConfig(max_lora_rank=LORA_RANKS[0]))
    assert (helper.r, helper.lora_alpha, helper.modules_to_save) == (2, 32, None)
    mapper = Released.hf_to_vllm_mapper.get_rename_mapper()
    for name in load_file(tmp_path / "adapter_model.safetensors"):
        module, _ = parse_fine_tuned_lora_name(name, mapper)
        assert module.startswith("language_model.model.layers.") and module.endswith("_proj"), module


def test_weight_names_are_known(tiny_policy):
    from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration as Released

    names = [name for name, _ in tiny_policy().model.named_parameters()]
    mapped = {Released.hf_to_vllm_mapper._map_name(name) for name in names}
    parts = {".".join(name.split(".")[:2]) for name in mapped}
    assert parts == {"language_model.model", "visual.blocks", "visual.merger", "visual.patch_embed"}


def test_prompts_expand_to_those_of_training(tiny_policy, tiny_folder, mixed_samples):
    """Placeholders, features and positions from vLLM's own processor, which does not process features."""
    from transformers import AutoConfig, AutoTokenizer
    from vllm.config.multimodal import MultiModalConfig
    from vllm.model_executor.models.qwen2_vl import (
        Qwen2VLForConditionalGeneration,
        Qwen2VLMultiModalProcessor,
        Qwen2VLProcessingInfo,
    )
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.multimodal.processing.context import InputProcessingContext

    policy, folder = tiny_policy(), tiny_folder("qwen2_vl")
    config = AutoConfig.from_pretrained(folder)
    multimodal = MultiModalConfig(enable_mm_embeds=True)
    model_config = SimpleNamespace(
        multimodal_config=multimodal,
        get_multimodal_config=lambda: multimodal,
        get_inputs_embeds_size=lambda: config.text_config.hidden_size,
        model="tiny",
        max_model_len=2048,
        skip_tokenizer_init=False,
        encoder_config=None,
    )
    info = Qwen2VLProcessingInfo(InputProcessingContext(model_config, AutoTokenizer.from_pretrained(folder)))
    image_processor = SimpleNamespace(merge_size=2)
    stock = SimpleNamespace(image_token="<|image_pad|>", video_token="<|video_pad|>", image_processor=image_processor)
    info.get_hf_config = lambda: config
    info.get_hf_processor = lambda **kwargs: stock
    info.get_image_processor = lambda **kwargs: image_processor
    process = Qwen2VLMultiModalProcessor(info, SimpleNamespace())
    model = SimpleNamespace(config=config)
    model.iter_mm_grid_thw = lambda found: Qwen2VLForConditionalGeneration.iter_mm_grid_thw(model, found)
    for sample in (sample for sample in mixed_samples if sample.images):
        prompt = policy.processor.encode(sample)
        with torch.no_grad():
            (features,) = policy.family.image_features(policy.model, [prompt], "cpu")
        given = {"image_embeds": features, "image_grid_thw": torch.from_numpy(prompt.image_inputs["image_grid_thw"])}
        found = process(collapsed(prompt, policy.processor), info.parse_mm_data({"image": given}))
        assert found["prompt_token_ids"] == prompt.input_ids.tolist()
        items, places = found["mm_kwargs"]["image"], found["mm_placeholders"]["image"]
        assert torch.equal(torch.cat([item["image_embeds"].data for item in items]), features)
        specs = [
            MultiModalFeatureSpec(data=item, modality="image", identifier="", mm_position=place)
            for item, place in zip(items, places, strict=True)
        ]
        positions, delta = Qwen2VLForConditionalGeneration.get_mrope_input_positions(
            model, found["prompt_token_ids"], specs
        )
        expected = policy.processor.positions(prompt)
        assert np.array_equal(positions.numpy(), expected)
        assert int(delta) == expected.max() + 1 - len(prompt.input_ids)
