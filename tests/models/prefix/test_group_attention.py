"""Packed groups equal a row per completion: log-probabilities and all gradients, over random shapes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.prefix import group_attention
from medvqa_rl.models.prefix.group_attention import attend, attention_mask, group_layout

ARCHITECTURES = ("qwen2_vl", "qwen2_5_vl")
SETTINGS = {
    "full": {},
    "everything": {"train_vision": True, "train_projector": True},
    "everything, checkpointed": {"train_vision": True, "train_projector": True, "gradient_checkpointing": True},
    "adapter": {"lora": LoraConfig(rank=2)},
    "adapter, checkpointed": {"lora": LoraConfig(rank=2), "gradient_checkpointing": True},
    "adapter and projector": {"lora": LoraConfig(rank=2), "train_projector": True},
}
SIDES = st.sampled_from([28, 56, 84, 112])
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)  # of a group's completions
SHAPES = st.lists(st.tuples(st.lists(st.tuples(SIDES, SIDES), max_size=2), LENGTHS), min_size=1, max_size=3)


def trained(policy):
    """A policy in training mode with nonzero adapters, because lora_A has no gradient while lora_B is zero."""
    policy.model.train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return policy


def build_groups(policy, make_sample, make_image, shapes, *, cached=False):
    """Groups with the given image sizes and completion lengths; more images come with longer questions."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for index, (sides, lengths) in enumerate(shapes):
        images = tuple(make_image(width, height, seed=index + place) for place, (width, height) in enumerate(sides))
        sample = make_sample(f"s{index}", images=images, question="Is there an effusion? " * (1 + len(sides)))
        tokens = [tuple(torch.randint(0, 300, (length,), generator=generator).tolist()) for length in lengths]
        completions = [Completion(ids, "", False) for ids in tokens]
        groups.append(Group(sample, policy.processor.encode(sample), completions))
    if cached:
        for group, feature in zip(
            groups, policy.family.image_features(policy.model, [group.prompt for group in groups], "cpu")
        ):
            group.image_features = feature
    return groups


def evaluate(policy, groups, layout):
    """(B, Tc) log-probabilities, and the gradients of a weighted sum of them."""
    policy.model.zero_grad()
    batch = collate(groups, policy.processor, "cpu", layout=layout)
    logps = GroupForward(policy.model)(batch, temperature=0.7).logps
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    (logps * weights).sum().backward()
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.requires_grad}
    return logps.detach(), gradients


def assert_same(found, expected):
    """Check the project's tolerances: 1e-5 for log-probabilities, 1e-5 of the norm for each gradient."""
    assert (found[0] - expected[0]).abs().max() <= 1e-5
    for name, gradient in expected[1].items():
        if gradient is None:
            assert found[1][name] is None, name
        else:
            assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", SETTINGS)
def test_packed_groups_equal_separate_completions(tiny_policy, make_sample, make_image, arch, name):
    policy = trained(tiny_policy(arch, **SETTINGS[name]))

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(SHAPES)
    def check(shapes):
        groups = build_groups(policy, make_sample, make_image, shapes)
        assert_same(evaluate(policy, groups, "packed"), evaluate(policy, groups, "separate"))

    check()


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
def test_attention_equals_the_dense_mask(heads):
    """Attention alone, in float64."""

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(1, 12), LENGTHS), min_size=1, max_size=4))
    def check(shapes):
        prompts, lengths = [prompt for prompt, _ in shapes], [own for _, own in shapes]
        num_tokens = sum(prompts) + sum(map(sum, lengths))
        generator = torch.Generator().manual_seed(3)
        query, key, value = (
            torch.randn(num_tokens, count, 8, dtype=torch.float64, generator=generator, requires_grad=True)
            for count in (heads[0], heads[1], heads[1])
        )
        # The owner of every token, and the dense mask over all of them.
        owner = torch.tensor([*range(len(prompts)), *(p for p, own in enumerate(lengths) for _ in own)])
        piece = torch.arange(len(owner)).repeat_interleave(
            torch.tensor([*prompts, *(n for own in lengths for n in own)])
        )
        of_prompt = owner[piece]
        is_prompt = piece < len(prompts)
        same = (piece[:, None] == piece) | (is_prompt & (of_prompt[:, None] == of_prompt))
        mask = same & torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()

        repeats = heads[0] // heads[1]
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeats, 1)) * 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(repeats, 1))
        layout = group_layout(prompts, lengths, "cpu").prepared(torch.float64, repeats)
        found = attend(query, key, value, layout, scale=0.5)
        assert (found - expected).abs().max() <= 1e-12
        direction = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        for one, other in zip(
            torch.autograd.grad((found * direction).sum(), (query, key, value)),
            torch.autograd.grad((expected * direction).sum(), (query, key, value)),
        ):
            assert (one - other).abs().max() <= 1e-11

    check()


