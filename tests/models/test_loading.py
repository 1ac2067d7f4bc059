"""Loading, freezing, adapters and references; and the errors for what cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from medvqa_rl.config import LoraConfig, ModelConfig
from medvqa_rl.core.types import Wording
from medvqa_rl.models.checkpoints import model_for, write_model
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.loading import load_policy, load_processor, resolve_device, resolve_folder
from medvqa_rl.models.reference import load_reference

BOTH = pytest.mark.parametrize("arch", ["qwen2_vl", "qwen2_5_vl"])
LORA = LoraConfig(rank=4, alpha=8)


def trained_names(policy):
    return {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}


def logits_of(policy, model, sample, model_inputs):
    inputs = model_inputs(backbone(policy.model), policy.processor.encode(sample))
    with torch.no_grad():
        return model(**inputs).logits


def shake(policy, seed=1):
    """Change every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@BOTH
def test_full_policy_trains_the_language_model_only(arch, tiny_folder):
    policy = load_policy(ModelConfig(path=str(tiny_folder(arch)), device="cpu"))
    names = trained_names(policy)
    assert policy.vision_is_frozen
    assert not policy.is_lora
    assert names == {name for name, _ in policy.model.named_parameters() if "visual." not in name}
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.float32}


@BOTH
def test_vision_and_projector_are_trained_separately(arch, tiny_policy):
    projector = trained_names(tiny_policy(arch, train_projector=True))
    tower = trained_names(tiny_policy(arch, train_vision=True))
    assert {name for name in projector if "visual." in name} == {
        name for name in projector if "visual.merger." in name
    }
    assert any("visual.merger." in name for name in projector)
    assert any("visual.patch_embed." in name for name in tower)
    assert any("visual.blocks.1." in name for name in tower)
    assert not any("visual.merger." in name for name in tower)
    assert not tiny_policy(arch, train_projector=True).vision_is_frozen


@BOTH
def test_lora_adapts_the_language_model_only(arch, tiny_policy):
    policy = tiny_policy(arch, lora=LORA)
    names = trained_names(policy)
    assert policy.vision_is_frozen
    assert all(".language_model.layers." in name and ".lora_" in name for name in names)
    assert len(names) == 2 * 7 * 2  # 2 layers, 7 linear layers, A and B


