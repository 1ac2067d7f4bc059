"""Log-probabilities and gradients of whole groups equal those of the stock forward, one completion at a time."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from tests.models.families.stock import stock_logps
from tests.models.families.tiny import BUILDERS, tiny_policy

LORA = LoraConfig(rank=2)
EVERY = pytest.mark.parametrize("name", BUILDERS)
TRAINED = {
    "full": {},
    "full with the tower": {"train_vision": True, "train_projector": True},
    "full with the tower, checkpointed": {"train_vision": True, "train_projector": True, "gradient_checkpointing": 1},
    "lora": {"lora": LORA},
    "lora with the projector, checkpointed": {"lora": LORA, "train_projector": True, "gradient_checkpointing": True},
}


def make_groups(policy, samples):
    """Groups of three random completions of 1 to 9 tokens, with features where the tower is frozen."""
    rng = np.random.default_rng(0)
    groups = []
    for sample in samples:
        completions = [tuple(int(i) for i in rng.integers(0, 300, rng.integers(1, 10))) for _ in range(3)]
        prompt = policy.processor.encode(sample)
        groups.append(Group(sample, prompt, [Completion(ids, "", False) for ids in completions]))
    if policy.vision_is_frozen:
        prompts = [group.prompt for group in groups]
        features = policy.processor.family.image_features(policy.model, prompts, "cpu")
        for group, feature in zip(groups, features):
            group.image_features = feature
    return groups


def gradients(policy):
    """Gradients of the trained parameters, which are then cleared."""
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    policy.model.zero_grad()
    return found


@EVERY
@pytest.mark.parametrize("trained", TRAINED)
def test_equals_the_stock_forward(name, trained, mixed_samples):
    policy = tiny_policy(name, **TRAINED[trained])
    groups = make_groups(policy, mixed_samples)
    expected = stock_logps(policy, groups)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (expected * weights).sum().backward()
    expected_gradients = gradients(policy)
    policy.model.train()  # where checkpointing takes effect
    for layout in Layout:
        batch = collate(groups, policy.processor, "cpu", layout=layout)
        logps = GroupForward(policy.model)(batch).logps
        assert (logps - expected).abs().max() <= 1e-5
        (logps * weights).sum().backward()
        for key, gradient in gradients(policy).items():
            difference = (gradient - expected_gradients[key]).norm()
            # A key's bias without rotation shifts all scores of a query alike: its gradient is 0 but for rounding.
            rounding = 1e-6 if re.search(r"vision_tower.*k_proj\.bias$", key) else 1e-8
            assert difference <= 1e-5 * expected_gradients[key].norm() + rounding, (layout, key)
    moved = [key for key, gradient in expected_gradients.items() if gradient.norm() > 1e-3]
    assert len(moved) > 0.9 * len(expected_gradients)  # the comparison is not of zeros


def shifted(batch):
    """Completions start a position too late."""
    return replace(batch, position_ids=batch.position_ids + (batch.segments > 0).long())


def leaking(batch):
    """Completions of a group see each other, or the tokens after them and the padding of their prompt."""
    if batch.packing is None:
        return replace(batch, segments=batch.segments.clamp(max=1))
    return replace(batch, packing=replace(batch.packing, mask=torch.ones_like(batch.packing.mask)))


def misplaced(batch):
    """Each placeholder takes the features of the one before it."""
    return replace(batch, features=tuple(None if each is None else each.roll(1, 0) for each in batch.features))


@EVERY
@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.ROWS])
@pytest.mark.parametrize("broken", [shifted, leaking, misplaced])
def test_a_broken_update_is_noticed(name, layout, broken, mixed_samples):
    policy = tiny_policy(name)
    batch = collate(make_groups(policy, mixed_samples), policy.processor, "cpu", layout=layout)
    with torch.no_grad():
        right, wrong = (GroupForward(policy.model)(given).logps for given in (batch, broken(batch)))
    assert (right - wrong).abs().max() > 1e-2