def leak(layout):
    """Completions attend to their own future tokens."""
    mask = layout.mask.clone()
    mask[..., layout.prompt_width :] = True
    return dataclasses.replace(layout, mask=mask)


def foreign(layout):
    """Completions attend to another prompt."""
    return dataclasses.replace(layout, completions_of_prompt=layout.completions_of_prompt[::-1])


def blind(layout):
    """Completions do not attend to the first token of their prompt."""
    mask = layout.mask.clone()
    mask[..., 0] = False
    return dataclasses.replace(layout, mask=mask)


SHAPE = [([(56, 56)], [4, 7]), ([], [3, 5, 2])]


@pytest.mark.parametrize("wrong", [leak, foreign, blind])
def test_a_wrong_layout_changes_the_result(tiny_policy, make_sample, make_image, wrong):
    policy = tiny_policy()
    batch = collate(build_groups(policy, make_sample, make_image, SHAPE), policy.processor, "cpu")
    forward = GroupForward(policy.model)
    with torch.no_grad():
        right = forward(batch).logps
        found = forward(dataclasses.replace(batch, packing=wrong(batch.packing))).logps
    assert (right - found).abs().max() > 1e-2


def test_a_shifted_position_changes_the_result(tiny_policy, make_sample, make_image):
    policy = tiny_policy()
    batch = collate(build_groups(policy, make_sample, make_image, SHAPE), policy.processor, "cpu")
    with torch.no_grad():
        right = GroupForward(policy.model)(batch).logps
        batch.position_ids[:, batch.segments > 0] += 1
        shifted = GroupForward(policy.model)(batch).logps
    assert (right - shifted).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bfloat16_is_within_rounding(tiny_policy, make_sample, make_image, arch):
    """Tolerance: the mean error against float32 is at most 1.5 times that of separate rows."""
    policy = tiny_policy(arch)
    groups = build_groups(policy, make_sample, make_image, [([(112, 84)], [9, 8, 7, 6]), ([], [9, 9, 5])], cached=True)
    with torch.no_grad():
        exact = GroupForward(policy.model)(collate(groups, policy.processor, "cpu")).logps
        policy.model.to(torch.bfloat16)
        errors = {}
        for layout in ("packed", "separate"):
            batch = collate(groups, policy.processor, "cpu", layout=layout)
            logps = GroupForward(policy.model)(batch).logps
            assert logps.dtype == torch.float32
            errors[layout] = float((logps - exact)[batch.mask].abs().mean())
    assert 0 < errors["packed"] <= 1.5 * errors["separate"]


def test_other_calls_use_plain_sdpa(tiny_policy, make_sample, model_inputs, monkeypatch):
    """Sampling, evaluation and the vision tower are not affected."""
    policy = tiny_policy()
    config = backbone(policy.model).language_model.config
    assert config._attn_implementation == group_attention.ATTENTION
    assert backbone(policy.model).visual.config._attn_implementation == "sdpa"
    inputs = model_inputs(policy.model, policy.processor.encode(make_sample()), (5, 6, 7))
    with torch.no_grad():
        own = policy.model(**inputs).logits
        config._attn_implementation = "sdpa"
        assert torch.equal(own, policy.model(**inputs).logits)


def test_no_masked_block_is_computed():
    """A prompt of 5 with completions of 2: 2 x (5 + 2) scores each, and nothing is padded."""
    layout = group_layout([5], [[2, 2, 2]], "cpu")
    assert layout.mask.shape == (1, 1, 2, 7) and layout.tokens is None
    assert layout.mask[0, 0].int().tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]
    dense = attention_mask(torch.tensor([[0] * 5 + [1, 1, 2, 2, 3, 3]]))
    assert dense.numel() == 121 and 5 * 5 + 3 * layout.mask.numel() == 67
