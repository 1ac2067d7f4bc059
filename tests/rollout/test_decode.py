"""The rollout engine's batching, addressing and errors; tests/models/families compares it with ``generate``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medvqa_rl.config import RolloutConfig
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.rollout import decode
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.state import DecodeState
from tests.models.families.stock import never_sampled, stock_greedy

LENGTH = 24


@pytest.fixture
def make_policy(tiny_policy):
    """Tiny policies whose completions end at various lengths: one token in eight is a stop token, not one in 350."""

    def make(*args, **settings):
        policy = tiny_policy(*args, **settings)
        policy.processor.stop_ids = (policy.processor.eos_id, *range(0, 320, 8))
        return policy

    return make


def sampled(policy, samples, *, seed=0, step=0, stream="train", **settings):
    """Token ids of a rollout by sample id."""
    config = RolloutConfig(**({"num_generations": 4, "max_completion_length": LENGTH} | settings))
    groups = RolloutEngine(policy).rollout(samples, config, seed=seed, stream=stream, step=step)
    assert [group.sample for group in groups] == list(samples)
    return {group.sample.id: [completion.token_ids for completion in group.completions] for group in groups}


def test_sampling_does_not_depend_on_batching(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    expected = sampled(policy, mixed_samples, max_batch=64)
    assert len({len(tokens) for group in expected.values() for tokens in group}) > 3
    assert sampled(policy, mixed_samples, max_batch=1) == expected
    assert sampled(policy, mixed_samples, max_batch=3) == expected
    assert sampled(policy, mixed_samples[::-1]) == expected
    assert sampled(policy, mixed_samples[1:2])["two"] == expected["two"]
    for count in (1, 3, 7):
        for id, group in sampled(policy, mixed_samples, num_generations=count).items():
            assert group[:4] == expected[id][:count]
    for id, group in sampled(policy, mixed_samples, max_completion_length=9).items():
        assert group == [tokens[:9] for tokens in expected[id]]


def test_sampling_does_not_depend_on_compaction(make_policy, mixed_samples, monkeypatch):
    policy = make_policy(seed=3)
    expected = sampled(policy, mixed_samples)
    for share in (1e-9, 2.0):  # after every finished row, and never
        monkeypatch.setattr(decode, "COMPACT_SHARE", share)
        assert sampled(policy, mixed_samples) == expected


def test_each_part_of_the_address_changes_the_samples(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    expected = sampled(policy, mixed_samples)
    assert sampled(policy, mixed_samples) == expected
    assert sampled(policy, mixed_samples, seed=1) != expected
    assert sampled(policy, mixed_samples, step=1) != expected
    assert sampled(policy, mixed_samples, stream="ask") != expected
    assert len(set(expected["one"])) == 4


def test_a_repeated_sample_gets_new_completions(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    first = mixed_samples[0]
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH)
    engine = RolloutEngine(policy)

    def tokens(samples, **settings):
        groups = engine.rollout(samples, config.model_copy(update=settings), seed=0, stream="train", step=0)
        return [[completion.token_ids for completion in group.completions] for group in groups]

    together = tokens([first, mixed_samples[1], first])
    assert together[0] != together[2]
    assert tokens([first, mixed_samples[1], first], max_batch=1) == together
    assert tokens([first])[0] == together[0]


def test_control_tokens_are_never_sampled(make_policy, mixed_samples):
    policy = make_policy()
    suppressed = torch.tensor(never_sampled(policy))
    with torch.no_grad():
        head = policy.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone())  # untied from the embeddings
        hidden = torch.ones(head.in_features)
        head.weight[suppressed] += 50 * hidden
        head.weight[suppressed[::2]] -= 100 * hidden  # whatever the sign of the hidden state
    engine = RolloutEngine(policy)
    config = RolloutConfig(num_generations=4, max_completion_length=LENGTH)
    groups = engine.rollout(mixed_samples, config, seed=0, stream="train", step=0)
    groups += engine.greedy(mixed_samples, max_completion_length=LENGTH, batch_size=4)
    tokens = {id for group in groups for completion in group.completions for id in completion.token_ids}
    assert not tokens & set(never_sampled(policy))


def test_features_are_cached_only_if_the_tower_is_frozen(make_policy, mixed_samples):
    config = RolloutConfig(num_generations=2, max_completion_length=4)
    frozen, trained = make_policy(), make_policy(train_projector=True)
    groups = RolloutEngine(frozen).rollout(mixed_samples, config, seed=0, stream="train", step=0)
    for group in groups:
        if group.sample.images:
            (alone,) = frozen.family.image_features(frozen.model, [group.prompt], "cpu")
            torch.testing.assert_close(group.image_features, alone)
            assert not group.image_features.requires_grad
        else:
            assert group.image_features is None
    groups = RolloutEngine(trained).rollout(mixed_samples, config, seed=0, stream="train", step=0)
    assert all(group.image_features is None for group in groups)


def test_images_are_encoded_once_per_prompt(make_policy, mixed_samples, monkeypatch):
    policy = make_policy()
    patches = []
    tower = backbone(policy.model).visual
    forward = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda pixels, **kwargs: patches.append(len(pixels)) or forward(pixels, **kwargs)
    )
    config = RolloutConfig(num_generations=5, max_completion_length=4)
    groups = RolloutEngine(policy).rollout(mixed_samples, config, seed=0, stream="train", step=0)
    prompts = [group.prompt.image_inputs["pixel_values"] for group in groups if group.prompt.image_inputs]
    assert patches == [sum(len(pixels) for pixels in prompts)]
    assert [image.loads for sample in mixed_samples for image in sample.images] == [1] * 4


def watch_shapes(monkeypatch):
    """A list that collects the shape of every decoding step."""
    shapes = []
    shape = DecodeState.shape
    monkeypatch.setattr(DecodeState, "shape", lambda state: shapes.append(shape(state)) or shapes[-1])
    return shapes


def test_prompts_of_equal_length_need_no_mask(make_policy, make_sample, monkeypatch):
    shapes = watch_shapes(monkeypatch)
    config = RolloutConfig(num_generations=2, max_completion_length=5)
    RolloutEngine(make_policy()).rollout([make_sample("a"), make_sample("b")], config, seed=0, stream="train", step=0)
    assert shapes
    assert not any(shape.is_padded for shape in shapes)
    assert all(shape.is_aligned for shape in shapes)
    assert shapes[0].is_grid


def many_samples(mixed_samples):
    """Twelve samples of different lengths."""
    return [replace(sample, id=f"{sample.id}-{turn}") for turn in range(3) for sample in mixed_samples]


def test_waiting_prompts_take_the_rows_of_finished_sequences(make_policy, mixed_samples, monkeypatch):
    policy = make_policy(seed=3)
    samples = many_samples(mixed_samples)
    expected = sampled(policy, samples)
    shapes = watch_shapes(monkeypatch)
    for share in (0.25, 1e-9, 2.0):
        monkeypatch.setattr(decode, "COMPACT_SHARE", share)
        shapes.clear()
        assert sampled(policy, samples, max_batch=3) == expected
        is_refilled = any(not shape.is_aligned for shape in shapes)
        assert is_refilled == (share < 1)
        assert max(shape.rows for shape in shapes) == 12
        # Up to twice as many prompts share the rows, but there are never more rows.
        assert max(shape.slots for shape in shapes) > 3 or share > 1
    long = sum(shape.rows for shape in shapes)  # never refilled: rows wait for the last of their batch
    shapes.clear()
    monkeypatch.setattr(decode, "COMPACT_SHARE", 0.25)
    sampled(policy, samples, max_batch=3)
    assert sum(shape.rows for shape in shapes) < 0.8 * long


def test_greedy_does_not_depend_on_the_batch_size(make_policy, mixed_samples, monkeypatch):
    policy = make_policy(seed=1)
    samples = many_samples(mixed_samples)
    shapes = watch_shapes(monkeypatch)
    for size in (1, 3, 5):
        shapes.clear()
        groups = list(RolloutEngine(policy).greedy(iter(samples), max_completion_length=LENGTH, batch_size=size))
        assert [group.sample.id for group in groups] == [sample.id for sample in samples]
        for group in groups[:4]:
            assert group.completions[0].token_ids == stock_greedy(policy, group.prompt, LENGTH)
        by_id = {group.sample.id: group.completions[0].token_ids for group in groups}
        assert all(by_id[f"{sample.id}-2"] == by_id[f"{sample.id}-0"] for sample in mixed_samples)
        assert size == 1 or any(not shape.is_aligned for shape in shapes)


def test_greedy_reads_ahead_no_further_than_its_batch(make_policy, mixed_samples):
    policy = make_policy(seed=1)
    taken = []
    samples = (taken.append(sample) or sample for sample in many_samples(mixed_samples))
    groups = RolloutEngine(policy).greedy(samples, max_completion_length=LENGTH, batch_size=2)
    for given in range(1, 13):
        next(groups)
        assert torch.is_grad_enabled()
        assert len(taken) <= given + LENGTH * 2
    assert len(taken) == 12


def test_encoded_prompts_are_not_encoded_again(make_policy, mixed_samples):
    policy = make_policy(seed=3)
    engine = RolloutEngine(policy)
    config = RolloutConfig(num_generations=2, max_completion_length=LENGTH)
    settings = {"seed": 0, "stream": "train", "step": 0}
    prompts = [engine.encode(sample) for sample in mixed_samples]
    loads = [image.loads for sample in mixed_samples for image in sample.images]
    given = engine.rollout(mixed_samples, config, prompts=prompts, **settings)
    greedy = list(engine.greedy(mixed_samples, max_completion_length=LENGTH, batch_size=3, prompts=iter(prompts)))
    assert [image.loads for sample in mixed_samples for image in sample.images] == loads
    assert all(group.prompt is prompt for group, prompt in zip(given, prompts, strict=True))
    assert all(group.prompt is prompt for group, prompt in zip(greedy, prompts, strict=True))
    made = engine.rollout(mixed_samples, config, **settings)
    assert [group.completions for group in made] == [group.completions for group in given]
    with pytest.raises(ValueError, match="zip"):
        engine.rollout(mixed_samples, config, prompts=prompts[:-1], **settings)


def test_bfloat16(make_policy, mixed_samples):
    policy = make_policy()
    policy.model.to(torch.bfloat16)
    groups = sampled(policy, mixed_samples)
    assert all(0 < len(tokens) <= LENGTH for group in groups.values() for tokens in group)


def test_diverged_weights_raise(make_policy, mixed_samples):
    policy = make_policy()
    with torch.no_grad():
        backbone(policy.model).language_model.norm.weight.fill_(np.nan)
    with pytest.raises(FloatingPointError, match="not finite, so no token can be sampled"):
        sampled(policy, mixed_samples)


def test_no_samples(make_policy):
    assert sampled(make_policy(), []) == {}
    assert list(RolloutEngine(make_policy()).greedy([], max_completion_length=4, batch_size=2)) == []
