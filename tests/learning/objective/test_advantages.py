"""Advantages: hand-computed numbers, TRL's statistics, unscored completions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.learning.objective.advantages import (
    EPSILON,
    advantage_rows,
    group_advantages,
    group_statistics,
    have_signal,
)

NAN = float("nan")


def rewards(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("row", "scale", "expected"),
    [
        # mean 0.5, squares 4 * 0.25 = 1, std sqrt(1 / 3)
        ([1.0, 0.0, 1.0, 0.0], "group", [0.5 / (math.sqrt(1 / 3) + 1e-4) * s for s in (1, -1, 1, -1)]),
        ([1.0, 0.0, 1.0, 0.0], "none", [0.5, -0.5, 0.5, -0.5]),
        # mean 1, squares 1 + 1 = 2, std sqrt(2 / 2) = 1
        ([0.0, 1.0, 2.0], "group", [-1 / 1.0001, 0.0, 1 / 1.0001]),
        # the unscored one leaves the statistics: mean 1, std sqrt(2)
        ([2.0, NAN, 0.0], "group", [1 / (math.sqrt(2) + 1e-4), 0.0, -1 / (math.sqrt(2) + 1e-4)]),
        ([2.0, NAN, 0.0], "none", [1.0, 0.0, -1.0]),
        # fewer than two scored, none scored, all equal
        ([2.0, NAN, NAN], "none", [0.0, 0.0, 0.0]),
        ([NAN, NAN, NAN], "group", [0.0, 0.0, 0.0]),
        ([0.1, 0.1, 0.1], "group", [0.0, 0.0, 0.0]),
        ([0.1, 0.1, 0.1], "none", [0.0, 0.0, 0.0]),
        ([0.1, NAN, 0.1], "group", [0.0, 0.0, 0.0]),
    ],
)
def test_hand_computed(row, scale, expected):
    result = group_advantages(rewards(row), scale=scale)[0]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_leave_one_out_by_hand():
    # others: (0 + 2) / 2, (1 + 2) / 2, (1 + 0) / 2; then with one unscored; then a single one
    result = group_advantages(
        rewards([1.0, 0.0, 2.0], [1.0, NAN, 4.0], [NAN, 3.0, NAN]), baseline="leave_one_out", scale="none"
    )
    expected = [[0.0, -1.5, 1.5], [-3.0, 0.0, 3.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


STEP = rewards([0.0, 2.0], [3.0, 3.0], [7.0, NAN])


def test_standard_deviation_of_the_whole_step_by_hand():
    # scored rewards 0, 2, 3, 3, 7: mean 3, squares 9 + 1 + 0 + 0 + 16 = 26, std sqrt(26 / 4)
    batch = 1 / (math.sqrt(26 / 4) + 1e-4)
    expected = torch.tensor([[-batch, batch], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(STEP, scale="batch"), expected, rtol=1e-12, atol=0)
    # advantages of groups with two scored: -1, 1, 0, 0: std sqrt(2 / 3); twice that with leave-one-out
    whiten = 1 / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(group_advantages(STEP, scale="whiten"), expected / batch * whiten, rtol=1e-12, atol=0)
    twice = 2 / (2 * math.sqrt(2 / 3) + 1e-4)
    found = group_advantages(STEP, scale="whiten", baseline="leave_one_out")
    torch.testing.assert_close(found, expected / batch * twice, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["group", "none", "batch", "whiten"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_a_rank_gets_its_rows_of_the_whole_step(scale, baseline):
    whole = group_advantages(STEP, scale=scale, baseline=baseline)
    parts = [group_advantages(rows, scale=scale, baseline=baseline, everyone=STEP) for rows in STEP.split(1)]
    assert torch.equal(torch.cat(parts), whole)


def test_advantages_per_token_are_laid_out_and_looked_through():
    tokens = [[torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.zeros(2), torch.zeros(1)]]
    mask = torch.tensor([[True, True], [True, False]])
    assert advantage_rows(tokens, [0], mask).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert have_signal(tokens).tolist() == [True, False]
    assert advantage_rows(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), [1, 0], mask).tolist() == [0.0, 0.0, 1.0, 2.0]
    with pytest.raises(AssertionError, match="one advantage per token"):
        advantage_rows([[torch.zeros(1), torch.zeros(1)]], [0], mask)


def test_equal_rewards_are_exactly_zero_despite_rounding():
    # The mean of three 0.1 is not 0.1 in binary, so plain centering would leave 1e-17.
    assert (group_advantages(rewards([0.1] * 3, [0.7] * 3), scale="none") == 0).all()
    for scale in ("group", "batch", "whiten"):
        assert (group_advantages(rewards([0.1] * 3, [0.7] * 3), scale=scale, baseline="leave_one_out") == 0).all()


def test_groups_do_not_touch_each_other():
    both = group_advantages(rewards([0.0, 1.0, 0.5], [5.0, 9.0, NAN]), scale="group")
    alone = [group_advantages(rewards(row), scale="group")[0] for row in ([0.0, 1.0, 0.5], [5.0, 9.0, NAN])]
    assert torch.equal(both, torch.stack(alone))


@given(
    st.lists(st.one_of(st.floats(-5, 5), st.just(NAN)), min_size=2, max_size=10),
    st.sampled_from(["group", "none", "batch", "whiten"]),
    st.sampled_from(["group", "leave_one_out"]),
)
def test_properties(row, scale, baseline):
    table = rewards(row)
    result = group_advantages(table, scale=scale, baseline=baseline)
    assert result.isfinite().all()
    assert abs(result.sum().item()) <= 1e-9 * max(1.0, result.abs().sum().item()) * 1e3
    assert (result[table.isnan()] == 0).all()


def test_equals_trl():
    trl_utils = pytest.importorskip("trl.trainer.utils")
    table = torch.rand(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table[0, 3] = table[2, :5] = NAN
    mean = torch.nanmean(table, dim=1, keepdim=True)
    std = trl_utils.nanstd(table, dim=1).unsqueeze(1)
    expected = torch.nan_to_num((table - mean) / (std + 1e-4), nan=0.0)
    torch.testing.assert_close(group_advantages(table, scale="group"), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(group_statistics(table)[1], std[:, 0], rtol=1e-6, atol=1e-12)
    # scale_rewards="batch"
    expected = torch.nan_to_num((table - mean) / (trl_utils.nanstd(table) + 1e-4), nan=0.0)
    torch.testing.assert_close(group_advantages(table, scale="batch"), expected, rtol=1e-6, atol=1e-12)
    # RLOOTrainer, without and with normalize_advantages
    count = (~table.isnan()).sum(1, keepdim=True)
    raw = table - (torch.nansum(table, 1, keepdim=True) - table) / (count - 1)
    found = group_advantages(table, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(found, torch.nan_to_num(raw, nan=0.0), rtol=1e-6, atol=1e-12)
    expected = torch.nan_to_num((raw - torch.nanmean(raw)) / (trl_utils.nanstd(raw) + 1e-4), nan=0.0)
    found = group_advantages(table, scale="whiten", baseline="leave_one_out")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert EPSILON == 1e-4
