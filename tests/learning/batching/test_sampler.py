"""The samples of each step, and how ranks share them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from toy import ToyData

from medvqa_rl.learning.batching.sampler import balance_by_cost, step_indices, step_samples


def test_endless_data_is_read_in_order_from_a_seeded_start():
    assert step_indices(0, num_prompts=3, length=None, seed=0) == [(0, 0), (1, 0), (2, 0)]
    start = 5 * 2654435761 % 2**31
    assert step_indices(7, num_prompts=3, length=None, seed=5) == [(start + place, 0) for place in (21, 22, 23)]


def test_seeds_read_different_parts_of_endless_data():
    starts = sorted(step_indices(0, num_prompts=1, length=None, seed=seed)[0][0] for seed in range(-50, 50))
    assert min(after - before for before, after in pairwise(starts)) > 10**6
    assert starts[0] >= 0 and starts[-1] < 2**31


def test_every_epoch_contains_every_sample_once_in_a_new_order():
    drawn = [draw for step in range(14) for draw in step_indices(step, num_prompts=5, length=7, seed=3)]
    assert [epoch for _, epoch in drawn] == [place // 7 for place in range(70)]
    epochs = [[index for index, _ in drawn[start : start + 7]] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_the_order_depends_on_the_seed_only():
    assert step_indices(0, num_prompts=9, length=50, seed=1) != step_indices(0, num_prompts=9, length=50, seed=2)
    assert step_indices(4, num_prompts=9, length=50, seed=1) == step_indices(4, num_prompts=9, length=50, seed=1)


def test_a_step_larger_than_the_data_spans_epochs():
    drawn = step_indices(0, num_prompts=8, length=4, seed=0)
    assert sorted(drawn) == [(index, epoch) for index in range(4) for epoch in range(2)]


def test_ranks_take_consecutive_shares():
    data = ToyData(10)
    whole = step_samples(data, 2, num_prompts=4, seed=0)
    parts = [step_samples(data, 2, num_prompts=4, seed=0, rank=rank, num_ranks=2) for rank in range(2)]
    assert parts[0] + parts[1] == whole
    assert len(parts[0]) == 2


@given(st.integers(1, 5), st.lists(st.floats(0, 1000), min_size=1, max_size=8))
def test_ranks_get_equal_numbers_of_distinct_samples(num_ranks, costs):
    costs = costs * num_ranks
    shares = balance_by_cost(costs, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert {len(share) for share in shares} == {len(costs) // num_ranks}


def test_balancing_by_cost():
    costs = [10.0, 10.0, 9.0, 9.0, 1.0, 1.0, 2.0, 2.0]
    assert balance_by_cost(costs, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert balance_by_cost([8.0, 1.0, 1.0, 8.0], 2) == [[0, 1], [2, 3]]
    data = ToyData(10)  # every other prompt is longer

    def parts(cost):
        return [step_samples(data, 2, num_prompts=4, seed=0, rank=rank, num_ranks=2, cost=cost) for rank in range(2)]

    whole = step_samples(data, 2, num_prompts=4, seed=0)
    dealt = parts(lambda sample: float(sample.id.removeprefix("toy-")))
    assert sorted(dealt[0] + dealt[1], key=lambda draw: draw.position) == whole
    assert all([draw.position for draw in part] == sorted(draw.position for draw in part) for part in dealt)


def test_an_order_is_kept_in_every_epoch_but_not_when_resampling():
    drawn = [step_indices(step, num_prompts=3, length=5, seed=1, in_order=True) for step in range(4)]
    assert [draw for step in drawn for draw in step] == [(place % 5, place // 5) for place in range(12)]
    again = step_indices(0, num_prompts=5, length=5, seed=1, attempt=1, in_order=True)
    assert again == step_indices(0, num_prompts=5, length=5, seed=1, attempt=1)
    ids = [draw.sample.id for draw in step_samples(ToyData(5), 1, num_prompts=3, seed=1, in_order=True)]
    assert ids == ["toy-3", "toy-4", "toy-0"]
