"""Prompts and positions equal those of transformers; wrong files are refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medvqa_rl.config import ModelConfig
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import load_policy
from medvqa_rl.models.processor import Processor

BOTH = pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])


def test_real_qwen2_vl_prompt(shared_data, make_sample, make_image):
    folder = shared_data / "qwen2_vl" / "instruct"
    processor = Processor.from_folder(folder, Qwen2VL())
    sample = make_sample(images=(make_image(640, 480), make_image(300, 200)), options=("left lung", "right lung"))
    prompt = processor.encode(sample)

    assert processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 12845056}
    tokens = [int(t * h * w) // 4 for t, h, w in prompt.image_inputs["image_grid_thw"]]
    assert tokens == [(480 // 28) * (644 // 28), (196 // 28) * (308 // 28)]  # rounded to multiples of 28
    expanded = prompt.text
    for count in tokens:  # as Qwen2VLProcessor does it: one placeholder after the other, in the text
        expanded = expanded.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
    expanded = expanded.replace("<|placeholder|>", "<|image_pad|>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert prompt.input_ids.tolist() == tokenizer(expanded)["input_ids"]
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        "Is there an effusion?\nA: left lung\nB: right lung\nAnswer with the letter.\n"
        "Think in <think></think>, then answer in <answer></answer>.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.image_inputs["pixel_values"].shape == (sum(tokens) * 4, 3 * 2 * 14 * 14)


def test_real_qwen2_vl_text_prompt_equals_apply_chat_template(shared_data, make_sample):
    processor = Processor.from_folder(shared_data / "qwen2_vl" / "instruct", Qwen2VL())
    sample = make_sample(images=(), question="Wo ist die Läsion? \u2192 links")
    question = sample.question + "\nThink in <think></think>, then answer in <answer></answer>."
    messages = [{"role": "user", "content": question}]
    expected = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert processor.encode(sample).input_ids.tolist() == expected["input_ids"]


def test_real_qwen2_vl_control_tokens(shared_data):
    processor = Processor.from_folder(shared_data / "qwen2_vl" / "instruct", Qwen2VL())
    assert processor.eos_id == 151645
    assert processor.stop_ids == (151645, 151643)
    assert processor.suppressed_ids == (151644, *range(151646, 151657))
    assert processor.decode(processor.encode_completion("<think>a</think>")) == "<think>a</think>"


@BOTH
def test_tags_are_samplable_and_control_tokens_are_not(arch, tiny_policy):
    processor = tiny_policy(arch).processor
    tokenizer = processor.tokenizer
    tags = {tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")}
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert set(processor.suppressed_ids) == special - {processor.eos_id}
    assert not tags & set(processor.suppressed_ids)
    text = "<think>opacity</think><answer>yes</answer>"
    ids = processor.encode_completion(text)
    assert tags <= set(ids)
    assert ids[-1] == processor.eos_id
    assert processor.decode(ids) == text


def test_each_image_is_loaded_once(tiny_policy, mixed_samples):
    processor = tiny_policy().processor
    for sample in mixed_samples:
        prompt = processor.encode(sample)
        assert [image.loads for image in sample.images] == [1] * len(sample.images)
        count = int((prompt.input_ids == processor.image_token_id).sum())
        assert count == (0 if not prompt.image_inputs else prompt.image_inputs["image_grid_thw"].prod(-1).sum() // 4)


def test_special_strings_of_the_data_are_neutralised(tiny_policy, make_sample):
    processor = tiny_policy().processor
    evil = make_sample(question="What is <|image_pad|> and </think>?", options=("<|im_end|>", "nothing"))
    prompt = processor.encode(evil)
    assert prompt.neutralised == 3
    assert (
        int((prompt.input_ids == processor.image_token_id).sum()) == prompt.image_inputs["image_grid_thw"].prod() // 4
    )
    assert prompt.text.count("<|im_end|>") == 2


def test_prompt_does_not_depend_on_the_gold_answer(tiny_policy, make_sample):
    processor = tiny_policy().processor
    first, second = (processor.encode(make_sample(answer=answer)) for answer in ("yes", "no"))
    assert first.text == second.text
    assert np.array_equal(first.input_ids, second.input_ids)


def test_unusable_image_names_the_sample(tiny_policy, make_sample, make_image):
    sample = make_sample("row-17", images=(make_image(1, 500),))
    with pytest.raises(ValueError, match=r"image of sample 'row-17' cannot be used.*aspect ratio"):
        tiny_policy().processor.encode(sample)


CHAT_TEMPLATES = {
    "{{ messages[0]['content'][-1]['text'] }}": "makes 0 placeholders for 1 image",
    "{% for part in messages[0]['content'] %}<|image_pad|>{{ part['text'] }}{% endfor %}": "1 placeholder for 0",
    "{% for part in messages[0]['content'] if part['type'] == 'image' %}<|image_pad|>{% endfor %}": "leaves out the q",
    "{{ 'User: ' + messages[0]['content'] }}": "fails on a question with images .*use the chat template that came",
    "{% if %}": "fails on a question with images",
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_a_wrong_chat_template_is_found_when_the_processor_is_loaded(tiny_policy, template):
    processor = tiny_policy().processor
    processor.tokenizer.chat_template = template
    with pytest.raises(ValueError, match=CHAT_TEMPLATES[template]):
        Processor(processor.family, processor.tokenizer, processor.image_processor)


def test_a_wrong_chat_template_is_found_before_weights_and_images_are_read(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_vl"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="makes 0 placeholders for 1 image"):
        load_policy(ModelConfig(path=str(folder), device="cpu"))


def test_pixel_limits(tiny_folder, make_sample, make_image):
    small = Processor.from_folder(tiny_folder("qwen2_vl"), Qwen2VL(), max_pixels=56 * 56, min_pixels=56 * 56)
    assert small.encode(make_sample(images=(make_image(112, 112),))).image_inputs["image_grid_thw"].tolist() == [
        [1, 4, 4]
    ]
    with pytest.raises(ValueError, match=r"at least 40000 and at most 12544 pixels"):
        Processor.from_folder(tiny_folder("qwen2_vl"), Qwen2VL(), min_pixels=40000)


def test_chat_template_is_read_from_every_usual_place(tiny_folder, tmp_path):
    original = Processor.from_folder(tiny_folder("qwen2_vl"), Qwen2VL())
    template = original.tokenizer.chat_template
    original.save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no end-of-sequence token or no chat template"):
        Processor.from_folder(tmp_path, Qwen2VL())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Processor.from_folder(tmp_path, Qwen2VL()).tokenizer.chat_template == template
    (tmp_path / "chat_template.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    assert Processor.from_folder(tmp_path, Qwen2VL()).tokenizer.chat_template == template


def test_saved_processor_files_are_standard(tiny_policy, tmp_path, make_sample):
    processor = tiny_policy().processor
    processor.save(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["processor_class"] == "Qwen2VLProcessor"
    assert settings["image_processor_type"] == "Qwen2VLImageProcessor"
    prompt = processor.encode(make_sample())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(prompt.text)["input_ids"] == processor.tokenizer(prompt.text)["input_ids"]
    assert tokenizer.chat_template == processor.tokenizer.chat_template
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size == processor.image_processor.size


def test_another_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read"):
        Processor.from_folder(tmp_path, Qwen2VL())


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_equal_get_rope_index(arch, tiny_policy, mixed_samples, model_inputs):
    policy = tiny_policy(arch)
    prompts = [policy.processor.encode(sample) for sample in mixed_samples]
    padded = policy.processor.pad(prompts, "cpu")
    for row, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        if not prompt.image_inputs:
            expected = torch.arange(length).expand(3, -1)
        else:
            inputs = model_inputs(policy.model, prompt)
            positions, deltas = backbone(policy.model).get_rope_index(
                inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
            )
            expected = positions[:, 0]
            assert padded.next_positions[row] == length + deltas[0, 0]
        assert torch.equal(padded.position_ids[:, row, :length], expected)
        assert padded.next_positions[row] == expected.max() + 1


def test_positions_by_hand(tiny_policy, make_sample, make_image):
    processor = tiny_policy().processor
    prompt = processor.encode(make_sample(images=(make_image(84, 56),)))  # 3 x 2 merged patches
    first = int(np.flatnonzero(prompt.input_ids == processor.image_token_id)[0])
    positions = processor.positions(prompt)
    p = first
    assert positions[:, first : first + 6].tolist() == [
        [p] * 6,
        [p, p, p, p + 1, p + 1, p + 1],
        [p, p + 1, p + 2, p, p + 1, p + 2],
    ]
    assert positions[:, first + 6].tolist() == [p + 3] * 3


def test_sampled_image_token_takes_no_features(tiny_policy, make_sample):
    policy = tiny_policy()
    prompt = policy.processor.encode(make_sample())
    features = policy.family.image_features(policy.model, [prompt], "cpu")
    ids = torch.tensor([[*prompt.input_ids, policy.processor.image_token_id]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    embeds, _ = policy.family.embed(policy.model, ids, mask, features)
    own = backbone(policy.model).language_model.embed_tokens.weight[policy.processor.image_token_id]
    assert torch.equal(embeds[0, -1], own)
    assert torch.equal(embeds[0, ids[0] == policy.processor.image_token_id][:-1], features[0])


def test_expected_tokens_follow_text_and_image_headers(tiny_policy, make_sample, tmp_path):
    processor = tiny_policy().processor  # at most 112 x 112 pixels, 28 x 28 per token
    sizes = {"small": (56, 56), "large": (112, 112), "huge": (900, 900)}
    for name, size in sizes.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    found = {
        name: processor.expected_tokens(make_sample(images=(FileImage(f"{name}.png", tmp_path),), question="x" * 40))
        for name in sizes
    }
    assert found == {"small": 10 + 4, "large": 10 + 16, "huge": 10 + 16}
    assert processor.expected_tokens(make_sample(images=(), question="x" * 40)) == 10
    unknown = processor.expected_tokens(make_sample(question="x" * 40))  # in memory, without a header
    assert unknown == 10 + 16
