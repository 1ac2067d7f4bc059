"""Models without a family of their own: rollouts by ``generate``, updates by the model's own forward."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import (
    Idefics3Config,
    LlamaConfig,
    LlavaOnevisionConfig,
    Qwen2Config,
    Qwen3_5Config,
    SiglipVisionConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from medvqa_rl.cli.export.folder import export_model
from medvqa_rl.config import Config, LoraConfig, ModelConfig, RolloutConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.setup import start_vllm
from medvqa_rl.models import families
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.families.generic import PER_TOKEN, Generic, stock_processor
from medvqa_rl.models.loading import load_policy, make_policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.online import Failed, Request
from medvqa_rl.rollout.stock.generate import GenerateEngine, make_engine
from medvqa_rl.rollout.stock.online import GenerateOnline, make_online_engine
from tests.learning.toy import ToyData, checkpoint_bytes, toy_config
from tests.models.families import tiny
from tests.models.families.test_updates import gradients

TEMPLATE = tiny.INTERNVL_TEMPLATE.replace("<IMG_CONTEXT>", "<image>")
LENGTH = 12


def llava_onevision():
    """Tiles of 28 x 28 pixels with 4 patches, joined by a token at the end of each row."""
    tokenizer = tiny.qwen_tokenizer(TEMPLATE, (("image_token", "<image>"), ("video_token", "<video>")))
    grids = [[28, 28], [28, 56], [56, 28], [56, 56]]
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tiny.qwen_text(tokenizer) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text).to_dict(),
        vision_config=SiglipVisionConfig(**vision, image_size=28, patch_size=14).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    return config, tokenizer, images, {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}


def qwen3_5():
    """A layer of linear attention and one of full attention."""
    parts = tiny.qwen3_vl()
    text = parts.config.text_config.to_dict() | {"num_hidden_layers": 2}
    text = {key: text[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    rope |= {"partial_rotary_factor": 1.0}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    text |= {
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
    }
    text |= {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    }
    vision = parts.config.vision_config.to_dict()
    vision = {key: value for key, value in vision.items() if key not in ("deepstack_visual_indexes", "model_type")}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **tiny.qwen_ids(parts.tokenizer))
    return config, parts.tokenizer, parts.image_processor, {}


def idefics3():
    """Tiles of 28 x 28 pixels and 4 tokens; the parts have other names than usual."""
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    names = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    named = tuple((f"extra_{index}_token", token) for index, token in enumerate((*names, *rows)))
    tokenizer = tiny.qwen_tokenizer(TEMPLATE, named)
    text = tiny.qwen_text(tokenizer) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        text_config=LlamaConfig(**text).to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 7, "initializer_range": 0.3},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return config, tokenizer, images, {"image_seq_len": 4}


MODELS = {"llava_onevision": llava_onevision, "qwen3_5": qwen3_5, "idefics3": idefics3}
EVERY = pytest.mark.parametrize("name", MODELS)


def make(name, **settings):
    config, tokenizer, images, arguments = MODELS[name]()
    torch.manual_seed(3)
    model = tiny.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    tiny.shake(model, "", 3)
    family = families.family_for(name)
    reader = stock_processor(family.processor_class, tokenizer, images, arguments)
    processor = Processor(family, tokenizer, reader, stop_ids=range(0, tiny.WORDS, 8))
    policy = make_policy(model, processor, ModelConfig(path=name, device="cpu", **settings), "cpu")
    tiny.shake(policy.model, "lora_B", 3)
    return policy


def whole(policy):
    return policy.model.get_base_model() if policy.is_lora else policy.model


def stock(policy, prompt, completion=()):
    """What the stock forward takes for one prompt and completion."""
    ids = torch.tensor([[*prompt.input_ids.tolist(), *completion]])
    inputs = {key: torch.from_numpy(value) for key, value in prompt.image_inputs.items()}
    for key in inputs.keys() & set(PER_TOKEN):
        inputs[key] = torch.nn.functional.pad(inputs[key], (0, len(completion)))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def suppressed(policy):
    rows = whole(policy).lm_head.weight.shape[0]
    return [*policy.processor.suppressed_ids, *range(len(policy.processor.tokenizer), rows)]


@EVERY
def test_greedy_equals_generate(name, mixed_samples):
    policy = make(name)
    engine = make_engine(policy)
    assert type(engine) is GenerateEngine
    for group in engine.greedy(mixed_samples, max_completion_length=LENGTH, batch_size=4):
        ids = whole(policy).generate(
            **stock(policy, group.prompt),
            max_new_tokens=LENGTH,
            do_sample=False,
            suppress_tokens=suppressed(policy),
            eos_token_id=list(policy.processor.stop_ids),
            pad_token_id=policy.processor.pad_id,
        )
        (completion,) = group.completions
        assert completion.token_ids == tuple(ids[0, len(group.prompt.input_ids) :].tolist())
        assert completion.is_truncated == (completion.token_ids[-1] not in policy.processor.stop_ids)


@EVERY
def test_samples_do_not_depend_on_batching(name, mixed_samples):
    engine = make_engine(make(name))

    def tokens(samples, size):
        config = RolloutConfig(num_generations=2, max_completion_length=LENGTH, max_batch=size, temperature=0.9)
        groups = engine.rollout(samples, config, seed=0, stream="train", step=0)
        assert [group.sample.id for group in groups] == [sample.id for sample in samples]
        return {group.sample.id: [completion.token_ids for completion in group.completions] for group in groups}

    expected = tokens(mixed_samples, 4)
    assert tokens(mixed_samples[::-1], 1) == expected
    assert len({ids for group in expected.values() for ids in group}) > 4


SERVED = [
    {},
    {"temperature": 0.8, "seed": 4, "num_generations": 3},
    {"temperature": 1.2, "top_p": 0.7, "seed": 1, "max_length": 5, "is_streamed": True},
    {"temperature": 1.0, "seed": 2, "stop": ("e",), "top_logprobs": 1},
]


def serve(policy, samples, settings, *, cancelled=(), take=None):
    """What requests that arrive together are sent; the engine is closed when it has answered them."""
    engine = make_online_engine(policy, max_sequences=6, max_length=LENGTH)
    assert isinstance(engine, GenerateOnline)
    sent = [[] for _ in settings]
    for number, (sample, given, send) in enumerate(zip(samples, settings, sent)):
        request = Request(policy.processor.encode(sample), send.append, **({"max_length": LENGTH} | given))
        request.is_cancelled = number in cancelled
        engine.submit(request)
    if take is not None:
        engine._take = lambda *given: take(engine)
        engine.run()
        return sent
    engine._receive()
    with torch.no_grad():
        while engine._waiting:
            engine._step()
    return sent


def served_texts(pieces):
    return ["".join(p.text for p in pieces if p.completion == n) for n in range(1 + max(p.completion for p in pieces))]


@EVERY
def test_requests_that_are_served_together_get_what_each_gets_alone(name, mixed_samples):
    policy = make(name)
    together = serve(policy, mixed_samples, SERVED)
    for number, given in enumerate(SERVED):
        (alone,) = serve(policy, mixed_samples[number:], [given])
        assert served_texts(together[number]) == served_texts(alone)
        assert len(served_texts(alone)) == given.get("num_generations", 1)
        counts = [sum(piece.num_tokens for piece in pieces) for pieces in (alone, together[number])]
        assert counts[0] == counts[1] <= given.get("max_length", LENGTH) * given.get("num_generations", 1)
    (group,) = make_engine(policy).greedy(mixed_samples[:1], max_completion_length=LENGTH, batch_size=1)
    assert served_texts(together[0]) == [group.completions[0].text]
    assert (len(together[2]) > 1) is (sum(piece.num_tokens for piece in together[2]) > 1), "it is streamed"
    assert together[3][-1].num_tokens == len(together[3][-1].logprobs) > 0


def test_served_requests_that_are_cancelled_or_cut_off(mixed_samples):
    policy = make("llava_onevision")
    first, second = serve(policy, mixed_samples, [{}, {"is_streamed": True}], cancelled=[0])
    assert first == [] and second[-1].finish
    stopped = [Failed("The server was stopped.", is_closed=True)]
    assert serve(policy, mixed_samples, [{}, {}], take=lambda engine: engine.close()) == [stopped, stopped]


@EVERY
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, targets=("q_proj", "down_proj"))])
def test_the_update_equals_the_stock_forward(name, lora, mixed_samples):
    settings = (
        {"lora": lora, "gradient_checkpointing": True} if lora else {"train_vision": True, "train_projector": True}
    )
    policy = make(name, **settings)
    groups = make_groups(policy, mixed_samples)
    rows = []
    for group in groups:
        for completion in group.completions:
            ids = completion.token_ids
            logits = whole(policy)(**stock(policy, group.prompt, ids)).logits[0, len(group.prompt.input_ids) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0])
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    wanted = gradients(policy)
    policy.model.train()
    logps = GroupForward(policy.model)(collate(groups, policy.processor, "cpu", layout=Layout.SEPARATE)).logps
    assert (logps - expected).abs().max() <= 1e-5
    (logps * weights).sum().backward()
    for key, gradient in gradients(policy).items():
        assert (gradient is None) == (wanted[key] is None)
        if gradient is None:
            continue  # the tower's output after the layer that is used
        if key.endswith("k_proj.bias") and wanted[key].norm() < 1e-4:
            continue  # a softmax does not see a bias of its keys, so this is rounding
        # Linear attention is computed in blocks that padding shifts, in sums of other order.
        limit = 5e-5 if "linear_attn" in key else 1e-5
        assert (gradient - wanted[key]).norm() <= limit * wanted[key].norm() + 1e-8, key
    assert any("vision" in key or "visual" in key for key in wanted) == (lora is None)


def make_groups(policy, samples):
    """Groups of two random completions."""
    rng = np.random.default_rng(0)
    groups = []
    for sample in samples:
        ids = [tuple(int(i) for i in rng.integers(0, 300, rng.integers(1, 10))) for _ in range(2)]
        completions = [Completion(each, "", False) for each in ids]
        groups.append(Group(sample, policy.processor.encode(sample), completions))
    return groups


@pytest.fixture
def forced(monkeypatch):
    """A Qwen2-VL that is taken for an unknown model, and its own policy."""
    own = tiny.tiny_policy("qwen2_vl", seed=3)
    monkeypatch.setattr(families, "FAMILIES", ())
    family = families.family_for("qwen2_vl")
    assert type(family) is Generic
    model = tiny.random_model("qwen2_vl", 3)
    tiny.shake(model, "", 3)
    parts = tiny.qwen2_vl()
    reader = stock_processor(parts.processor, parts.tokenizer, parts.image_processor, {})
    processor = Processor(family, parts.tokenizer, reader, stop_ids=range(0, tiny.WORDS, 8))
    generic = make_policy(model, processor, ModelConfig(path="x", device="cpu"), "cpu")
    monkeypatch.undo()
    return own, generic, monkeypatch


def test_a_known_model_gives_the_same_tokens_and_gradients_when_taken_for_an_unknown_one(forced, mixed_samples):
    own, generic, monkeypatch = forced
    config = RolloutConfig(num_generations=3, max_completion_length=LENGTH, temperature=0.8, top_k=20, top_p=0.9)

    def results(policy, engine, layout):
        groups = engine(policy).rollout(mixed_samples, config, seed=5, stream="train", step=1)
        policy.model.zero_grad()
        logps = GroupForward(policy.model)(collate(groups, policy.processor, "cpu", layout=layout)).logps
        (logps * torch.linspace(-1, 1, logps.numel()).view(logps.shape)).sum().backward()
        return groups, logps.detach(), gradients(policy)

    fast = results(own, RolloutEngine, Layout.PACKED)
    monkeypatch.setattr(families, "FAMILIES", ())
    slow = results(generic, make_engine, Layout.SEPARATE)
    for a, b in zip(fast[0], slow[0], strict=True):
        assert a.prompt.input_ids.tolist() == b.prompt.input_ids.tolist()
        assert [each.token_ids for each in a.completions] == [each.token_ids for each in b.completions]
        assert [each.is_truncated for each in a.completions] == [each.is_truncated for each in b.completions]
    assert (fast[1] - slow[1]).abs().max() <= 1e-5
    for key, gradient in fast[2].items():
        assert (gradient - slow[2][key]).norm() <= 1e-5 * gradient.norm() + 1e-8, key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    policy = make("llava_onevision")
    folder = tmp_path_factory.mktemp("llava") / "model"
    write_model(policy, folder)
    return folder


def test_a_saved_model_is_loaded_and_trained_and_resumed(saved, tmp_path, capsys):
    def run(name, steps, **more):
        settings = {"rewards": {"functions": {"tests.learning.toy.vowels": 1.0}}}
        settings |= {"rollout": {"num_generations": 2, "max_completion_length": 6}}
        settings |= {"train": {"steps": steps, "save_steps": 1, "prompts_per_step": 2, "prompts_per_micro_batch": 1}}
        settings |= {"optimizer": {"lr_scheduler_type": "constant", "warmup_steps": 0}}
        train(toy_config(saved, tmp_path / name, **settings), train_set=ToyData(), **more)
        return tmp_path / name

    whole_run = run("whole", 2)
    printed = capsys.readouterr().out
    assert printed.count("LlavaOnevision has no fast path") == 1 and "times as many tokens" in printed
    run("stopped", 1)
    assert checkpoint_bytes(run("stopped", 2, resume=True), 2) == checkpoint_bytes(whole_run, 2)


def test_a_saved_adapter_opens_elsewhere_and_merges(saved, mixed_samples, tmp_path):
    base = make("llava_onevision")
    policy = load_policy(ModelConfig(path=str(saved), device="cpu", lora=LoraConfig(rank=2), train_projector=True))
    for part in ("lora_B", "modules_to_save"):
        tiny.shake(policy.model, part, 1)
    write_model(policy, tmp_path / "adapter")

    def logits(model):
        prompt = base.processor.encode(mixed_samples[1])
        with torch.no_grad():
            return model.eval()(**stock(base, prompt, (5, 6, 7))).logits

    expected = logits(policy.model)
    plain = tiny.AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    export_model(tmp_path / "adapter", tmp_path / "merged", merge=True)
    merged = load_policy(ModelConfig(path=str(tmp_path / "merged"), device="cpu"))
    assert (logits(merged.model) - expected).abs().max() <= 1e-3
    assert (logits(base.model) - expected).abs().max() > 1e-2
    for sample in mixed_samples:
        mine, theirs = merged.processor.encode(sample), base.processor.encode(sample)
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert mine.image_inputs.keys() == theirs.image_inputs.keys()
        assert all(np.array_equal(array, theirs.image_inputs[key]) for key, array in mine.image_inputs.items())


def test_what_cannot_work_is_refused_in_a_sentence(saved, tmp_path):
    def load(content, **settings):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        for file in saved.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if content is not None:
            (folder / "config.json").write_text(json.dumps(content))
        return load_policy(ModelConfig(path=str(folder), device="cpu", **settings))

    with pytest.raises(ValueError, match="a qwen2 model, a language model that sees no images, but only Qwen2-VL"):
        load({"model_type": "qwen2"})
    with pytest.raises(ValueError, match="brings its own code, which is never run"):
        load({"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}})
    with pytest.raises(ValueError, match=r"encoder-decoder \(Florence2\)"):
        load({"model_type": "florence2"})
    with pytest.raises(ValueError, match="has no placeholder for images"):
        load({"model_type": "git"})
    with pytest.raises(ValueError, match="GlmOcr model, for which this version of transformers names no processor"):
        load({"model_type": "glm_ocr"})
    with pytest.raises(ValueError, match="LlavaOnevision is not loaded in 4 bits"):
        load(None, load_in_4bit=True, lora=LoraConfig(rank=2))
    with pytest.raises(ValueError, match="cannot be set for LlavaOnevision"):
        load(None, max_pixels=200_704)
    policy = load(None)
    with pytest.raises(ValueError, match=r"rollout\.engine is vllm, but LlavaOnevision is not run on vLLM here"):
        start_vllm(Config(rollout={"engine": "vllm"}), None, policy)
    with pytest.raises(ValueError, match=r"rollout\.engine is graph, but LlavaOnevision has no fast path"):
        make_engine(policy, engine="graph")


def test_other_settings_of_generation_do_not_change_the_tokens(mixed_samples):
    policy = make("llava_onevision")
    own = policy.model.generation_config
    (before,) = make_engine(policy).greedy(mixed_samples[:1], max_completion_length=LENGTH, batch_size=1)
    own.repetition_penalty = 5.0
    (after,) = make_engine(policy).greedy(mixed_samples[:1], max_completion_length=LENGTH, batch_size=1)
    assert after.completions == before.completions
    assert policy.model.generation_config is own


def test_logits_that_do_not_follow_from_the_hidden_states_are_refused():
    model = make("llava_onevision").model
    stock_forward = model.forward

    def scaled(*given, **named):
        output = stock_forward(*given, **named)
        output.logits = output.logits * 0.5
        return output

    family = families.family_of(model)
    assert family.misfit(model) is None
    model.forward = scaled
    assert "LlavaOnevision computes its logits in a way that is not supported" in family.misfit(model)


@pytest.mark.parametrize("in_template", [False, True])
def test_a_prompt_begins_with_one_bos_token(in_template, mixed_samples):
    _, tokenizer, images, arguments = llava_onevision()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" * in_template + TEMPLATE
    family = families.family_for("llava_onevision")
    reader = stock_processor(family.processor_class, tokenizer, images, arguments)
    processor = Processor(family, tokenizer, reader)
    for sample in (mixed_samples[0], mixed_samples[2]):  # with an image, and without
        prompt = processor.encode(sample)
        assert prompt.input_ids[0] == tokenizer.bos_token_id != prompt.input_ids[1]
        assert prompt.text.startswith("<|endoftext|>") == in_template


def test_capped_logits():
    policy = make("llava_onevision")
    policy.model.config.text_config.final_logit_softcapping = 5.0
    hidden = torch.randn(3, 32)
    plain = hidden @ policy.model.lm_head.weight.T
    assert torch.allclose(policy.family.logits(policy.model, hidden), 5 * torch.tanh(plain / 5), atol=1e-6)


def test_a_processor_that_needs_torchvision_is_named(saved, monkeypatch):
    def absent(*given):
        raise ImportError("LlavaOnevisionProcessor requires the Torchvision library but it was not found.")

    monkeypatch.setattr("medvqa_rl.models.families.generic.stock_processor", absent)
    with pytest.raises(ValueError, match=r"requires the Torchvision library .* Install torchvision"):
        load_policy(ModelConfig(path=str(saved), device="cpu"))
