"""Costs that are read from files equal those of real models."""

from __future__ import annotations

import json

import pytest

from medvqa_rl.config import ModelConfig
from medvqa_rl.models.families import FAMILIES
from medvqa_rl.models.families.costs import image_rule, measure, read_architecture
from medvqa_rl.models.families.parts import causal_model
from tests.models.families.tiny import BUILDERS, tiny_policy


@pytest.mark.parametrize("name", BUILDERS)
def test_a_config_file_gives_the_parameters_of_its_model(name: str) -> None:
    policy = tiny_policy(name)
    model = causal_model(policy.model)
    found = read_architecture(json.loads(model.config.to_json_string(use_diff=False)))
    assert found == measure(policy.family, model)
    assert sum(found.parameters) == sum(parameter.numel() for parameter in model.parameters())
    assert found.parameters.vision == sum(
        parameter.numel() for _, parameter, _ in policy.family.vision_parameters(model)
    )
    assert found.vision_layers == len(policy.family.vision_layers(model)) and found.tower_weights > 0


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("size", [(300, 70), (64, 64), (500, 900)])
def test_image_tokens_equal_those_of_prompts(name, size, tmp_path, make_sample, make_image) -> None:
    policy = tiny_policy(name)
    policy.processor.save(tmp_path)
    causal_model(policy.model).config.save_pretrained(tmp_path)
    prompt = policy.processor.encode(make_sample(images=(make_image(*size),)))
    rule, where = image_rule(ModelConfig(path=str(tmp_path)))
    assert where.startswith("from ")
    counted = int((prompt.input_ids == policy.processor.image_token_id).sum())
    cost = rule.size(*size)
    assert cost.tokens == rule.tokens(*size)
    found = read_architecture(json.loads((tmp_path / "config.json").read_text()))
    assert cost.tokens == sum(down * across for down, across in cost.grids) // found.patches_per_token
    assert cost.tokens == counted


def test_titles_are_distinct() -> None:
    assert len({family.title for family in FAMILIES}) == len(FAMILIES)
