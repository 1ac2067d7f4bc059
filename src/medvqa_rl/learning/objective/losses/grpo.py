"""The clipped policy-gradient loss of GRPO, Dr. GRPO and DAPO, which differ in the aggregation only, and of GSPO."""

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


def grpo_loss(inputs: LossInputs, counts: StepCounts, config: LossConfig) -> LossOutput:
    """PPO's clipped surrogate on each token plus a KL penalty, averaged by :func:`aggregate`.

    With the ratio of :func:`importance_ratios`, each token's loss is

        -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL

    The KL term is added unchanged; TRL 1.16 multiplies it by the ratio unless ``use_bias_correction_kl=False``.
    Importance weights multiply the surrogate but not the KL term.
    """
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    advantages = inputs.token_advantages
    ratio = importance_ratios(inputs, config.importance_sampling_level)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    loss, kl = penalised(loss, inputs, config.beta)
    return LossOutput(
        loss=aggregate(loss, inputs.mask, config.type, counts),
        kl=kl,
        is_low_clipped=(ratio < low) & (advantages < 0),
        is_high_clipped=(ratio > high) & (advantages > 0),
    )
