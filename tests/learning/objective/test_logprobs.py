"""Statistics, layouts and chunks of groups; tests/models/families has the gradients against the stock forward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.objective import logprobs
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate, layout_for, token_statistics
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.prefix import group_attention
from medvqa_rl.models.prefix.group_attention import attention_mask

TEMPERATURE = 0.7


def make_groups(policy, samples, *, cached=False, with_image_token=False, seed=0):
    """Groups of three random completions of 1 to 9 tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for sample in samples:
        prompt = policy.processor.encode(sample)
        completions = [tuple(int(i) for i in rng.integers(0, 300, rng.integers(1, 10))) for _ in range(3)]
        if with_image_token:
            completions[1] = (policy.processor.image_token_id, *completions[1])
        groups.append(Group(sample, prompt, [Completion(ids, "", False) for ids in completions]))
    if cached:
        features = policy.family.image_features(policy.model, [group.prompt for group in groups], "cpu")
        for group, feature in zip(groups, features):
            group.image_features = feature
    return groups


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("layout", list(Layout))
def test_statistics_equal_the_stock_forward(tiny_policy, mixed_samples, stock_logps, layout):
    policy = tiny_policy()
    groups = make_groups(policy, mixed_samples)
    batch = collate(groups, policy.processor, "cpu", layout=layout)
    assert batch.input_ids.shape[0] == {"packed": 1, "rows": len(groups), "separate": 3 * len(groups)}[layout]
    with torch.no_grad():
        stats = GroupForward(policy.model)(batch, temperature=TEMPERATURE, entropy="value")
        logps, entropy = map(padded, stock_logps(policy.model, groups, TEMPERATURE))
    assert (stats.logps - logps).abs().max() <= 1e-5
    assert (stats.entropy - entropy).abs().max() <= 1e-5
    assert (stats.logps[~batch.mask] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_lora_gradients_do_not_depend_on_the_layout(tiny_policy, mixed_samples, settings):
    policy = tiny_policy(lora=LoraConfig(rank=2), **settings)
    policy.model.train()
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:  # zero at first, and then lora_A would have no gradient
            torch.nn.init.normal_(parameter, std=0.1)
    groups = make_groups(policy, mixed_samples, with_image_token=True)
    gradients = []
    for layout in ("packed", "rows", "separate"):
        batch = collate(groups, policy.processor, "cpu", layout=layout)
        policy.model.zero_grad()
        GroupForward(policy.model)(batch).logps.square().sum().backward()
        gradients.append({name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad})
    assert any("lora_A" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-5 * gradients[1][name].norm() + 1e-8, name


def test_an_image_token_in_a_completion_shifts_nothing(tiny_policy, mixed_samples):
    policy = tiny_policy()
    logps = []
    for with_image_token in (False, True):
        groups = make_groups(policy, mixed_samples, with_image_token=with_image_token)
        with torch.no_grad():
            logps.append(GroupForward(policy.model)(collate(groups, policy.processor, "cpu")).logps[0::3, :9])
    assert (logps[0] - logps[1]).abs().max() <= 1e-5  # the groups' other completions


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_attention_gets_the_layout_that_it_can_take(tiny_policy, mixed_samples, attention):
    policy = tiny_policy()
    groups = make_groups(policy, mixed_samples)
    with torch.no_grad():
        packed = GroupForward(policy.model)(collate(groups, policy.processor, "cpu")).logps
        backbone(policy.model).language_model.config._attn_implementation = attention  # as it is without our own
        batch = collate(groups, policy.processor, "cpu", layout=layout_for(attention))
        assert batch.input_ids.shape[0] == len(groups)
        rows = GroupForward(policy.model)(batch).logps
    assert (packed - rows).abs().max() <= 1e-5


def test_flash_attention_is_refused_for_shared_rows(tiny_policy, mixed_samples):
    policy = tiny_policy()
    backbone(policy.model).language_model.config._attn_implementation = "flash_attention_2"
    assert layout_for("flash_attention_2") is Layout.SEPARATE
    for layout in ("packed", "rows"):
        batch = collate(make_groups(policy, mixed_samples), policy.processor, "cpu", layout=layout)
        with pytest.raises(ValueError, match=r"model\.attention is flash_attention_2"):
            GroupForward(policy.model)(batch)


def test_a_leaking_dense_mask_is_noticed(tiny_policy, mixed_samples, monkeypatch):
    policy = tiny_policy()
    batch = collate(make_groups(policy, mixed_samples), policy.processor, "cpu", layout=Layout.ROWS)
    with torch.no_grad():
        right = GroupForward(policy.model)(batch).logps
        causal = torch.ones(batch.input_ids.shape[1], batch.input_ids.shape[1], dtype=torch.bool).tril()
        monkeypatch.setattr(group_attention, "attention_mask", lambda rows, *_: causal.expand(len(rows), 1, -1, -1))
        leaking = GroupForward(policy.model)(batch).logps
    first = slice(0, None, 3)  # nothing stands between a prompt and its first completion
    assert (right[first] - leaking[first]).abs().max() <= 1e-5
    assert (right - leaking).abs().max() > 1e-2


def test_mask_by_hand():
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask.int().tolist() == expected


def test_images_are_encoded_once_per_prompt(tiny_policy, mixed_samples, monkeypatch):
    policy = tiny_policy(lora=LoraConfig(rank=2), gradient_checkpointing=True)
    policy.model.train()
    groups = make_groups(policy, mixed_samples)
    seen = []

    def keep(module, inputs, output):
        seen.append((inputs[0].shape[0], output.last_hidden_state.requires_grad))

    backbone(policy.model).visual.register_forward_hook(keep)
    GroupForward(policy.model)(collate(groups, policy.processor, "cpu")).logps.sum().backward()
    patches = sum(len(g.prompt.image_inputs.get("pixel_values", ())) for g in groups)
    assert seen == [(patches, False)]  # one pass over each image; a frozen tower is not walked back through
    seen.clear()
    cached = make_groups(policy, mixed_samples, cached=True)
    seen.clear()
    GroupForward(policy.model)(collate(cached, policy.processor, "cpu")).logps.sum().backward()
    assert seen == []


def test_chunks_change_nothing(tiny_policy, mixed_samples, monkeypatch):
    policy = tiny_policy()
    batch = collate(make_groups(policy, mixed_samples), policy.processor, "cpu")
    results = []
    for size in (logprobs.LOGITS_PER_CHUNK, 2000):  # the whole batch; a few tokens
        monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", size)
        policy.model.zero_grad()
        stats = GroupForward(policy.model)(batch, entropy="value")
        stats.logps.square().sum().backward()
        results.append((stats, policy.model.lm_head.weight.grad.clone()))
    assert (results[0][0].logps - results[1][0].logps).abs().max() <= 1e-6
    assert (results[0][0].entropy - results[1][0].entropy).abs().max() <= 1e-6
    assert (results[0][1] - results[1][1]).norm() <= 1e-5 * results[0][1].norm()


def test_entropy_gradient_equals_the_stock_forward(tiny_policy, mixed_samples, stock_logps, monkeypatch):
    """In one piece and in chunks, next to a gradient of the log-probabilities; without it, nothing changes."""
    policy = tiny_policy()
    groups = make_groups(policy, mixed_samples)
    batch = collate(groups, policy.processor, "cpu")
    logps, entropies = map(padded, stock_logps(policy.model, groups, TEMPERATURE))
    (logps.square().sum() + 0.3 * entropies.square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    for size in (logprobs.LOGITS_PER_CHUNK, 2000):
        monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", size)
        policy.model.zero_grad()
        stats = GroupForward(policy.model)(batch, temperature=TEMPERATURE, entropy="gradient")
        (stats.logps.square().sum() + 0.3 * stats.entropy.square().sum()).backward()
        for name, gradient in expected.items():
            found = dict(policy.model.named_parameters())[name].grad
            assert (found - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, (size, name)
    value = GroupForward(policy.model)(batch, temperature=TEMPERATURE, entropy="value")
    assert not value.entropy.requires_grad and torch.equal(value.logps, stats.logps)


def test_entropy_gradient_by_hand():
    """dH / dz = -p (log p + H) for logits z, divided by the temperature."""
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    token_statistics(lambda hidden: hidden, logits, torch.tensor([0]), 0.5, "gradient")[1].backward()
    p = torch.softmax(logits.detach() / 0.5, -1)
    expected = -p * (p.log() - (p * p.log()).sum()) / 0.5
    assert logits.grad[0].tolist() == pytest.approx(expected[0].tolist(), rel=1e-5)


def test_entropy_of_uniform_logits_is_log_v():
    head = torch.nn.Linear(4, 50, bias=False)
    torch.nn.init.zeros_(head.weight)
    logps, entropy = token_statistics(head, torch.randn(3, 4), torch.tensor([0, 7, 49]), 1.0, "value")
    assert entropy.tolist() == pytest.approx([math.log(50)] * 3, rel=1e-6)
    assert logps.tolist() == pytest.approx([-math.log(50)] * 3, rel=1e-6)


def test_temperature_by_hand():
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1.0], [0.0]])
    logps, _ = token_statistics(head, torch.ones(1, 1), torch.tensor([0]), 0.5, "none")
    assert logps.item() == pytest.approx(2 - math.log(math.exp(2) + 1))
