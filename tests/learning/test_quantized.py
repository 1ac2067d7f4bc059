"""Base weights in 4 bits below an adapter, against ordinary linear layers with the same weights written out."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from toy import ToyData, toy_config
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.common import prepare_process
from medvqa_rl.config import Config, LoraConfig, ModelConfig, RolloutConfig
from medvqa_rl.learning.distributed.launch import Launch, check_launch
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.setup import set_up
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.families.parts import backbone, causal_model
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.models.reference import load_reference
from medvqa_rl.rollout.decode import RolloutEngine

pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")
Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit

LORA = LoraConfig(rank=4, alpha=8)
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
"""The levels of normal float in 4 bits (arXiv 2305.14314, appendix E)."""


def shake(policy: Policy, seed: int = 1) -> None:
    """Change every trained weight, so that adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def by_hand(module: Any) -> torch.Tensor:
    """The weights of a layer in 4 bits, from their codes, levels and constants."""
    codes, state = module.weight.data.flatten().int(), module.weight.quant_state
    assert state.blocksize == 64 and state.quant_type == "nf4" and state.nested
    levels = torch.tensor(NF4)[torch.stack([codes >> 4, codes & 15], dim=-1).flatten()]
    constants = state.state2.code[state.absmax.int()] * state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
    return (levels.view(-1, 64) * (constants + state.offset)[:, None]).view(module.out_features, module.in_features)


@pytest.fixture
def policies(wide_folder: Callable[..., str]) -> Callable[..., tuple[Policy, Policy]]:
    """A policy in 4 bits, and one of ordinary layers with the same weights and the same adapter."""

    def make(arch: str = "qwen2_vl", **settings: Any) -> tuple[Policy, Policy]:
        config = ModelConfig(path=wide_folder(arch), device="cpu", lora=LORA, **settings)
        coarse = load_policy(config.model_copy(update={"load_in_4bit": True}))
        shake(coarse)
        written_out = load_policy(config)
        layers = {name: module for name, module in coarse.model.named_modules() if isinstance(module, Linear4bit)}
        quantized = {f"{name}.weight": by_hand(module) for name, module in layers.items()}
        others = {name: p for name, p in coarse.model.named_parameters() if name not in quantized}
        written_out.model.load_state_dict(quantized | others, strict=False)
        assert quantized.keys() | others.keys() == {name for name, _ in written_out.model.named_parameters()}
        return coarse, written_out

    return make


def sampled(policy: Policy, **settings: Any) -> Any:
    """Groups of a policy's own completions."""
    config = RolloutConfig(num_generations=3, max_completion_length=8, **settings)
    return RolloutEngine(policy).rollout([ToyData()[0], ToyData()[1]], config, seed=0, stream="train", step=0)


def scored(policy: Policy, model: nn.Module, groups: Any) -> torch.Tensor:
    """Log-probabilities of the completions under a model, by the forward of the update."""
    return GroupForward(model)(collate(groups, policy.processor, "cpu")).logps


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_only_the_language_models_linear_layers_are_in_4_bits(arch, wide_folder):
    policy = load_policy(ModelConfig(path=wide_folder(arch), device="cpu", lora=LORA, load_in_4bit=True))
    quantized = {name for name, module in policy.model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantized) == 7 * len(backbone(policy.model).language_model.layers)
    assert all(".language_model.layers." in name and name.endswith(".base_layer") for name in quantized)
    trained = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(quantized) and all(".lora_" in name for name in trained)
    types = {p.dtype for name, p in policy.model.named_parameters() if name.removesuffix(".weight") not in quantized}
    assert types == {torch.float32}  # adapters, norms, biases, embedding, tower, projector


