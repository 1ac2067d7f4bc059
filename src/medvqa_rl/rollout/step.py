"""One decoding step as tensor arithmetic on a :class:`DecodeState`: the same on a CPU and in a CUDA graph.

The model's own layers are called one by one; only attention is computed here, because a prompt's keys and values are
stored once and read by all its completions. Names of sizes as in :mod:`medvqa_rl.rollout.state`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.models.qwen_vl import backbone, causal_model
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens
from medvqa_rl.rollout.state import DecodeState, LayerCache, Shape


class Sampling(NamedTuple):
    """How tokens are picked from logits."""

    temperature: float
    top_k: int
    top_p: float


class Picker(NamedTuple):
    """Everything about picking that does not change from step to step."""

    sampling: Sampling | None
    """None picks the most likely token."""
    suppressed: Tensor
    """(...,) ids that are never picked."""
    stop: Tensor
    """(...,) ids that end a completion."""


def advance(model: nn.Module, state: DecodeState, shape: Shape, picker: Picker) -> None:
    """Read the newest token of every row, pick the next one and note which rows are done."""
    text: Any = backbone(model).language_model
    rows = slice(shape.rows)
    positions = state.start[rows] + state.step[rows]
    cosines, sines = state.cosines[positions].unsqueeze(1), state.sines[positions].unsqueeze(1)
    hidden = text.embed_tokens(state.last[rows])
    for layer, cache in zip(text.layers, state.layers):
        hidden = hidden + _attention(
            layer.self_attn, layer.input_layernorm(hidden), cosines, sines, state, cache, shape
        )
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    take(state, rows, causal_model(model).lm_head(text.norm(hidden)), picker)


def take(state: DecodeState, rows: slice, logits: Tensor, picker: Picker) -> None:
    """Pick the next token of these rows from (n, V) logits; rows that are done stay as they are."""
    is_live = ~state.is_done[rows]
    place = state.step[rows] + is_live.long()
    state.is_finite &= (logits.sum(dim=-1).isfinite() | ~is_live).all()
    if picker.sampling is None:
        picked = pick_greedy(logits, suppressed=picker.suppressed)
    else:
        u = state.u[rows].gather(1, place.unsqueeze(1)).squeeze(1)
        picked = pick_tokens(logits, u, suppressed=picker.suppressed, **picker.sampling._asdict())
    picked = torch.where(is_live, picked, state.last[rows])
    state.tokens[rows].scatter_(1, place.unsqueeze(1), picked.unsqueeze(1))
    stops = (picked.unsqueeze(1) == picker.stop).any(dim=1) & is_live
    state.is_stopped[rows] |= stops
    state.is_done[rows] |= stops | (place + 1 == state.length)
    state.step[rows] = place
    state.last[rows] = picked


def _attention(
    attention: Any, hidden: Tensor, cosines: Tensor, sines: Tensor, state: DecodeState, cache: LayerCache, shape: Shape
) -> Tensor:
    """The attention block of one layer, (n, hidden) -> (n, hidden)."""
    size, num_keys = attention.head_dim, attention.num_key_value_heads
    value = attention.v_proj(hidden).view(shape.rows, num_keys, size)
    states = torch.cat((attention.q_proj(hidden), attention.k_proj(hidden)), dim=-1).view(shape.rows, -1, size)
    states = states * cosines + states.roll(size // 2, -1) * sines
    query, key = states[:, :-num_keys], states[:, -num_keys:]
    write(key, value, state, cache, shape)
    query = (query * attention.scaling).reshape(shape.rows, num_keys, -1, size)
    output: Tensor = attention.o_proj(attend(query, state, cache, shape).reshape(shape.rows, -1))
    return output


def write(key: Tensor, value: Tensor, state: DecodeState, cache: LayerCache, shape: Shape) -> None:
    """Store the keys and values (n, K, D) of the newest tokens."""
    if shape.is_even:
        cache.own_keys[: shape.rows, :, shape.extent - 1] = key
        cache.own_values[: shape.rows, :, shape.extent - 1] = value
    else:
        where = (state.row_numbers[: shape.rows], slice(None), state.step[: shape.rows])
        cache.own_keys[where] = key
        cache.own_values[where] = value


def attend(query: Tensor, state: DecodeState, cache: LayerCache, shape: Shape) -> Tensor:
    """Softmax attention over [the prompt | what the row wrote], both read where they lie.

    A prompt's rows are its queries, in one product for all of them. Either part gives sum(exp(s - top) v) and
    sum(exp(s - top)); brought to a common top they add up to numerator and denominator of the whole. Scores are summed
    in the model's number format and softmax is taken in float32, as in the eager attention of transformers.

    Args:
        query: (n, K, heads / K, D), scaled.

    Returns:
        (n, K, heads / K, D).
    """
    rows, slots, places, width, extent = shape[:5]
    _, heads, repeats, size = query.shape
    asked = query if shape.is_grid else query.index_select(0, state.grid[: slots * places])
    asked = asked.view(slots, places, heads, repeats, size).transpose(1, 2).reshape(slots, heads, -1, size)
    scores = (asked @ cache.prompt_keys[:slots, :, :width].transpose(2, 3)).float()
    if shape.is_padded:
        scores.masked_fill_(state.hidden[:slots, None, None, :width], -torch.inf)
    top, weights, mass = _exponentials(scores)
    summed = weights.to(query.dtype) @ cache.prompt_values[:slots, :, :width]
    parts = torch.cat((summed.float(), top, mass), dim=-1).view(slots, heads, places, repeats, size + 2)
    parts = parts.transpose(1, 2).reshape(slots * places, heads, repeats, size + 2)
    if not shape.is_grid:
        parts = parts.index_select(0, state.cell[:rows])
    prompt_sum, prompt_top, prompt_mass = parts.split((size, 1, 1), dim=-1)

    scores = (query @ cache.own_keys[:rows, :, :extent].transpose(2, 3)).float()
    if not shape.is_even:
        is_unwritten = state.columns[:extent] > state.step[:rows, None]
        scores.masked_fill_(is_unwritten[:, None, None], -torch.inf)
    own_top, weights, own_mass = _exponentials(scores)
    own_sum = (weights.to(query.dtype) @ cache.own_values[:rows, :, :extent]).float()

    top = torch.maximum(prompt_top, own_top)
    prompt_share, own_share = (prompt_top - top).exp(), (own_top - top).exp()
    total = prompt_mass * prompt_share + own_mass * own_share
    output: Tensor = (prompt_sum * prompt_share + own_sum * own_share) / total
    return output.to(query.dtype)


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The highest score (.., 1), exp(score - highest) and their sum (.., 1); the scores are overwritten."""
    top: Tensor = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return top, weights, weights.sum(dim=-1, keepdim=True)
