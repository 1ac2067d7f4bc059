"""Soft adaptive policy optimization (SAPO, arXiv 2511.20347): a smooth gate in place of clipping."""

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


def sapo_loss(inputs: LossInputs, counts: StepCounts, config: LossConfig) -> LossOutput:
    """The gated surrogate, averaged over each completion's tokens, then over completions.

    Each token's loss is

        -(4 / tau) * sigmoid(tau * (ratio - 1)) * A + beta * KL

    where tau is ``sapo_temperature_pos`` if A > 0, else ``sapo_temperature_neg``. The weight of a token's gradient,
    ratio * A * 4 * p * (1 - p) with p the sigmoid, is ratio * A at ratio 1 and vanishes smoothly far from it: the
    sooner, the larger tau. Nothing is clipped.
    """
    advantages = inputs.token_advantages
    ratio = importance_ratios(inputs, config.importance_sampling_level)
    tau = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    loss, kl = penalised(-gate * advantages, inputs, config.beta)
    nothing = torch.zeros_like(inputs.mask)
    return LossOutput(
        aggregate(loss, inputs.mask, "grpo", counts), kl, is_low_clipped=nothing, is_high_clipped=nothing
    )