def test_quantized_weights_are_close_to_the_checkpoint(wide_folder):
    """Each is the level next to it: at most half the widest gap of levels away, in units of the largest of its 64."""
    stored = load_file(Path(wide_folder()) / "model.safetensors")
    policy = load_policy(ModelConfig(path=wide_folder(), device="cpu", load_in_4bit=True))
    found = 0
    for name, module in backbone(policy.model).language_model.named_modules():
        if isinstance(module, Linear4bit):
            (whole,) = (tensor for key, tensor in stored.items() if key.endswith(f"{name}.weight"))
            blocks = whole.view(-1, 64)
            bound = blocks.abs().amax(dim=1, keepdim=True) * (1 - 0.6961928) / 2 * 1.05  # constants are rounded too
            error = (by_hand(module).view(-1, 64) - blocks).abs()
            assert (error <= bound).all() and error.max() > 0
            found += 1
    assert found == 14


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"train_projector": True, "train_vision": True, "gradient_checkpointing": True},
    ],
)
def test_log_probabilities_and_gradients_equal_those_of_dequantized_weights(policies, settings):
    coarse, written_out = policies(**settings)
    groups = sampled(coarse)  # a pass in evaluation mode comes first, as in training
    results = []
    for policy in (coarse, written_out):
        policy.model.train()
        logps = scored(policy, policy.model, groups)
        (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps)).sum().backward()
        found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), found))
    (first, gradients), (second, expected) = results
    assert (first - second).abs().max() <= 1e-5
    assert gradients.keys() == expected.keys() and len(gradients) >= 28
    assert all(p.grad is None for name, p in coarse.model.named_parameters() if not p.requires_grad)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


def test_greedy_answers_are_equal_token_for_token(policies):
    answers = []
    for policy in policies():
        found = RolloutEngine(policy).greedy([ToyData()[i] for i in range(4)], max_completion_length=24, batch_size=3)
        answers.append([group.completions[0].token_ids for group in found])
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_the_reference_is_the_base_in_4_bits_without_the_adapter(policies):
    coarse, written_out = policies()
    groups = sampled(coarse)
    with torch.no_grad():
        with load_reference(coarse).active() as model:
            reference = scored(coarse, model, groups)
        with written_out.model.disable_adapter():
            expected = scored(written_out, written_out.model, groups)
        own = scored(coarse, coarse.model, groups)
    assert (reference - expected).abs().max() <= 1e-5 < (reference - own).abs().max()


def test_the_reference_of_a_trained_adapter_is_that_adapter(wide_folder, tmp_path):
    policy = load_policy(ModelConfig(path=wide_folder(), device="cpu", lora=LORA, load_in_4bit=True))
    shake(policy)
    write_model(policy, tmp_path / "adapter")
    asked = ModelConfig(path=wide_folder(), adapter=str(tmp_path / "adapter"), device="cpu", load_in_4bit=True)
    further = load_policy(asked)
    reference, groups = load_reference(further), sampled(further)
    with torch.no_grad():
        before = scored(policy, policy.model, groups)
        shake(further, seed=2)
        with reference.active() as model:
            assert (scored(further, model, groups) - before).abs().max() <= 1e-5
        assert (scored(further, further.model, groups) - before).abs().max() > 1e-3


def config_of(folder: str, output: Path, **settings: Any) -> Any:
    """Settings of a toy run in 4 bits of four steps."""
    model = {"lora": {"rank": 2}, "train_projector": False, "load_in_4bit": True}
    steps = {"steps": 4, "save_steps": 2, "eval_steps": 4} | settings
    rate = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    return toy_config(Path(folder), output, model=model, train=steps, optimizer=rate)


def test_parameters_are_counted_as_weights_not_as_bytes(wide_folder, tmp_path):
    coarse = config_of(wide_folder(), tmp_path)
    whole = coarse.model_copy(update={"model": coarse.model.model_copy(update={"load_in_4bit": False})})
    counts = [
        (found.num_parameters, found.num_trained) for found in (set_up(c, ToyData(), None) for c in (coarse, whole))
    ]
    assert counts[0] == counts[1]


