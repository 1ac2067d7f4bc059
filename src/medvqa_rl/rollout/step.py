"""One decoding step as tensor arithmetic on a :class:`DecodeState`, run eagerly or captured as a CUDA graph.

The model's own layers are called one by one, as its family arranges them. Only attention is computed here, because
the sequences of a prompt share one copy of its keys and values. :mod:`medvqa_rl.rollout.state` explains the layout and
names the dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.models.families import shared_family_of
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SLIDING, SharedFamily
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens
from medvqa_rl.rollout.state import DecodeState, LayerCache, Shape


class Sampling(NamedTuple):
    """Sampling parameters, of all rows or (n, 1) of each."""

    temperature: float | Tensor
    top_k: int
    top_p: float | Tensor


class Picker(NamedTuple):
    """How the next token is picked from logits, the same at every step."""

    sampling: Sampling | None
    """None decodes greedily."""
    suppressed: Tensor
    """(...,) token ids that are never picked."""
    stop: Tensor
    """(...,) token ids that end a completion."""


def advance(model: nn.Module, state: DecodeState, shape: Shape, picker: Picker) -> None:
    """Run the model on the newest token of every sequence and pick the next one."""
    append_tokens(state, slice(shape.rows), next_logits(model, state, shape), picker)


def next_logits(model: nn.Module, state: DecodeState, shape: Shape) -> Tensor:
    """Run the model on the newest token of every sequence: (n, V) logits of the next one."""
    family = shared_family_of(model)
    text = family.text(model)
    rows = slice(shape.rows)
    positions = state.first_position[rows] + state.token_index[rows]
    rotary = {
        kind: (cosines[positions].unsqueeze(1), sines[positions].unsqueeze(1))
        for kind, (cosines, sines) in state.rotary.items()
    }
    hidden = text.embed_tokens(state.last_token[rows])
    for layer, cache, kind in zip(text.layers, state.layers, state.layer_types):
        window = state.window if shape.is_windowed and kind == SLIDING else None

        def attention(
            module: Any, normed: Tensor, cache: LayerCache = cache, kind: str = kind, window: int | None = window
        ) -> Tensor:
            return _attention(family, module, normed, rotary[kind], state, cache, shape, window)

        hidden = family.layer(layer, hidden, attention)
    logits: Tensor = causal_model(model).lm_head(text.norm(hidden))
    return logits


def append_tokens(state: DecodeState, rows: slice, logits: Tensor, picker: Picker) -> None:
    """Pick the next tokens from (n, V) logits and append them; sequences that are done stay as they are."""
    is_live = ~state.is_done[rows]
    index = state.token_index[rows] + is_live.long()
    state.is_finite &= (logits.sum(dim=-1).isfinite() | ~is_live).all()
    if picker.sampling is None:
        picked, logps = pick_greedy(logits, suppressed=picker.suppressed)
        known = state.logps[rows]
        logps = torch.where(is_live, logps, known.gather(1, index.unsqueeze(1)).squeeze(1))
        known.scatter_(1, index.unsqueeze(1), logps.unsqueeze(1))
    else:
        uniforms = state.uniforms[rows].gather(1, index.unsqueeze(1)).squeeze(1)
        picked = pick_tokens(logits, uniforms, suppressed=picker.suppressed, **picker.sampling._asdict())
    picked = torch.where(is_live, picked, state.last_token[rows])
    state.tokens[rows].scatter_(1, index.unsqueeze(1), picked.unsqueeze(1))
    stops = (picked.unsqueeze(1) == picker.stop).any(dim=1) & is_live
    state.is_stopped[rows] |= stops
    state.is_done[rows] |= stops | (index + 1 == state.capacity.completion_length)
    state.token_index[rows] = index
    state.last_token[rows] = picked


def _attention(
    family: SharedFamily,
    attention: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    state: DecodeState,
    cache: LayerCache,
    shape: Shape,
    window: int | None,
) -> Tensor:
    """The attention block of one layer, (n, hidden) -> (n, hidden)."""
    size, num_keys = attention.head_dim, attention.config.num_key_value_heads
    cosines, sines = rotary
    value = attention.v_proj(hidden).view(shape.rows, num_keys, size)
    states = family.queries_and_keys(attention, hidden)
    states = states * cosines + states.roll(size // 2, -1) * sines
    query, key = states[:, :-num_keys], states[:, -num_keys:]
    write(key, value, state, cache, shape)
    query = (query * attention.scaling).reshape(shape.rows, num_keys, -1, size)
    output: Tensor = attention.o_proj(attend(query, state, cache, shape, window).reshape(shape.rows, -1))
    return output


def write(key: Tensor, value: Tensor, state: DecodeState, cache: LayerCache, shape: Shape) -> None:
    """Store the keys and values (n, K, D) of the newest tokens."""
    if shape.is_aligned:
        cache.own_keys[: shape.rows, :, shape.completion_length - 1] = key
        cache.own_values[: shape.rows, :, shape.completion_length - 1] = value
    else:
        newest = (state.row_range[: shape.rows], slice(None), state.token_index[: shape.rows])
        cache.own_keys[newest] = key
        cache.own_values[newest] = value


def attend(query: Tensor, state: DecodeState, cache: LayerCache, shape: Shape, window: int | None = None) -> Tensor:
    """Softmax attention over [prompt | completion], each read from its own cache.

    The queries of a prompt's sequences attend to its keys in one product. Both parts return sum(exp(s - top) v) and
    sum(exp(s - top)); rescaled to a common top they add up to numerator and denominator of the whole softmax. Products
    are computed in the model's dtype and the softmax in float32, as in the eager attention of transformers.

    Args:
        query: (n, K, heads / K, D), scaled.
        window: tokens that a token attends to, itself included; None for all.

    Returns:
        (n, K, heads / K, D).
    """
    rows, slots, columns, prompt_length, length = shape[:5]
    _, heads, repeats, size = query.shape
    grid = query if shape.is_grid else query.index_select(0, state.row_of_cell[: slots * columns])
    grid = grid.view(slots, columns, heads, repeats, size).transpose(1, 2).reshape(slots, heads, -1, size)
    scores = (grid @ cache.prompt_keys[:slots, :, :prompt_length].transpose(2, 3)).float()
    if shape.is_padded:
        scores.masked_fill_(state.is_padding[:slots, None, None, :prompt_length], -torch.inf)
    if window is not None:
        first = state.first_position[:rows] + state.token_index[:rows] - window + 1  # (n,) the first token in sight
        if not shape.is_grid:
            first = first.index_select(0, state.row_of_cell[: slots * columns])
        is_past = state.prompt_range[:prompt_length] < first.view(slots, 1, columns, 1, 1)
        scores.view(slots, heads, columns, repeats, -1).masked_fill_(is_past, -torch.inf)
    top, weights, mass = _exponentials(scores, may_be_empty=window is not None)
    summed = weights.to(query.dtype) @ cache.prompt_values[:slots, :, :prompt_length]
    parts = torch.cat((summed.float(), top, mass), dim=-1).view(slots, heads, columns, repeats, size + 2)
    parts = parts.transpose(1, 2).reshape(slots * columns, heads, repeats, size + 2)
    if not shape.is_grid:
        parts = parts.index_select(0, state.cell_of_row[:rows])
    prompt_sum, prompt_top, prompt_mass = parts.split((size, 1, 1), dim=-1)

    scores = (query @ cache.own_keys[:rows, :, :length].transpose(2, 3)).float()
    if not shape.is_aligned:
        is_unwritten = state.length_range[:length] > state.token_index[:rows, None]
        scores.masked_fill_(is_unwritten[:, None, None], -torch.inf)
    if window is not None:
        is_past = state.length_range[:length] <= state.token_index[:rows, None] - window
        scores.masked_fill_(is_past[:, None, None], -torch.inf)
    own_top, weights, own_mass = _exponentials(scores)
    own_sum = (weights.to(query.dtype) @ cache.own_values[:rows, :, :length]).float()

    top = torch.maximum(prompt_top, own_top)
    prompt_share, own_share = (prompt_top - top).exp(), (own_top - top).exp()
    total = prompt_mass * prompt_share + own_mass * own_share
    output: Tensor = (prompt_sum * prompt_share + own_sum * own_share) / total
    return output.to(query.dtype)


def _exponentials(scores: Tensor, *, may_be_empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (..., 1), exp(scores - maximum) and its sum (..., 1); overwrites the scores.

    Args:
        may_be_empty: all scores of a query may be minus infinity; their sum is 0.
    """
    top: Tensor = scores.amax(dim=-1, keepdim=True)
    if may_be_empty:
        top = top.clamp(min=torch.finfo(top.dtype).min)
    weights = scores.sub_(top).exp_()
    return top, weights, weights.sum(dim=-1, keepdim=True)
