"""The policy loss: token losses and how they are averaged. Pure mathematics on tensors.

The variants of GRPO differ in the aggregation alone (:func:`aggregate`); :func:`dpo_loss` compares completions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LossKind = Literal["grpo", "dr_grpo", "dapo"]


class TokenLoss(NamedTuple):
    """Loss of every completion token and what is reported beside it, all (B, T)."""

    loss: Tensor
    """Clipped policy loss plus beta times the divergence."""
    kl: Tensor
    """Estimated divergence from the reference policy; 0 where there is no reference."""
    is_low_clipped: Tensor
    """True where the ratio fell below 1 - epsilon and the advantage is negative: no gradient."""
    is_high_clipped: Tensor
    """True where the ratio rose above 1 + epsilon_high and the advantage is positive: no gradient."""


def k3_divergence(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || reference) from one token each: exp(d) - d - 1, d = log pi_ref - log pi.

    Never negative, and unbiased under the policy (Schulman, "Approximating KL divergence", 2020).

    Args:
        logps: any shape, log-probabilities under the policy.
        ref_logps: same shape, under the reference.
    """
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def token_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float,
    epsilon: float,
    epsilon_high: float | None = None,
    weights: Tensor | None = None,
) -> TokenLoss:
    """The clipped surrogate of PPO on each token, plus the divergence from the reference.

    -min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * KL with ratio = exp(logps - old_logps)
    per token. The divergence is added as it is; TRL 1.16 multiplies it by the ratio unless
    ``use_bias_correction_kl=False``.

    Args:
        logps: (B, T) log-probabilities of the sampled tokens under the policy being trained.
        old_logps: (B, T) the same under the policy that sampled, without gradient.
        advantages: (B,) one per completion.
        ref_logps: (B, T) the same under the reference; None where beta is 0.
        beta: weight of the divergence.
        epsilon: clip range below 1.
        epsilon_high: clip range above 1; None takes epsilon.
        weights: (B, T) of the surrogate, where another engine sampled (:mod:`mismatch`); the
            divergence is not weighted.
    """
    assert (beta == 0.0) == (ref_logps is None), "a reference is needed exactly when beta is positive"
    high = epsilon if epsilon_high is None else epsilon_high
    advantages = advantages[:, None].to(logps.dtype)  # (B, 1)
    ratio = torch.exp(logps - old_logps)
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    if weights is not None:
        policy = policy * weights
    kl = torch.zeros_like(policy) if ref_logps is None else k3_divergence(logps, ref_logps)
    return TokenLoss(
        loss=policy + beta * kl if ref_logps is not None else policy,
        kl=kl.detach(),
        is_low_clipped=(ratio < 1 - epsilon) & (advantages < 0),
        is_high_clipped=(ratio > 1 + high) & (advantages > 0),
    )


def dpo_loss(
    logps: Tensor, ref_logps: Tensor | None, mask: Tensor, signs: Tensor, *, beta: float, num_pairs: int
) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290, equation 7) on pairs that the policy sampled (online DPO,
    arXiv 2402.04792): the mean over pairs of -log sigmoid(beta * (d_chosen - d_rejected)), d = log pi - log pi_ref
    summed over a completion's tokens.

    Args:
        logps: (B, T) log-probabilities under the policy, each pair in two rows one after the other.
        ref_logps: (B, T) the same under the reference; None where no row is of a pair.
        mask: (B, T) True for the tokens that count.
        signs: (B,) +1 chosen, -1 rejected, 0 where there is no pair.
        beta: how far the policy may go from the reference for a preference; smaller is further.
        num_pairs: of the whole step, over all micro-batches and ranks.

    Returns:
        (,) this micro-batch's share of the loss.
    """
    differences = torch.where(mask, logps if ref_logps is None else logps - ref_logps, 0.0).sum(1)  # (B,)
    margins = (signs.to(logps.dtype) * differences).view(-1, 2).sum(1)  # (B / 2,)
    is_pair = (signs != 0).view(-1, 2).all(1)
    return torch.where(is_pair, -logsigmoid(beta * margins), 0.0).sum() / max(num_pairs, 1)


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    *,
    kind: LossKind,
    num_completions: int,
    num_tokens: int,
    max_completion_length: int,
) -> Tensor:
    """Average token losses to one number. The denominators are those of the whole step, over all micro-batches and
    ranks, so the losses of the parts add up to the loss of the step and no split changes the gradient.

    ``grpo``: mean over a completion's tokens, then over completions (arXiv 2402.03300).
    ``dr_grpo``: sum over all tokens / (num_completions * max_completion_length) (arXiv 2503.20783).
    ``dapo``: sum over all tokens / num_tokens (arXiv 2503.14476).

    Args:
        per_token: (B, T) losses of this micro-batch.
        mask: (B, T) True for the tokens that count; a completion without any contributes 0.
        kind: which average.
        num_completions: scored completions of the step, those with masked tokens included.
        num_tokens: tokens that count, of the whole step.
        max_completion_length: the token limit of the rollout.

    Returns:
        (,) this micro-batch's share of the loss.
    """
    sums = torch.where(mask, per_token, 0.0).sum(1)  # (B,)
    if kind == "grpo":
        return (sums / mask.sum(1).clamp(min=1)).sum() / max(num_completions, 1)
    if kind == "dr_grpo":
        return sums.sum() / max(num_completions * max_completion_length, 1)
    return sums.sum() / max(num_tokens, 1)
