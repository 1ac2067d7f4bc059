"""GRPO losses by hand; test_trl.py has the comparison with TRL, test_losses.py what holds for every loss."""

from __future__ import annotations

import math

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.losses.grpo import grpo_loss
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts, aggregate, k3_divergence

LOG = math.log


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one_row(logps, old, advantage, reference=None, **config):
    """The loss of one completion, summed over its tokens."""
    inputs = LossInputs(logps, old, reference, torch.tensor([advantage]), torch.ones_like(logps, dtype=torch.bool))
    config = LossConfig(type="dapo", beta=0.0 if reference is None else 0.04, **config)
    return grpo_loss(inputs, StepCounts(num_tokens=1), config)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "low", "high"),
    [
        (1.0, 2.0, -2.0, False, False),
        (1.1, 2.0, -2.2, False, False),
        (1.5, 2.0, -2.4, False, True),  # clipped above: min(3.0, 1.2 * 2)
        (0.5, 2.0, -1.0, False, False),  # a low ratio is not clipped if the advantage is positive
        (0.5, -2.0, 1.6, True, False),  # clipped below: -min(-1.0, 0.8 * -2)
        (1.5, -2.0, 3.0, False, False),  # a high ratio is not clipped if the advantage is negative
        (1.5, 0.0, 0.0, False, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, expected, low, high):
    result = one_row(tensor(LOG(ratio)), tensor(0.0), advantage)
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert (result.is_low_clipped.item(), result.is_high_clipped.item()) == (low, high)


def test_separate_upper_clip_range():
    assert one_row(tensor(LOG(1.5)), tensor(0.0), 1.0, epsilon_high=0.4).loss.item() == pytest.approx(-1.4)
    assert one_row(tensor(LOG(0.5)), tensor(0.0), -1.0, epsilon_high=0.4).loss.item() == pytest.approx(0.8)


def test_gradient_stops_where_clipped_and_equals_minus_advantage_on_policy():
    logps = tensor(0.0, LOG(1.5), LOG(0.5)).requires_grad_()
    one_row(logps, torch.zeros(1, 3).double(), 2.0).loss.backward()
    assert logps.grad is not None
    assert logps.grad[0].tolist() == pytest.approx([-2.0, 0.0, -1.0])  # d(ratio A)/d(log pi) = ratio A


def test_divergence_by_hand():
    # d = log 2: 2 - log 2 - 1; d = 0: 0; d = -log 2: 0.5 + log 2 - 1
    logps, reference = tensor(LOG(0.25), LOG(0.25), LOG(0.5)), tensor(LOG(0.5), LOG(0.25), LOG(0.25))
    expected = [1 - LOG(2), 0.0, LOG(2) - 0.5]
    assert k3_divergence(logps, reference)[0].tolist() == pytest.approx(expected)
    result = one_row(logps, logps, 0.0, reference)
    assert result.loss.item() == pytest.approx(0.04 * sum(expected))
    assert result.kl[0].tolist() == pytest.approx(expected)


def test_divergence_is_unbiased():
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    expectation = (policy * k3_divergence(policy.log(), reference.log())).sum()
    assert expectation.item() == pytest.approx((policy * (policy / reference).log()).sum().item(), rel=1e-12)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
VALUES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 100.0, math.nan], [9.0, 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", (2.5 + 6.0 + 0.0) / 3),  # the third completion is masked and still counts
        ("dr_grpo", 22.0 / (3 * 10)),
        ("dapo", 22.0 / 6),
    ],
)
def test_aggregation_by_hand(kind, expected):
    counts = StepCounts(num_completions=3, num_tokens=6, token_budget=3 * 10)
    assert aggregate(VALUES, MASK, kind, counts).item() == pytest.approx(expected)
