"""Phantom VLMs of every family are built by the same recipe."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from medvqa_rl.config import ModelConfig
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.models.checkpoints import write_model
from medvqa_rl.models.families import FAMILIES
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.phantom.architectures import PHANTOMS
from medvqa_rl.phantom.binding import WORDS
from medvqa_rl.phantom.build import build, learn
from medvqa_rl.phantom.seeing import learn_to_see
from medvqa_rl.phantom.vlm import build_model, build_processor
from medvqa_rl.rollout.decode import RolloutEngine

EVERY = pytest.mark.parametrize("name", PHANTOMS)


@cache
def processor(name: str) -> Processor:
    return build_processor(name)


def fresh(name: str) -> Policy:
    config = ModelConfig(train_vision=True, train_projector=True)
    return Policy(build_model(processor(name), seed=3), processor(name), torch.device("cpu"), config)


def test_every_family_has_a_phantom() -> None:
    assert set(PHANTOMS) == {kind for family in FAMILIES for kind in family.model_types}


@EVERY
def test_images_have_sixteen_tokens_and_words_one(name: str) -> None:
    own = processor(name)
    prompt = own.encode(draw_sample(seed=0, split="tokens", index=0))
    assert int((prompt.input_ids == own.image_token_id).sum()) == 16
    assert all(len(own.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in WORDS)


@EVERY
def test_the_first_layer_initially_attends_one_and_two_tokens_back(name: str) -> None:
    model = fresh(name).model
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    attention = model(input_ids=ids, output_attentions=True).attentions[0][0]  # (heads, queries, keys)
    for head in range(2):
        looked_at = attention[head, 10:].argmax(dim=-1)
        assert torch.equal(looked_at, torch.arange(10, 40) - (head + 1))


@EVERY
def test_a_few_steps_lower_the_loss_and_the_checkpoint_opens(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medvqa_rl.phantom.build.BATCH", 4)
    monkeypatch.setattr("medvqa_rl.phantom.training.LOG_STEPS", 10)
    policy, rows = fresh(name), []
    learn_to_see(policy, 20, 1e-3, 0, rows.append, batch=4)
    learn(policy, "instruct", 20, 0, rows.append)
    assert rows[1]["loss"] < rows[0]["loss"] and rows[3]["loss"] < 0.9 * rows[2]["loss"]
    write_model(policy, tmp_path / "model")
    loaded = load_policy(ModelConfig(path=str(tmp_path / "model"), device="cpu"))
    sample = draw_sample(seed=0, split="open", index=0)
    ids = [
        next(RolloutEngine(one).greedy([sample], max_completion_length=8, batch_size=1)).completions[0].token_ids
        for one in (policy, loaded)
    ]
    assert ids[0] == ids[1]


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--family is 'llava', but the families are qwen2_vl, qwen2_5_vl, qwen3_vl"):
        build(tmp_path / "new", family="llava")