def go(config: Any, **how: Any) -> Path:
    return train(config, train_set=ToyData(), val_set=ToyData(3), **how)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Adapter and optimizer of a checkpoint."""
    paths = (run / "checkpoints" / f"step_{step:06d}").rglob("*.safetensors")
    return {f"{path.name} {name}": tensor for path in paths for name, tensor in load_file(path).items()}


def test_training_moves_the_adapter_alone_and_resumes_exactly(wide_folder, tmp_path, monkeypatch):
    seen = []
    loaded = load_policy

    def watched(config: ModelConfig) -> Policy:
        policy = loaded(config)
        state = {name: tensor for name, tensor in policy.model.state_dict().items() if ".lora_" not in name}
        seen.append((state, {name: tensor.clone() for name, tensor in state.items()}))
        return policy

    monkeypatch.setattr("medvqa_rl.learning.setup.load_policy", watched)
    whole = go(config_of(wide_folder(), tmp_path / "whole"))
    ((base, before),) = seen
    assert base and all(torch.equal(base[name], tensor) for name, tensor in before.items())
    first, last = weights(whole, 2), weights(whole, 4)
    moved = [name for name in last if name.startswith("adapter_model") and not torch.equal(first[name], last[name])]
    assert len(moved) == 2 * 14

    go(config_of(wide_folder(), tmp_path / "parts", steps=2))
    torch.manual_seed(99)  # nothing may hang on the state of torch's generator
    parts = weights(go(config_of(wide_folder(), tmp_path / "parts"), resume=True), 4)
    assert parts.keys() == last.keys() and all(torch.equal(parts[name], tensor) for name, tensor in last.items())

    env = json.loads((whole / "env.json").read_text())
    assert "bitsandbytes" in env["packages"]
    other = config_of(wide_folder(), tmp_path / "whole", steps=5)
    other = other.model_copy(update={"model": other.model.model_copy(update={"load_in_4bit": False})})
    with pytest.raises(ValueError, match=r"model\.load_in_4bit \(true -> false\)"):
        go(other, resume=True)


@pytest.mark.parametrize("in_4_bits", [True, False])
def test_plain_peft_opens_the_adapter_on_both_bases(wide_folder, tmp_path, make_sample, model_inputs, in_4_bits):
    policy = load_policy(ModelConfig(path=wide_folder(), device="cpu", lora=LORA, load_in_4bit=True))
    shake(policy)
    write_model(policy, tmp_path / "adapter")
    assert not any(path.name == "config.json" for path in (tmp_path / "adapter").iterdir())
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    kwargs = {"quantization_config": settings} if in_4_bits else {}
    base = AutoModelForImageTextToText.from_pretrained(wide_folder(), dtype=torch.float32, **kwargs)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").train()  # in training bitsandbytes repacks nothing
    own = load_policy(
        ModelConfig(path=wide_folder(), adapter=str(tmp_path / "adapter"), device="cpu", load_in_4bit=in_4_bits)
    )
    inputs = model_inputs(backbone(policy.model), policy.processor.encode(make_sample()), completion=(5, 6, 7))
    with torch.no_grad():
        expected, found, trained = (m(**inputs).logits for m in (model, own.model, policy.model))
    assert (expected - found).abs().max() <= 1e-5
    assert torch.equal(found, trained) is in_4_bits


def test_merging_uses_the_full_precision_weights(wide_folder, tmp_path):
    policy = load_policy(ModelConfig(path=wide_folder(), device="cpu", lora=LORA, load_in_4bit=True))
    shake(policy)
    write_model(policy, tmp_path / "adapter")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--merge"])
    assert result.exit_code == 0, result.output
    assert "full precision" in result.output
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    adapter, before, after = (
        load_file(next((Path(folder)).glob("*.safetensors")))
        for folder in (tmp_path / "adapter", wide_folder(), tmp_path / "merged")
    )
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        layer = name.removesuffix(".weight").replace("model.layers.", "model.language_model.layers.")
        factors = [f"base_model.model.{layer}.lora_{factor}.weight" for factor in "BA"]
        is_changed = factors[0] in adapter
        expected = (
            tensor + LORA.alpha / LORA.rank * adapter[factors[0]] @ adapter[factors[1]] if is_changed else tensor
        )
        assert torch.allclose(after[name], expected, rtol=0, atol=1e-6), name
        changed += is_changed
    assert changed == 14


def test_fingerprints_depend_on_base_and_quantization_constants(wide_folder):
    config = ModelConfig(path=wide_folder(), device="cpu")
    whole, coarse = load_policy(config), load_policy(config.model_copy(update={"load_in_4bit": True}))
    first = weights_fingerprint(coarse.model)
    assert first == weights_fingerprint(load_policy(coarse.config).model) != weights_fingerprint(whole.model)
    layer = next(module for module in coarse.model.modules() if isinstance(module, Linear4bit))
    layer.weight.quant_state.absmax[0] += 1
    assert weights_fingerprint(coarse.model) != first


def test_an_adapter_is_evaluated_on_the_base_in_4_bits(tmp_path):
    settings = ["model.device=cpu", "model.load_in_4bit=true", "data.num_test=4", "eval.bootstrap=20"]
    policy = load_policy(ModelConfig(device="cpu", lora=LORA, load_in_4bit=True))
    write_model(policy, tmp_path / "adapter")
    config = tmp_path / "config.yaml"
    config.write_text("rollout: {max_completion_length: 16}\n")
    where = ["--checkpoint", str(tmp_path / "adapter"), "--output", str(tmp_path / "eval")]
    result = CliRunner().invoke(app, ["eval", str(config), *settings, *where])
    assert result.exit_code == 0, result.output
    assert "base model in 4 bits" in " ".join(result.output.split())
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["model"]["load_in_4bit"] is True
    # Without the setting it would be another model.
    other = [setting for setting in settings if "4bit" not in setting]
    result = CliRunner().invoke(app, ["eval", str(config), *other, *where, "--resume"])
    assert result.exit_code == 2 and "model.load_in_4bit" in result.output


def test_the_command_runs_no_code_downloaded_by_bitsandbytes(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("def get_kernel(name, version): raise AssertionError(name)")
    monkeypatch.syspath_prepend(tmp_path)
    prepare_process()
    with pytest.raises(ImportError):
        importlib.import_module("kernels")


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.load_in_4bit=true"], "4-bit weights cannot be trained: set model.lora"),
        (["model.load_in_4bit=true", "model.lora={rank: 2}", "train.engine=zero3"], "but zero3 shards tensors"),
        (["model.load_in_4bit=true", "model.lora={rank: 2}", "train.engine=fsdp2"], "but fsdp2 shards tensors"),
        (
            ["model.load_in_4bit=true", "model.lora={rank: 2}", "rollout.engine=graph"],
            "CUDA graphs are not tested with 4-bit weights",
        ),
    ],
)
def test_incompatible_settings_are_refused(tmp_path, settings, message):
    (tmp_path / "config.yaml").write_text(f"output_dir: {tmp_path / 'run'}\nmodel: {{device: cpu}}\n")
    assert message in refused("train", str(tmp_path / "config.yaml"), *settings)
    assert not (tmp_path / "run").exists()


def test_unsupported_models_and_machines_are_refused(tiny_folder, wide_folder, tmp_path, monkeypatch):
    asked = ModelConfig(path=wide_folder(), device="cpu", lora=LORA, load_in_4bit=True)
    with pytest.raises(
        ValueError, match=r"has hidden_size 32 and intermediate_size 48, and weights in 4 bits come in"
    ):
        load_policy(asked.model_copy(update={"path": str(tiny_folder("qwen2_vl"))}))

    def no_kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("bitsandbytes::quantize_4bit has no kernel for the CPU")

    monkeypatch.setattr(functional, "quantize_4bit", no_kernel)
    with pytest.raises(ValueError, match=r"cannot compute on this cpu device \(bitsandbytes::quantize_4bit has no"):
        load_policy(asked)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"cannot be imported .*`pip install 'medvqa-rl\[quantize\]'"):
        load_policy(asked)


def test_a_checkpoint_stored_in_4_bits_is_refused(wide_folder, tmp_path):
    policy = load_policy(ModelConfig(path=wide_folder(), device="cpu", load_in_4bit=True))
    causal_model(policy.model).save_pretrained(tmp_path / "stored")
    policy.processor.save(tmp_path / "stored")
    for in_4_bits in (False, True):
        with pytest.raises(ValueError, match=r"were stored quantized \(bitsandbytes\).* give the original checkpoint"):
            load_policy(ModelConfig(path=str(tmp_path / "stored"), device="cpu", load_in_4bit=in_4_bits))


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_launchers_that_shard_are_refused(engine):
    config = Config.model_validate({"model": {"device": "cpu", "load_in_4bit": True, "lora": {}}})
    with pytest.raises(ValueError, match=f"model.load_in_4bit is true, but {engine} shards tensors"):
        check_launch(config, Launch(engine, 2), 8)
    check_launch(config, Launch("ddp", 2), 8)
