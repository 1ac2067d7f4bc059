"""What is particular to Qwen3-VL: DeepStack levels, and chat templates that open the reasoning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3VLMoeConfig

from medvqa_rl.config import LoraConfig, RolloutConfig
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.models.families import family_for
from medvqa_rl.models.families.generic import Generic
from medvqa_rl.models.families.qwen3_vl import Qwen3VL
from medvqa_rl.models.processor import Processor
from medvqa_rl.rollout.decode import RolloutEngine
from tests.models.families.stock import stock_greedy
from tests.models.families.test_updates import make_groups
from tests.models.families.tiny import QWEN3_VL_THINKING_TEMPLATE, qwen3_vl, tiny_policy

LENGTH = 16


@pytest.fixture
def policy():
    return tiny_policy("qwen3_vl")


def test_features_hold_the_input_and_each_level(policy, mixed_samples):
    prompts = [policy.processor.encode(sample) for sample in mixed_samples]
    features = policy.family.image_features(policy.model, prompts, "cpu")
    for prompt, feature in zip(prompts, features, strict=True):
        if not prompt.image_inputs:
            assert feature is None
            continue
        images = {name: torch.from_numpy(array) for name, array in prompt.image_inputs.items()}
        with torch.no_grad():
            output = policy.model.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"])
        expected = torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)
        assert expected.shape == (int((prompt.input_ids == policy.processor.image_token_id).sum()), 3 * 32)
        torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.ROWS])
def test_a_dropped_level_is_noticed_in_the_update(policy, level, layout, mixed_samples):
    batch = collate(make_groups(policy, mixed_samples), policy.processor, "cpu", layout=layout)

    def drop(feature):
        dropped = feature.clone()
        dropped[:, level * 32 : (level + 1) * 32] = 0
        return dropped

    broken = replace(batch, features=tuple(None if each is None else drop(each) for each in batch.features))
    with torch.no_grad():
        right, wrong = (GroupForward(policy.model)(given).logps for given in (batch, broken))
    with_images = torch.tensor([bool(sample.images) for sample in mixed_samples]).repeat_interleave(3)
    assert (right - wrong)[with_images].abs().max() > 1e-2
    assert torch.equal(right[~with_images], wrong[~with_images]) or layout == Layout.PACKED


def test_a_dropped_level_is_noticed_in_the_rollout(policy, mixed_samples, monkeypatch):
    insert = Qwen3VL.insert

    def broken(self, embeds, placeholders, features):
        embedded = insert(self, embeds, placeholders, features)
        levels = embedded.arguments["deepstack_visual_embeds"]
        return embedded._replace(arguments={**embedded.arguments, "deepstack_visual_embeds": levels[:-1]})

    monkeypatch.setattr(Qwen3VL, "insert", broken)
    samples = [sample for sample in mixed_samples if sample.images]
    groups = RolloutEngine(policy).greedy(samples, max_completion_length=24, batch_size=4)
    assert any(group.completions[0].token_ids != stock_greedy(policy, group.prompt, 24) for group in groups)


def test_the_mergers_of_all_levels_are_the_projector():
    for settings in ({}, {"lora": LoraConfig(rank=2)}):
        policy = tiny_policy("qwen3_vl", train_projector=True, **settings)
        trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
        vision = {name for name in trained if ".visual." in name}
        assert all(".merger." in name or ".deepstack_merger_list." in name for name in vision)
        assert {part for part in (".merger.", "_list.0.", "_list.1.") if any(part in name for name in vision)} == {
            ".merger.",
            "_list.0.",
            "_list.1.",
        }


def test_thinking_variants_are_read_from_inside_the_reasoning(policy, make_sample):
    tokenizer = qwen3_vl(QWEN3_VL_THINKING_TEMPLATE).tokenizer
    policy.processor = Processor(policy.family, tokenizer, policy.processor.image_processor)
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH)
    engine = RolloutEngine(policy)
    (group,) = engine.rollout([make_sample()], config, seed=0, stream="train", step=0)
    assert group.prompt.text.endswith("<|im_start|>assistant\n<think>\n")
    for completion in group.completions:
        assert completion.text == "<think>\n" + policy.processor.decode(completion.token_ids)

    ids = policy.processor.encode_completion("A line is seen.</think>\n\n<answer>yes</answer>")
    parsed = parse_completion(group.prompt.opening + policy.processor.decode(ids))
    assert (parsed.think, parsed.answer, parsed.is_well_formed) == ("A line is seen.", "yes", True)


def test_mixtures_of_experts_have_no_fast_path():
    family = family_for("qwen3_vl_moe")
    assert isinstance(family, Generic)
    assert family.title == "Qwen3VLMoe"
    assert family.unusable(Qwen3VLMoeConfig()) is None
