"""What is particular to Gemma 3: images that attend in both directions, sliding windows, and what cannot be used."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import Gemma3Config

from medvqa_rl.config import ModelConfig, RolloutConfig
from medvqa_rl.core.text import neutralise
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.families.gemma3 import Gemma3
from medvqa_rl.models.loading import load_policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.rollout import cuda_graph
from medvqa_rl.rollout.cuda_graph import GraphDecoder
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.state import DecodeState
from tests.models.families import tiny
from tests.models.families.stock import stock_greedy, stock_logps
from tests.models.families.test_updates import make_groups
from tests.models.families.tiny import gemma3, gemma_tokenizer, tiny_policy
from tests.rollout.test_cuda_graph import Recorder

LENGTH = 24
LAYOUTS = pytest.mark.parametrize("layout", Layout)


@pytest.fixture
def with_window(monkeypatch):
    """Builds a policy with a sliding window of some tokens."""

    def build(window, **settings):
        monkeypatch.setitem(tiny.BUILDERS, "gemma3", partial(gemma3, window))
        return tiny_policy("gemma3", **settings)

    return build


def greedy(policy, samples):
    groups = RolloutEngine(policy).greedy(samples, max_completion_length=LENGTH, batch_size=4)
    return [(group.completions[0].token_ids, group.prompt) for group in groups]


def differs(policy, samples):
    return any(ids != stock_greedy(policy, prompt, LENGTH) for ids, prompt in greedy(policy, samples))


def lengths(policy, samples):
    return [len(policy.processor.encode(sample).input_ids) for sample in samples]


@pytest.mark.parametrize("window", [2, 6, "crossed", 4096])
def test_windows_are_exact(window, with_window, mixed_samples):
    """Shorter than an image, than a prompt, crossed during the completions, and never reached."""
    if window == "crossed":
        sizes = lengths(with_window(4096), mixed_samples)
        assert max(sizes) - min(sizes) > 8
        window = sorted(sizes)[-2] + 4
    policy = with_window(window, seed=3)
    policy.processor.stop_ids = policy.processor.stop_ids[:1]  # completions reach their limit
    for ids, prompt in greedy(policy, mixed_samples):
        assert ids == stock_greedy(policy, prompt, LENGTH)
    groups = make_groups(policy, mixed_samples)
    with torch.no_grad():
        expected = stock_logps(policy, groups)
        for layout in Layout:
            logps = GroupForward(policy.model)(collate(groups, policy.processor, "cpu", layout=layout)).logps
            assert (logps - expected).abs().max() <= 1e-5


def test_graphs_mask_the_window_before_a_sequence_outgrows_it(with_window, mixed_samples, monkeypatch):
    monkeypatch.setattr(cuda_graph, "LENGTH_MULTIPLE", 8)
    policy = with_window(max(lengths(with_window(4096), mixed_samples)) + 12, seed=3)
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH, max_batch=3)
    recorder, found = Recorder(), []
    for graphs in (None, GraphDecoder(policy.model, "cpu", recorder)):
        engine = RolloutEngine(policy)
        engine._graphs = graphs
        groups = engine.rollout(mixed_samples, config, seed=0, stream="train", step=0)
        found.append([completion.token_ids for group in groups for completion in group.completions])
    assert found[0] == found[1]
    assert {shape.is_windowed for shape, _ in recorder.shapes} == {False, True}


def test_a_window_that_is_never_reached_costs_nothing(with_window, mixed_samples, monkeypatch):
    policy = with_window(4096)
    shapes, shape = [], DecodeState.shape
    monkeypatch.setattr(DecodeState, "shape", lambda state: shapes.append(shape(state)) or shapes[-1])
    greedy(policy, mixed_samples)
    assert shapes
    assert not any(each.is_windowed for each in shapes)
    packing = collate(make_groups(policy, mixed_samples), policy.processor, "cpu").packing
    assert packing.prepared(torch.float32, 2, 4096).windowed is None


def causal(monkeypatch):
    monkeypatch.setattr(Gemma3, "blocks", lambda self, prompt, readers: None)


def off_by(number, monkeypatch):
    window = Gemma3.window
    monkeypatch.setattr(Gemma3, "window", lambda self, model: window(self, model) + number)


BROKEN = pytest.mark.parametrize("broken", [causal, partial(off_by, 1), partial(off_by, -1)])


@BROKEN
@LAYOUTS
def test_a_wrong_mask_is_noticed_in_the_update(broken, layout, mixed_samples, monkeypatch):
    policy = tiny_policy("gemma3")
    groups = [group for group in make_groups(policy, mixed_samples) if group.prompt.image_inputs]
    with torch.no_grad():
        right = GroupForward(policy.model)(collate(groups, policy.processor, "cpu", layout=layout)).logps
        broken(monkeypatch)
        wrong = GroupForward(policy.model)(collate(groups, policy.processor, "cpu", layout=layout)).logps
    assert (right - wrong).abs().max() > 1e-2


@BROKEN
def test_a_wrong_mask_is_noticed_in_the_rollout(broken, mixed_samples, monkeypatch):
    broken(monkeypatch)
    assert any(differs(tiny_policy("gemma3", seed=seed), mixed_samples) for seed in range(2))


def test_line_breaks_around_an_image_join_those_of_the_prompt(mixed_samples):
    processor = tiny_policy("gemma3").processor
    three = processor.tokenizer.convert_tokens_to_ids("\n\n\n")
    prompt = processor.encode(mixed_samples[0])
    start = int(np.flatnonzero(prompt.input_ids == processor.tokenizer.convert_tokens_to_ids("<start_of_image>"))[0])
    assert prompt.input_ids[start - 1] == three
    assert prompt.text.startswith("<bos><start_of_turn>user\n<start_of_image>")
    assert (prompt.input_ids == processor.tokenizer.bos_token_id).sum() == 1
    blocks = processor.blocks(processor.encode(mixed_samples[1]))
    assert [int((blocks == number).sum()) for number in range(3)] == [4, 4, 0]


def test_answers_end_with_the_turn():
    processor = tiny_policy("gemma3").processor
    end = processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert processor.encode_completion("yes")[-1] == end
    assert {end, processor.tokenizer.eos_token_id} <= set(processor.stop_ids)
    for token in ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<bos>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) in processor.suppressed_ids
        assert neutralise(f"a {token} b") == (f"a ({token[1:-1]}) b", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    write_model(tiny_policy("gemma3"), folder)
    return folder


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_pan_and_scan_is_switched_off_in_a_sentence(folder, mixed_samples, capsys):
    path = folder / "preprocessor_config.json"
    before = path.read_text()
    change(path, do_pan_and_scan=True, pan_and_scan_min_crop_size=16, pan_and_scan_max_num_crops=4)
    policy = load_policy(ModelConfig(path=str(folder), device="cpu"))
    assert "switches pan-and-scan on" in capsys.readouterr().err
    assert policy.processor.encode(mixed_samples[0]).image_inputs["pixel_values"].shape == (1, 3, 56, 56)
    policy.processor.save(folder)
    assert json.loads(path.read_text())["do_pan_and_scan"] is False
    path.write_text(before)
    load_policy(ModelConfig(path=str(folder), device="cpu"))
    assert "pan-and-scan" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash_attention_2"}, "flash_attention_2, which cannot let the tokens of an image"),
        ({"max_pixels": 100_000}, "do not apply to Gemma 3, which resizes every image to 56 x 56 pixels"),
    ],
)
def test_settings_that_do_not_apply_are_refused(settings, message, folder):
    with pytest.raises(ValueError, match=message):
        load_policy(ModelConfig(path=str(folder), device="cpu", **settings))


@pytest.mark.parametrize("name", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_softcapping_is_refused(name, tmp_path):
    Gemma3Config(text_config={name: 30.0}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"sets {name}"):
        load_policy(ModelConfig(path=str(tmp_path), device="cpu"))


def test_a_tokenizer_of_another_family_is_refused():
    image_processor = gemma3().image_processor
    with pytest.raises(ValueError, match="has no <image_soft_token> token, so it does not belong to a Gemma 3 model"):
        Processor(Gemma3(), tiny.qwen_tokenizer(), image_processor)
    Processor(Gemma3(), gemma_tokenizer(), image_processor)
