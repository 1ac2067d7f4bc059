"""Sequence-level ratios (GSPO) by hand: their value, where they are clipped, and whose gradient they are."""

from __future__ import annotations

import math

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.losses.grpo import grpo_loss
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts, importance_ratios

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, -9.0]], dtype=torch.float64)
GAPS = torch.tensor([[0.3, -0.1, 0.4], [-0.5, 0.1, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])  # the last token is padding
RATIOS = (math.exp(0.2), math.exp(-0.2))  # means of 0.6 / 3 and -0.4 / 2


def inputs(advantages: torch.Tensor) -> LossInputs:
    return LossInputs((OLD + GAPS).requires_grad_(), OLD, None, advantages, MASK)


def test_ratio_is_the_geometric_mean_of_the_tokens() -> None:
    ratios = importance_ratios(inputs(torch.zeros(2)), "sequence")
    for row, ratio, mask in zip(ratios, RATIOS, MASK):
        assert row[mask].tolist() == pytest.approx([ratio] * int(mask.sum()), rel=1e-12)


def test_a_whole_completion_is_clipped() -> None:
    given = inputs(torch.tensor([2.0, -1.0], dtype=torch.float64))
    config = LossConfig(type="grpo", beta=0.0, importance_sampling_level="sequence", epsilon=0.1, epsilon_high=0.3)
    output = grpo_loss(given, StepCounts(num_completions=2), config)
    # exp(0.2) = 1.22 is below 1.3; exp(-0.2) = 0.82 is clipped to 0.9, and A < 0.
    assert output.loss.item() == pytest.approx((-2 * RATIOS[0] + 0.9) / 2, rel=1e-12)
    assert output.is_low_clipped[MASK].tolist() == [False, False, False, True, True]
    assert not output.is_high_clipped.any()
    output.loss.backward()
    assert given.logps.grad is not None
    # d/d log pi of -2 exp(mean of three gaps) / 2 is -exp(0.2) / 3 at each of the three tokens.
    assert given.logps.grad[0].tolist() == pytest.approx([-RATIOS[0] / 3] * 3, rel=1e-12)
    assert not given.logps.grad[1].any()


def test_advantages_per_token_reach_their_own_tokens() -> None:
    """Equation 14 of the paper: the ratio is the sequence's, the gradient the token's."""
    advantages = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.0, 0.0]], dtype=torch.float64)
    given = inputs(advantages)
    config = LossConfig(type="grpo", beta=0.0, importance_sampling_level="sequence", epsilon=0.5)
    grpo_loss(given, StepCounts(num_completions=2), config).loss.backward()
    assert given.logps.grad is not None
    first, second = (-ratio / count / 2 for ratio, count in zip(RATIOS, (3, 2)))
    assert given.logps.grad[0].tolist() == pytest.approx([first, 0.0, -2 * first], rel=1e-12)
    assert given.logps.grad[1].tolist() == pytest.approx([0.5 * second, 0.0, 0.0], rel=1e-12)


def test_a_masked_completion_has_no_loss_and_no_gradient() -> None:
    given = inputs(torch.ones(2, dtype=torch.float64))._replace(mask=torch.zeros_like(MASK))
    config = LossConfig(type="grpo", beta=0.0, importance_sampling_level="sequence")
    loss = grpo_loss(given, StepCounts(num_completions=2), config).loss
    loss.backward()
    assert loss.item() == 0 and given.logps.grad is not None and not given.logps.grad.any()
