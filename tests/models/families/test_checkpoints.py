"""Saved models open in stock transformers and PEFT with equal logits, and resumed runs end bit for bit the same."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from medvqa_rl.cli.export.folder import export_model
from medvqa_rl.config import LoraConfig, ModelConfig
from medvqa_rl.learning.grpo import train
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.loading import load_policy
from tests.learning.toy import ToyData, checkpoint_bytes, read_metrics, toy_config
from tests.models.families.stock import stock_inputs, stock_processor, whole_model
from tests.models.families.tiny import BUILDERS, shake, tiny_policy

WHOLE = {"train_vision": True, "train_projector": True}


@pytest.fixture(scope="module", params=BUILDERS)
def saved(request, tmp_path_factory):
    """A policy whose tower is trained, and the folder that it was written to."""
    policy = tiny_policy(request.param, **WHOLE)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    write_model(policy, folder)
    return policy, folder


def logits(policy, model, sample):
    """Logits of a model's own forward."""
    with torch.no_grad():
        inputs = stock_inputs(whole_model(policy), policy.processor.encode(sample), (5, 6, 7))
        return model.eval()(**inputs).logits


def trained(policy):
    return {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}


def stock_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def test_a_whole_model_opens_elsewhere(saved, mixed_samples):
    policy, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= names
    sample = mixed_samples[1]
    expected = logits(policy, policy.model, sample)
    assert torch.equal(logits(policy, stock_model(folder), sample), expected)
    ours = load_policy(ModelConfig(path=str(folder), device="cpu"))
    assert torch.equal(logits(policy, ours.model, sample), expected)

    kind = json.loads((folder / "preprocessor_config.json").read_text())["processor_class"]
    parts = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    prompt = policy.processor.encode(sample)
    images = [image.load() for image in sample.images]
    inputs = stock_processor(kind, *parts)(
        text=[prompt.text], images=images, return_tensors="np", add_special_tokens=False
    )
    assert inputs["input_ids"][0].tolist() == prompt.input_ids.tolist()
    for name, array in prompt.image_inputs.items():
        assert (inputs[name] == array).all()
    again = ours.processor.encode(sample)
    assert again.text == prompt.text
    assert again.input_ids.tolist() == prompt.input_ids.tolist()
    for name, array in prompt.image_inputs.items():
        assert (again.image_inputs[name] == array).all()


@pytest.mark.parametrize("settings", [{}, WHOLE])
def test_an_adapter_opens_elsewhere_and_merges(saved, settings, mixed_samples, tmp_path):
    _, folder = saved
    policy = load_policy(ModelConfig(path=str(folder), device="cpu", lora=LoraConfig(rank=2), **settings))
    for part in ("lora_B", "modules_to_save"):
        shake(policy.model, part, 1)
    write_model(policy, tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"} <= names
    assert not names & {"model.safetensors", "README.md"}
    sample = mixed_samples[1]
    expected = logits(policy, policy.model, sample)
    stock = PeftModel.from_pretrained(stock_model(folder), tmp_path / "adapter")
    assert torch.equal(logits(policy, stock, sample), expected)
    again = ModelConfig(path=str(folder), adapter=str(tmp_path / "adapter"), device="cpu", **settings)
    loaded = load_policy(again)
    assert torch.equal(logits(policy, loaded.model, sample), expected)
    assert trained(loaded) == trained(policy)

    export_model(tmp_path / "adapter", tmp_path / "merged", merge=True)
    merged = logits(policy, stock_model(tmp_path / "merged"), sample)
    assert (merged - expected).abs().max() <= 1e-3
    assert (merged - logits(policy, stock_model(folder), sample)).abs().max() > 1e-2


def test_a_resumed_run_ends_bit_for_bit_the_same(saved, tmp_path):
    def run(name, steps, **more):
        settings = {"model": WHOLE, "rewards": {"functions": {"tests.learning.toy.vowels": 1.0}}}
        settings |= {"rollout": {"num_generations": 2, "max_completion_length": 6}}
        settings |= {"optimizer": {"lr_scheduler_type": "constant", "warmup_steps": 0}}
        settings |= {"train": {"steps": steps, "save_steps": 1, "prompts_per_step": 2, "prompts_per_micro_batch": 1}}
        train(toy_config(saved[1], tmp_path / name, **settings), train_set=ToyData(), **more)
        return tmp_path / name

    whole = run("whole", 2)
    run("stopped", 1)
    stopped = run("stopped", 2, resume=True)
    assert checkpoint_bytes(stopped, 2) == checkpoint_bytes(whole, 2)
    assert checkpoint_bytes(whole, 1) != checkpoint_bytes(whole, 2)
    assert str(read_metrics(stopped)) == str(read_metrics(whole))
