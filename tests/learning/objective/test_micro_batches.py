"""Micro-batches by a budget of tokens: never exceeded, whole groups, the same gradient."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyData, gradients, make_group, toy_config

from medvqa_rl.learning import update as update_module
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import collate
from medvqa_rl.learning.objective.micro_batches import computed_tokens, split
from medvqa_rl.learning.run.errors import UnusableSampleError

LAYOUTS = tuple(Layout)


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_the_batch(tiny_policy, layout):
    """Counted before the batch is made, and equal to what it then holds."""
    sizes = [(5, [3, 4]), (9, [1, 2]), (2, [7, 7])]
    batch = collate([make_group(*size) for size in sizes], tiny_policy().processor, "cpu", layout=layout)
    assert computed_tokens(sizes, layout) == batch.input_ids.numel()


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(1, 10), min_size=2, max_size=2)), min_size=1),
    st.integers(50, 200),
    st.integers(1, 5),
    st.sampled_from(LAYOUTS),
)
def test_no_budget_is_exceeded_and_no_group_lost(sizes, budget, max_groups, layout):
    groups = [make_group(*size) for size in sizes]
    indices = list(range(0, len(groups), 2)) or [0]
    budget = max(budget, 2 * (30 + 10))  # the largest group there can be, in any layout
    parts = split(
        groups,
        indices,
        layout=layout,
        max_groups=max_groups,
        max_tokens=budget,
        max_completion_length=10,
    )
    assert sorted(index for part in parts for index in part) == indices
    for part in parts:
        assert 1 <= len(part) <= max_groups
        assert computed_tokens([sizes[index] for index in part], layout) <= budget


def test_sorted_by_length_and_packed_in_order():
    groups = [make_group(10, [4, 4]), make_group(3, [2, 2]), make_group(12, [5, 5]), make_group(3, [1, 1])]
    common = {"layout": "packed", "max_completion_length": 5}
    assert split(groups, range(4), max_groups=8, max_tokens=40, **common) == [[3, 1, 0], [2]]
    assert split(groups, range(4), max_groups=2, max_tokens=40, **common) == [[3, 1], [0, 2]]
    assert split(groups, range(4), max_groups=3, max_tokens=None, **common) == [[0, 1, 2], [3]]


def test_a_group_beyond_the_budget_is_named():
    groups = [make_group(10, [4, 4], "small"), make_group(40, [1, 1], "large")]
    common = {"layout": "packed", "max_groups": 8, "max_completion_length": 5}
    assert split(groups, [0, 1], max_tokens=50, **common)
    with pytest.raises(
        UnusableSampleError, match=r"sample 'large' can have 50 tokens \(a prompt of 40 .* to 50 or more"
    ):
        split(groups, [0, 1], max_tokens=49, **common)


def test_the_gradient_does_not_depend_on_the_budget(folder, tmp_path, monkeypatch):
    results, counts = [], []

    def counting(*args, **kwargs):
        parts = split(*args, **kwargs)
        counts.append([len(part) for part in parts])
        return parts

    monkeypatch.setattr(update_module, "split", counting)
    for budget in (None, 310, 155):
        changes = {"prompts_per_micro_batch": 4, "max_tokens_per_micro_batch": budget}
        config = toy_config(folder, tmp_path, train=changes, optimizer={"max_grad_norm": None})
        results.append(gradients(config))
    assert counts == [[4], [2, 2], [1, 1, 1, 1]]
    for other in results[1:]:
        assert results[0].keys() == other.keys()
        for name, gradient in results[0].items():
            assert (gradient - other[name]).norm() <= 1e-5 * gradient.norm() + 1e-7, name


def test_a_budget_that_is_too_small_stops_the_run_before_the_first_update(folder, tmp_path):
    config = toy_config(folder, tmp_path / "run", train={"max_tokens_per_micro_batch": 60})
    with pytest.raises(UnusableSampleError, match=r"but train\.max_tokens_per_micro_batch is 60"):
        train(config, train_set=ToyData())
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
