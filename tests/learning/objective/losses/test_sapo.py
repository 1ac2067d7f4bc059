"""SAPO by hand: the gate's value and the weight of the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts
from medvqa_rl.learning.objective.losses.sapo import sapo_loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "tau"), [(1.0, 2.0, 2.0), (1.5, 2.0, 2.0), (1.5, -2.0, 3.0), (0.5, -1.0, 3.0)]
)
def test_by_hand(ratio: float, advantage: float, tau: float) -> None:
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    config = LossConfig(type="sapo", beta=0.0, sapo_temperature_pos=2.0, sapo_temperature_neg=3.0)
    output = sapo_loss(
        LossInputs(logps, old, None, torch.tensor([advantage]), mask), StepCounts(num_completions=2), config
    )
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert output.loss.item() == pytest.approx(-4 / tau * gate * advantage / 2, rel=1e-12)
    output.loss.backward()
    expected = -ratio * 4 * gate * (1 - gate) * advantage / 2  # -A / 2 at ratio 1
    assert logps.grad is not None and logps.grad.item() == pytest.approx(expected, rel=1e-12)
    assert not output.is_low_clipped.any() and not output.is_high_clipped.any()