def test_lora_targets_are_checked(tiny_policy):
    with pytest.raises(ValueError, match=r"names qkv_proj, but .* q_proj"):
        tiny_policy(lora=LoraConfig(targets=("q_proj", "qkv_proj")))


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("settings", [{}, {"train_projector": True}, {"train_vision": True}])
def test_gradients_reach_exactly_the_trained_parts(lora, settings, tiny_policy, make_sample, model_inputs):
    policy = tiny_policy(lora=lora, gradient_checkpointing=True, **settings)
    policy.model.train()
    prompt = policy.processor.encode(make_sample())
    policy.model(**model_inputs(backbone(policy.model), prompt)).logits.square().mean().backward()
    with_gradient = {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained_names(policy)


@BOTH
@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpointing_leaves_frozen_features_without_graph(arch, lora, tiny_policy, make_sample, model_inputs):
    policy = tiny_policy(arch, lora=lora, gradient_checkpointing=True)
    policy.model.train()
    prompt = policy.processor.encode(make_sample())
    (features,) = policy.family.image_features(policy.model, [prompt], "cpu")
    assert not features.requires_grad
    # The tower itself builds no graph either, without our no_grad around it.
    inputs = model_inputs(backbone(policy.model), prompt)
    raw = backbone(policy.model).get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert not any(feature.requires_grad for feature in raw)


def test_checkpointing_does_not_change_gradients(tiny_policy, make_sample, model_inputs):
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_policy(lora=LORA, gradient_checkpointing=checkpointing)
        shake(policy)
        policy.model.train()
        inputs = model_inputs(backbone(policy.model), policy.processor.encode(make_sample()))
        policy.model(**inputs).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters() if parameter.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_trained_vision_features_carry_a_graph(tiny_policy, make_sample):
    policy = tiny_policy(train_projector=True)
    (features,) = policy.family.image_features(policy.model, [policy.processor.encode(make_sample())], "cpu")
    assert features.requires_grad


@BOTH
def test_full_reference_keeps_the_initial_weights(arch, tiny_policy, make_sample, model_inputs):
    policy = tiny_policy(arch, train_projector=True)
    before = logits_of(policy, policy.model, make_sample(), model_inputs)
    reference = load_reference(policy)
    shake(policy)
    with reference.active() as module:
        assert torch.equal(logits_of(policy, module, make_sample(), model_inputs), before)
        assert not any(parameter.requires_grad for parameter in module.parameters())
        # Weights that are not trained are shared, not copied.
        assert backbone(module).visual.patch_embed.proj.weight is backbone(policy.model).visual.patch_embed.proj.weight
        assert backbone(module).language_model.norm.weight is not backbone(policy.model).language_model.norm.weight
        assert module.lm_head.weight is backbone(module).language_model.embed_tokens.weight
    assert not torch.equal(logits_of(policy, policy.model, make_sample(), model_inputs), before)


@pytest.mark.parametrize("settings", [{}, {"train_projector": True}, {"train_vision": True}])
def test_lora_reference_is_the_model_without_adapter(settings, tiny_policy, make_sample, model_inputs):
    policy = tiny_policy(lora=LORA, **settings)
    before = logits_of(policy, policy.model, make_sample(), model_inputs)
    reference = load_reference(policy)
    shake(policy)
    policy.model.train()
    after = logits_of(policy, policy.model, make_sample(), model_inputs)
    names = trained_names(policy)
    with reference.active() as module:
        torch.testing.assert_close(logits_of(policy, module, make_sample(), model_inputs), before)
        assert not module.training
    assert policy.model.training
    assert trained_names(policy) == names
    assert torch.equal(logits_of(policy, policy.model, make_sample(), model_inputs), after)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("settings", [{}, {"train_projector": True}])
def test_reference_of_a_trained_adapter_is_that_adapter(settings, tiny_policy, tmp_path, make_sample, model_inputs):
    first = tiny_policy(lora=LORA, **settings)
    shake(first)
    write_model(first, tmp_path / "sft")
    expected = logits_of(first, first.model, make_sample(), model_inputs)

    policy = tiny_policy(adapter=str(tmp_path / "sft"), **settings)
    torch.testing.assert_close(logits_of(policy, policy.model, make_sample(), model_inputs), expected)
    names = trained_names(policy)
    assert names == trained_names(first)
    reference = load_reference(policy)
    shake(policy, seed=2)
    after = logits_of(policy, policy.model, make_sample(), model_inputs)
    with reference.active() as module:
        torch.testing.assert_close(logits_of(policy, module, make_sample(), model_inputs), expected)
    assert trained_names(policy) == names
    assert torch.equal(logits_of(policy, policy.model, make_sample(), model_inputs), after)
    write_model(policy, tmp_path / "grpo")  # the reference is not saved with it
    saved = load_file(tmp_path / "grpo" / "adapter_model.safetensors")
    assert saved.keys() == load_file(tmp_path / "sft" / "adapter_model.safetensors").keys()


def test_an_incompatible_adapter_is_refused(tiny_policy, tiny_folder, tmp_path):
    policy = tiny_policy("qwen2_vl", lora=LORA)
    write_model(policy, tmp_path / "adapter")
    path = str(tiny_folder("qwen2_vl"))

    def load(**settings):
        return load_policy(ModelConfig(path=path, device="cpu", adapter=str(tmp_path / "adapter"), **settings))

    load()
    with pytest.raises(ValueError, match=r"rank 8 .* has rank 4"):
        load(lora=LoraConfig(rank=8, alpha=8))
    with pytest.raises(ValueError, match=r"trained without visual.merger"):
        load(train_projector=True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"1 missing"):
        load()
    save_file(weights | {name + "x": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"1 unexpected"):
        load()
    save_file(weights | {name: torch.zeros(4, 7)}, file)
    with pytest.raises(ValueError, match=r"does not fit the model"):
        load()
    with pytest.raises(ValueError, match=r"does not hold adapter_config.json"):
        load_policy(ModelConfig(path=path, adapter=str(tmp_path)))
    save_file(weights, file)
    settings_file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(settings_file.read_bytes())
    for changed, message in (
        ({"rank_pattern": "x"}, r"does not fit the model .* 'str' object has no attribute 'keys'"),
        ({"r": "4"}, r"adapter_config.json has '4' under r \(should be a valid integer\): copy the adapter again"),
        ({"lora_alpha": None}, r"has None under lora_alpha"),
        ({"modules_to_save": 3}, r"has 3 under modules_to_save"),
    ):
        settings_file.write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_weights_are_averaged(share, tiny_policy, tiny_folder, tmp_path):
    """Every weight once, also tied ones, and in float32."""
    trained = tiny_policy(train_vision=True, train_projector=True)
    shake(trained)
    write_model(trained, tmp_path / "trained")
    start = load_policy(ModelConfig(path=str(tiny_folder("qwen2_vl")), device="cpu"))
    config = ModelConfig(
        path=str(tmp_path / "trained"), average_with=str(tiny_folder("qwen2_vl")), average_weight=share, device="cpu"
    )
    averaged = dict(load_policy(config).model.named_parameters())
    others = dict(start.model.named_parameters())
    assert any(not torch.equal(others[name], own) for name, own in trained.model.named_parameters())
    for name, own in trained.model.named_parameters():
        expected = share * own.double() + (1 - share) * others[name].double()
        assert torch.allclose(averaged[name].double(), expected, atol=1e-6), name
        if share in (0, 1):
            assert torch.equal(averaged[name], own if share else others[name]), name


def test_what_cannot_be_averaged_is_refused(tiny_policy, tiny_folder, tmp_path):
    path = str(tiny_folder("qwen2_vl"))
    write_model(tiny_policy(lora=LORA), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"averages whole models, but .*adapter is a LoRA adapter: merge it first"):
        load_policy(ModelConfig(path=path, adapter=str(tmp_path / "adapter"), average_with=path, device="cpu"))
    with pytest.raises(ValueError, match=r"phantom:instruct \(model.average_with\) do not fit .*of another shape"):
        load_policy(ModelConfig(path=path, average_with="phantom:instruct", device="cpu"))
    with pytest.raises(ValueError, match=r"model\.average_with is .*there is no such folder"):
        load_policy(ModelConfig(path=path, average_with=str(tmp_path / "none" / "such"), device="cpu"))


def test_missing_folder(tmp_path):
    for path in (str(tmp_path / "absent"), "./absent", "~/absent-folder", "absent", "tests/absent/model"):
        with pytest.raises(ValueError, match=r"no such folder"):
            resolve_folder(path)
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_a_processor_loads_without_weights(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_vl"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []
    monkeypatch.setattr("medvqa_rl.models.loading.snapshot", lambda *args, **kwargs: asked.append(args) or folder)
    stored = load_policy(ModelConfig(path=str(tiny_folder("qwen2_vl")), device="cpu")).processor
    for path in (str(folder), "someone/model"):
        found = load_processor(ModelConfig(path=path))
        assert found.encode_completion("<think>x</think>") == stored.encode_completion("<think>x</think>")
    assert asked == [("someone/model", ("*.json", "*.txt", "*.jinja"))]  # no weights are downloaded
    (folder / "prompt.json").write_text('{"system": "Be brief."}')
    assert load_processor(ModelConfig(path=str(folder))).wording == Wording(system="Be brief.")
    with pytest.raises(ValueError, match=r"no such folder"):
        load_processor(ModelConfig(path="absent"))


def test_an_unreachable_hub_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'nobody/nothing' at revision 'v1'.*Hub failed"):
        load_policy(ModelConfig(path="nobody/nothing", revision="v1"))


def test_adapter_folder_as_path(tiny_policy, tmp_path):
    write_model(tiny_policy(lora=LORA), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds a LoRA adapter, not a whole model"):
        load_policy(ModelConfig(path=str(tmp_path / "adapter")))


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"is a llama model, a language model that sees no images, but only Qwen2-VL"):
        load_policy(ModelConfig(path=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ValueError, match=r"cannot be read as a model.s configuration: .*unheard_of"):
        load_policy(ModelConfig(path=str(tmp_path)))


def test_incompatible_weights_are_refused(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_vl"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))

    def load(changed):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return load_policy(ModelConfig(path=str(folder), device="cpu"))

    load(weights)
    with pytest.raises(ValueError, match=r"1 missing \(model.language_model.layers.1.mlp.up_proj.weight\)"):
        load({key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=r"1 unexpected \(something.else\)"):
        load(weights | {"something.else": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"1 of another shape"):
        load(weights | {name: torch.zeros(47, 32)})
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_policy(ModelConfig(path=str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded"):
        load_policy(ModelConfig(path=str(folder)))


def test_bfloat16_and_attention_settings(tiny_folder):
    policy = load_policy(
        ModelConfig(path=str(tiny_folder("qwen2_vl")), device="cpu", dtype="bfloat16", attention="eager")
    )
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    assert policy.model.config._attn_implementation == "eager"


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # wherever this runs
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"sees no CUDA device"):
        resolve_device("cuda")


WORDS = Wording(system="You are a radiologist.", think=("[reason]", "[/reason]"))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_checkpoint_records_the_users_words(lora, tiny_policy, tiny_folder, tmp_path, make_sample):
    policy = tiny_policy(lora=lora)
    write_model(policy, tmp_path / "default")
    assert not (tmp_path / "default" / "prompt.json").exists()
    policy.processor.use(WORDS)
    write_model(policy, tmp_path / "own")
    found = load_policy(model_for(str(tmp_path / "own"))).processor
    assert found.wording == WORDS
    prompt, expected = (processor.encode(make_sample()) for processor in (found, policy.processor))
    assert "radiologist" in prompt.text and "Think in [reason][/reason]" in prompt.text
    assert prompt.text == expected.text and prompt.wording == WORDS
    (tmp_path / "own" / "prompt.json").write_text('{"think": ["<a>"]}')
    with pytest.raises(ValueError, match=r"prompt\.json, which records the prompt .* is damaged: restore it"):
        load_policy(model_for(str(tmp_path / "own")))


def test_tags_that_the_tokenizer_does_not_keep_are_refused(tiny_policy):
    processor = tiny_policy().processor
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<eaten>"]})
    with pytest.raises(ValueError, match=r"prompt\.tags has '<eaten>', but the tokenizer of this model cannot write"):
        processor.use(Wording(think=("<eaten>", "</eaten>")))
    assert processor.wording == Wording()


def test_a_system_prompt_that_the_chat_template_leaves_out_is_refused(tiny_policy):
    processor = tiny_policy().processor
    template = processor.tokenizer.chat_template
    processor.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"prompt\.system is set, but the chat template of this model leaves it out"):
        processor.use(WORDS)
    processor.tokenizer.chat_template = template
