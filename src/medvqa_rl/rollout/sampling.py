"""Token sampling: addressed uniforms and inverse transform sampling from the truncated distribution.

The uniform that picks a token depends only on the token's address, so any completion can be sampled again alone, in
another batch, on another number of ranks or after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvqa_rl.core.randomness import address, uniforms

Stream = Literal["train", "eval", "ask", "serve"]
"""The purpose of the random numbers; streams are independent."""


def uniform_table(
    seed: int,
    stream: Stream,
    step: int,
    sample_ids: Sequence[str],
    occurrences: Sequence[int],
    num_generations: int,
    length: int,
) -> NDArray[np.float64]:
    """Compute the uniforms of a rollout, one per token position.

    Args:
        seed: the run's seed.
        stream: the purpose.
        step: optimizer step, or another counter of the stream.
        sample_ids: ids of the P samples.
        occurrences: (P,) how often the same id came before in this step, so that a repeated sample gets new numbers.
        num_generations: G.
        length: token positions.

    Returns:
        (P * G, length) in [0, 1); row p * G + g is keyed by (seed, stream, step, sample id, occurrence, g).
    """
    keys = [
        address(seed, stream, step, sample_id, occurrence, index)
        for sample_id, occurrence in zip(sample_ids, occurrences, strict=True)
        for index in range(num_generations)
    ]
    return np.stack([uniforms(key, length) for key in keys]) if keys else np.empty((0, length))


def pick_tokens(
    logits: Tensor,
    u: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float | Tensor = 1.0,
    suppressed: Tensor | None = None,
) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution over token ids, in float64.

    Order: suppress, divide by temperature, keep the top_k most likely tokens, of these keep the smallest set of the
    most likely whose probability reaches top_p, then pick the first token whose cumulative mass exceeds u times the
    total. Ties are ranked by token id. A token of zero mass is never picked.

    Args:
        logits: (B, V).
        u: (B,) float64 in [0, 1).
        temperature: greater than 0; (B, 1) float64 if rows differ.
        top_k: 0 disables it.
        top_p: 1 disables it; (B, 1) float64 if rows differ, where infinity disables it.
        suppressed: (n,) token ids that are never picked.

    Returns:
        (B,) int64 token ids.
    """
    scores = _suppress(logits.double(), suppressed)
    if isinstance(temperature, Tensor) or temperature != 1.0:
        scores = scores / temperature
    mass = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    is_kept = _truncate(scores, top_k, top_p)
    if is_kept is not None:
        mass = mass * is_kept
    return _invert_in_order(mass, u) if mass.device.type == "cpu" else _invert(mass, u)


def sampling_logps(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, suppressed: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the distribution that :func:`pick_tokens` samples from.

    Returns:
        (B, V) float64, minus infinity at tokens that are never picked.
    """
    scores = _suppress(logits.double(), suppressed) / temperature
    is_kept = _truncate(scores, top_k, top_p)
    if is_kept is not None:
        scores = scores.masked_fill(~is_kept, -torch.inf)
    return scores.log_softmax(dim=-1)


def _truncate(scores: Tensor, top_k: int, top_p: float | Tensor) -> Tensor | None:
    """(B, V) bool, True at tokens that top_k and top_p keep; None if both are off."""
    has_top_k = 0 < top_k < scores.shape[-1]
    if not has_top_k and not isinstance(top_p, Tensor) and top_p >= 1.0:
        return None
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    if has_top_k:
        ranked[:, top_k:] = -torch.inf
    share = ranked.softmax(dim=-1)
    is_kept = (ranked > -torch.inf) & (share.cumsum(dim=-1) - share < top_p)
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)


def _invert_in_order(mass: Tensor, u: Tensor) -> Tensor:
    """(B,) the first token whose cumulative mass exceeds u times the total, for a sequential cumulative sum.

    Such a sum never decreases and a token of zero mass adds nothing, so binary search finds a token that has mass. If
    the mass is NaN no token qualifies and an arbitrary one is returned.
    """
    cumulative = mass.cumsum(dim=-1)
    found = torch.searchsorted(cumulative, u.unsqueeze(-1) * cumulative[:, -1:], right=True)
    return found.squeeze(-1).clamp_(max=mass.shape[-1] - 1)


def _invert(mass: Tensor, u: Tensor) -> Tensor:
    """The same for a parallel cumulative sum, which rounding may make decrease or end below the target."""
    cumulative = mass.cumsum(dim=-1)
    has_mass = mass > 0
    is_beyond = (cumulative > u.unsqueeze(-1) * cumulative[:, -1:]) & has_mass
    vocabulary = torch.arange(mass.shape[-1], device=mass.device)
    last = torch.where(has_mass, vocabulary, -1).argmax(dim=-1)
    return torch.where(is_beyond.any(dim=-1), is_beyond.to(torch.uint8).argmax(dim=-1), last)


def pick_greedy(logits: Tensor, *, suppressed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The most likely token of each row of (B, V) logits that is not suppressed; ties go to the lowest id.

    Returns:
        (B,) token ids, and (B,) float32 their log-probabilities at temperature 1, among the tokens not suppressed.
    """
    scores = _suppress(logits, suppressed)
    picked = scores.argmax(dim=-1)
    logps = scores.gather(-1, picked.unsqueeze(-1)).squeeze(-1).float() - scores.float().logsumexp(dim=-1)
    return picked, logps


def _suppress(logits: Tensor, suppressed: Tensor | None) -> Tensor:
    """Set the suppressed columns of logits to minus infinity."""
    return logits if suppressed is None else logits.index_fill(-1, suppressed, -torch.inf)
