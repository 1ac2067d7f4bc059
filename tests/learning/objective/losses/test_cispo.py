"""CISPO by hand: truncated weights, and a gradient at every token."""

from __future__ import annotations

import math

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.losses.cispo import cispo_loss
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts

OLD = -2.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "weight"),
    [
        (1.0, 2.0, 3.0, 1.0),
        (0.01, -2.0, 3.0, 0.01),  # no lower bound
        (4.0, 2.0, 3.0, 3.0),
        (4.0, -2.0, 3.0, 3.0),  # truncated whatever the sign
        (4.0, 2.0, None, 4.0),
        (6.0, 2.0, None, 5.0),  # the default
    ],
)
def test_by_hand(ratio: float, advantage: float, high: float | None, weight: float) -> None:
    logps = torch.tensor([[OLD + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.full((1, 1), OLD, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    given = LossInputs(logps, old, None, torch.tensor([advantage]), mask)
    output = cispo_loss(given, StepCounts(num_tokens=4), LossConfig(type="cispo", beta=0.0, epsilon_high=high))
    assert output.loss.item() == pytest.approx(-weight * advantage * logps.item() / 4, rel=1e-12)
    assert bool(output.is_high_clipped) == (weight < ratio) and not output.is_low_clipped
    output.loss.backward()
    assert logps.grad is not None and logps.grad.item() == pytest.approx(-weight * advantage / 4, rel=1e-12)
