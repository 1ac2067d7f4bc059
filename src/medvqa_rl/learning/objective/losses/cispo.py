"""CISPO (MiniMax-M1, arXiv 2506.13585): the importance weight is clipped, not the objective."""

from __future__ import annotations

import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.losses.loss import (
    LossInputs,
    LossOutput,
    StepCounts,
    aggregate,
    importance_ratios,
    penalised,
)

LARGEST_WEIGHT = 5.0
"""``loss.epsilon_high`` if it is None: the value of ScaleRL (arXiv 2510.13786)."""


def cispo_loss(inputs: LossInputs, counts: StepCounts, config: LossConfig) -> LossOutput:
    """REINFORCE with truncated importance weights, averaged over the tokens of the step.

    Each token's loss is

        -stop_gradient(min(ratio, epsilon_high)) * A * log pi + beta * KL

    so every token has a gradient, whatever its ratio. ``epsilon_high`` is the largest weight itself, as in TRL, and
    there is no lower bound.
    """
    high = LARGEST_WEIGHT if config.epsilon_high is None else config.epsilon_high
    advantages = inputs.token_advantages
    ratio = importance_ratios(inputs, config.importance_sampling_level).detach()
    loss, kl = penalised(-ratio.clamp(max=high) * advantages * inputs.logps, inputs, config.beta)
    return LossOutput(
        loss=aggregate(loss, inputs.mask, "dapo", counts),
        kl=kl,
        is_low_clipped=torch.zeros_like(inputs.mask),
        is_high_clipped=(ratio > high) & (advantages != 0),
    )
