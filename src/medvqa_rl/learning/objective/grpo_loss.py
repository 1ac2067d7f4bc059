"""The clipped policy-gradient loss of GRPO, Dr. GRPO and DAPO, which differ in the aggregation only."""

from __future__ import annotations

import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.loss import LossInputs, LossOutput, StepCounts, aggregate, k3_divergence


def grpo_loss(inputs: LossInputs, counts: StepCounts, config: LossConfig) -> LossOutput:
    """PPO's clipped surrogate on each token plus a KL penalty, averaged by :func:`aggregate`.

    With ratio = exp(logps - old_logps), each token's loss is

        -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL

    The KL term is added unchanged; TRL 1.16 multiplies it by the ratio unless ``use_bias_correction_kl=False``.
    Importance weights multiply the surrogate but not the KL term.
    """
    logps, old_logps, ref_logps, advantages, mask, weights = inputs
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    advantages = advantages[:, None].to(logps.dtype)  # (B, 1)
    ratio = torch.exp(logps - old_logps)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    if weights is not None:
        loss = loss * weights
    kl = torch.zeros_like(loss)
    if ref_logps is not None:
        kl = k3_divergence(logps, ref_logps)
        loss = loss + config.beta * kl
    return LossOutput(
        loss=aggregate(loss, mask, config.type, counts),
        kl=kl.detach(),
        is_low_clipped=(ratio < low) & (advantages < 0),
        is_high_clipped=(ratio > high) & (advantages > 0),
    )
