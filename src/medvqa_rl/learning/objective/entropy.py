"""What a loss makes of the entropy of the policy: a bonus, and the choice of the tokens to learn from.

Legend: B completions of a micro-batch, T tokens per completion, padded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils.operations import gather_object
from torch import Tensor

from medvqa_rl.learning.objective.losses.loss import StepCounts


def entropy_bonus(entropy: Tensor, mask: Tensor, counts: StepCounts) -> Tensor:
    """Compute this micro-batch's share of the step's mean entropy per token; ``loss.entropy_coef`` times it is
    subtracted from the loss.

    The mean is over the tokens that the policy loss learns from, whatever the average of the loss itself, as in TRL.

    Args:
        entropy: (B, T) nats, with gradient.
        mask: (B, T) bool, True at these tokens.
    """
    return torch.where(mask, entropy, 0.0).sum() / max(counts.num_top_tokens, 1)


def top_entropy(entropies: Sequence[Tensor], masks: Sequence[Tensor], share: float) -> list[Tensor]:
    """Find the tokens of highest entropy of a step (arXiv 2506.01939).

    The threshold is the (1 - share) quantile over the tokens that count, of all micro-batches and ranks, so it does
    not depend on the split. Collective.

    Args:
        entropies: (B, T) of each micro-batch of this rank.
        masks: (B, T) bool of each, True at tokens that count.
        share: of the tokens to keep.

    Returns:
        (B, T) bool of each, True at tokens that count and reach the threshold.
    """
    own = torch.cat([entropy[mask] for entropy, mask in zip(entropies, masks, strict=True)]).double().cpu().numpy()
    step = np.concatenate(gather_object([own]))
    threshold = float(np.quantile(step, 1 - share)) if len(step) else 0.0
    return [(entropy.double() >= threshold) & mask for entropy, mask in zip(entropies, masks)]
