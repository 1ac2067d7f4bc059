"""Rollouts equal ``generate``, and do not depend on batching."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medvqa_rl.config import LoraConfig, RolloutConfig
from medvqa_rl.rollout import decode
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.sampling import pick_tokens, uniform_table
from medvqa_rl.rollout.state import DecodeState
from tests.models.families.stock import never_sampled, stock_greedy, stock_logits
from tests.models.families.tiny import BUILDERS, tiny_policy

LENGTH = 24
EVERY = pytest.mark.parametrize("name", BUILDERS)


def greedy(policy, samples, batch_size=4):
    return list(RolloutEngine(policy).greedy(samples, max_completion_length=LENGTH, batch_size=batch_size))


def sampled(policy, samples, **settings):
    """Token ids of a rollout by sample id."""
    config = RolloutConfig(**({"num_generations": 3, "max_completion_length": LENGTH} | settings))
    groups = RolloutEngine(policy).rollout(samples, config, seed=0, stream="train", step=0)
    return {group.sample.id: [completion.token_ids for completion in group.completions] for group in groups}


def differs(policy, samples):
    """True if the greedy tokens of any sample differ from ``generate``."""
    groups = greedy(policy, samples)
    return any(g.completions[0].token_ids != stock_greedy(policy, g.prompt, LENGTH) for g in groups)


@EVERY
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_generate(name, attention, mixed_samples):
    lengths = set()
    for seed in range(2):
        policy = tiny_policy(name, seed=seed, attention=attention)
        for group, sample in zip(greedy(policy, mixed_samples), mixed_samples, strict=True):
            (completion,) = group.completions
            expected = stock_greedy(policy, group.prompt, LENGTH)
            assert completion.token_ids == expected
            assert completion.is_truncated == (expected[-1] not in policy.processor.stop_ids)
            assert completion.text == policy.processor.decode(expected)
            assert group.sample is sample
            with torch.no_grad():
                logits = stock_logits(policy, group.prompt, expected)
            stock = logits.index_fill(-1, torch.tensor(never_sampled(policy)), -torch.inf).log_softmax(-1)
            chosen = stock.gather(-1, torch.tensor(expected)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logps), chosen, atol=2e-5, rtol=0)
            lengths.add(len(expected))
    assert len(lengths) > 2  # some ended early, so rows were finished at different times


@EVERY
def test_lora_and_checkpointing_while_training(name, mixed_samples):
    policy = tiny_policy(name, lora=LoraConfig(rank=4), gradient_checkpointing=True)
    policy.model.train()
    groups = greedy(policy, mixed_samples, batch_size=3)
    assert all(module.training for module in policy.model.modules())
    policy.model.eval()
    for group in groups:
        assert group.completions[0].token_ids == stock_greedy(policy, group.prompt, LENGTH)


@EVERY
def test_sampled_tokens_follow_the_stock_logits(name, mixed_samples):
    """Each token is what its uniform picks from a stock forward over the whole sequence."""
    policy = tiny_policy(name, seed=3)
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH, temperature=0.8, top_k=20, top_p=0.9)
    groups = RolloutEngine(policy).rollout(mixed_samples, config, seed=5, stream="eval", step=2)
    suppressed = torch.tensor(never_sampled(policy))
    for group in groups:
        table = uniform_table(5, "eval", 2, [group.sample.id], [0], 2, LENGTH)
        for index, completion in enumerate(group.completions):
            with torch.no_grad():
                logits = stock_logits(policy, group.prompt, completion.token_ids)
            u = torch.from_numpy(table[index, : len(completion.token_ids)])
            picked = pick_tokens(logits, u, temperature=0.8, top_k=20, top_p=0.9, suppressed=suppressed)
            assert tuple(picked.tolist()) == completion.token_ids


@EVERY
def test_samples_do_not_depend_on_batching_and_refill(name, mixed_samples, monkeypatch):
    policy = tiny_policy(name, seed=3)
    samples = [replace(sample, id=f"{sample.id}-{turn}") for turn in range(2) for sample in mixed_samples]
    expected = sampled(policy, samples)
    assert len({len(tokens) for group in expected.values() for tokens in group}) > 3
    assert sampled(policy, samples[::-1], max_batch=1) == expected
    shapes = []
    shape = DecodeState.shape
    monkeypatch.setattr(DecodeState, "shape", lambda state: shapes.append(shape(state)) or shapes[-1])
    monkeypatch.setattr(decode, "COMPACT_SHARE", 1e-9)  # after every finished row
    assert sampled(policy, samples, max_batch=3) == expected
    assert any(not shape.is_aligned for shape in shapes)  # prompts joined the batch while others were being decoded


@EVERY
@pytest.mark.parametrize("broken", ["shifted", "counted", "leaking"])
def test_a_broken_rollout_is_noticed(name, broken, mixed_samples, monkeypatch):
    """Positions that are off by one or that count tokens, and sequences that see padding, give other tokens."""
    admit, shape = DecodeState.admit, DecodeState.shape

    def admit_elsewhere(state, prefilled, owners, uniforms):
        positions = prefilled.next_positions + 1 if broken == "shifted" else torch.tensor(prefilled.lengths)
        return admit(state, prefilled._replace(next_positions=positions), owners, uniforms)

    if broken == "leaking":
        monkeypatch.setattr(DecodeState, "shape", lambda state: shape(state)._replace(is_padded=False))
    else:
        monkeypatch.setattr(DecodeState, "admit", admit_elsewhere)
    policies = [tiny_policy(name, seed=seed) for seed in range(2)]
    is_right = broken == "counted" and policies[0].family.num_axes == 1
    assert any(differs(policy, mixed_samples) for policy in policies) != is_right
