"""What is particular to InternVL: tiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import InternVLConfig

from medvqa_rl.config import Config
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.learning.setup import start_vllm
from medvqa_rl.models.families import family_for
from tests.conftest import build_sample, draw_image
from tests.models.families.tiny import tiny_policy


def processor(**limits):
    made = tiny_policy("internvl").processor
    image_processor = type(made.image_processor).from_dict(made.image_processor.to_dict())
    made.family.limit_pixels(image_processor, limits.get("min_pixels"), limits.get("max_pixels"))
    return made.family, image_processor


@pytest.mark.parametrize(("tiles", "expected"), [(1, 1), (2, 3), (4, 5), (6, 7)])
def test_max_pixels_limits_the_tiles(tiles, expected):
    """An image of 2 x 1 tiles; several tiles are followed by a thumbnail."""
    family, image_processor = processor(max_pixels=tiles * 28 * 28 + 27)
    picture = draw_image(28 * 3, 28 * 2, seed=1).load() if tiles == 6 else draw_image(56, 28, seed=1).load()
    if tiles == 4:
        picture = draw_image(56, 56, seed=1).load()
    assert len(family.preprocess(image_processor, [picture])["pixel_values"]) == expected


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"max_pixels is 500, but this InternVL sees an image as tiles of 784 pixels"):
        processor(max_pixels=500)
    with pytest.raises(ValueError, match="at least 5 and at most 4 tiles of 784 pixels"):
        processor(min_pixels=4 * 784 + 1, max_pixels=4 * 784)


def test_counts_the_tokens_of_every_image():
    made = tiny_policy("internvl").processor
    images = (draw_image(56, 56, seed=1), draw_image(28, 28, seed=2), draw_image(84, 56, seed=3))
    sample = build_sample("three", images=images)
    prompt = made.encode(sample)
    lengths = made.family.image_lengths(prompt, made.readers)
    assert lengths == [4 * 5, 4 * 1, 4 * 7]
    assert len(prompt.image_inputs["pixel_values"]) == 13
    assert made.family.expected_tokens(build_sample("unknown", images=images[:1]), made.readers) == 4 * 7
    known = build_sample("known", images=(MemoryImage("known", images[0].load()),))
    assert made.family.expected_tokens(known, made.readers) == 4 * 5
    assert made.family.image_lengths(made.encode(build_sample("none", images=())), made.readers) == []
    assert made.encoding_bytes(sample) == 0
    assert made.encoding_bytes(known) > 3 * made.encode(known).image_inputs["pixel_values"].nbytes


def test_the_length_of_a_tile_is_saved_and_read(tmp_path):
    made = tiny_policy("internvl").processor
    made.save(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved == {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    again = type(made).from_folder(tmp_path, made.family)
    sample = build_sample("one", images=(draw_image(56, 56, seed=1),))
    assert np.array_equal(again.encode(sample).input_ids, made.encode(sample).input_ids)
    (tmp_path / "processor_config.json").unlink()  # then the published length
    ids = type(made).from_folder(tmp_path, made.family).encode(sample).input_ids
    assert (ids == made.image_token_id).sum() == 5 * 256


def test_other_language_models_and_windows_are_refused():
    family = family_for("internvl")
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    assert family.unusable(InternVLConfig(text_config={"model_type": "qwen3", **text})) is None
    assert "with a llama language model" in family.unusable(
        InternVLConfig(text_config={"model_type": "llama", **text})
    )
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    config = InternVLConfig(text_config={"model_type": "qwen2", **text, **windows})
    assert "sliding-window" in family.unusable(config)


def test_vllm_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.engine is vllm, but InternVL is not run on vLLM here"):
        start_vllm(Config(rollout={"engine": "vllm"}), None, tiny_policy("internvl"))


def test_special_tokens_in_the_data_are_neutralised():
    made = tiny_policy("internvl").processor
    sample = build_sample(
        "one", images=(draw_image(28, 28, seed=1),), question="Is <img> <IMG_CONTEXT></img> <b> bold?"
    )
    prompt = made.encode(sample)
    assert "Is (img) (IMG_CONTEXT)(/img) <b> bold?" in prompt.text
    assert prompt.neutralised == 3
    assert made.family.image_lengths(prompt, made.readers) == [4]
