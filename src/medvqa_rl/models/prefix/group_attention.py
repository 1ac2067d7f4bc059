"""Attention of packed groups in two scaled dot-product attention calls, without computing masked blocks; and masks for
other layouts.

The tokens of a micro-batch are packed into one row without padding: all prompts, then all completions. Only attention
unpacks them, into two padded batches: prompts (P, Tp) and completions (B, Tc), both padded on the right. Prompts
attend causally to themselves; completions attend to their prompt and causally to themselves. Completions of a group
never attend to each other, so the only masked scores are upper triangles and padding. In some families the tokens of
an image also attend to each other in both directions, or layers have a sliding window.

Legend: P prompts, B completions, N packed tokens, Tp and Tc padded lengths, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from medvqa_rl.models.families.shared import FULL, SLIDING

ATTENTION = "medvqa_sdpa"
"""Name of this attention in transformers; it equals sdpa except for packed groups."""
_PROMPT, _PADDING = 0, -1
"""Segments of rows."""


@dataclass(frozen=True)
class GroupLayout:
    """How packed tokens map to the two padded batches."""

    num_prompts: int
    """P."""
    prompt_width: int
    """Tp, tokens of the longest prompt."""
    completion_width: int
    """Tc, tokens of the longest completion."""
    completions_of_prompt: tuple[int, ...]
    """(P,) number of completions of each prompt."""
    longest: int
    """Tokens of the longest prompt with a completion."""
    lengths: Tensor
    """(B or 1,) tokens of the prompt of each completion."""
    mask: Tensor
    """(B or 1, 1, Tc, Tp + Tc) bool, True where a completion token attends to a token of its prompt or its own;
    additive after :meth:`prepared`."""
    prompt_mask: Tensor | None
    """(P, 1, Tp, Tp) bool, the same for prompts; None if they attend causally."""
    tokens: Tensor | None
    """(P * Tp + B * Tc,) packed index of each padded position, arbitrary at padding; None if nothing is padded."""
    positions: Tensor | None
    """(N,) padded position of each packed token; None if nothing is padded."""
    windowed: GroupLayout | None = None
    """The layout in layers with a sliding window, after :meth:`prepared`; None if the window hides no token."""

    def prepared(self, dtype: torch.dtype, queries_per_key: int, window: int | None = None) -> GroupLayout:
        """The layout with additive masks, computed once for all layers.

        Args:
            dtype: of queries and keys.
            queries_per_key: H / K; query heads that share a key head are stacked along the token dimension.
            window: tokens that a token attends to in layers with a sliding window, itself included; None if there are
                no such layers.
        """
        windowed = None
        if window is not None and self.longest > window:
            windowed = self._within(window).prepared(dtype, queries_per_key)
        return replace(
            self,
            mask=_additive(self.mask, dtype).repeat(1, 1, queries_per_key, 1),
            prompt_mask=None if self.prompt_mask is None else _additive(self.prompt_mask, dtype),
            windowed=windowed,
        )

    def _within(self, window: int) -> GroupLayout:
        """The layout with bool masks that hide tokens before the window."""
        # Indices of tokens in their sequence.
        prompt = torch.arange(self.prompt_width, device=self.mask.device)
        own = self.lengths[:, None] + torch.arange(self.completion_width, device=self.mask.device)  # (B or 1, Tc)
        keys = torch.cat([prompt.expand(len(own), -1), own], dim=1)  # (B or 1, Tp + Tc)
        is_near = keys[:, None, :] > own[:, :, None] - window
        prompt_mask = self.prompt_mask
        if prompt_mask is None:
            prompt_mask = (prompt <= prompt[:, None]).expand(self.num_prompts, 1, -1, -1)
        return replace(
            self, mask=self.mask & is_near[:, None], prompt_mask=prompt_mask & (prompt > prompt[:, None] - window)
        )


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a bool mask is True, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def group_layout(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[int]],
    device: torch.device | str,
    blocks: Sequence[NDArray[np.int64] | None] = (),
) -> GroupLayout:
    """Build the layout of packed groups.

    Args:
        prompt_lengths: (P,) tokens of each prompt.
        completion_lengths: per prompt, tokens of each of its completions, at least 1.
        device: of the tensors.
        blocks: per prompt, the blocks of tokens that attend to each other in both directions (:meth:`Family.blocks`).
    """
    counts = [len(group) for group in completion_lengths]
    prompts, completions = np.asarray(prompt_lengths), np.concatenate(completion_lengths)
    prompt_width, width = int(prompts.max()), int(completions.max())
    is_prompt = np.arange(prompt_width) < prompts[:, None]  # (P, Tp)
    is_completion = np.arange(width) < completions[:, None]  # (B, Tc)
    causal = np.tril(np.ones((width, width), dtype=bool))
    # Causality alone hides padding on the right from earlier tokens. Only prompts of different lengths need a mask per
    # completion.
    of_rows = prompts[:1] if is_prompt.all() else prompts.repeat(counts)
    seen = np.arange(prompt_width) < of_rows[:, None]  # (B or 1, Tp)
    mask = np.concatenate(
        [
            np.broadcast_to(seen[:, None], (len(seen), width, prompt_width)),
            np.broadcast_to(causal, (len(seen), width, width)),
        ],
        axis=-1,
    )
    prompt_mask = None
    if any(block is not None for block in blocks):
        prompt_mask = np.tril(np.ones((prompt_width, prompt_width), dtype=bool))[None].repeat(len(prompts), axis=0)
        for row, block in zip(prompt_mask, blocks):
            if block is not None:
                row[: len(block), : len(block)] |= (block[:, None] == block) & (block >= 0)
    is_token = np.concatenate([is_prompt.reshape(-1), is_completion.reshape(-1)])
    tokens = positions = None
    if not is_token.all():
        positions = torch.from_numpy(np.flatnonzero(is_token)).to(device)
        tokens = torch.from_numpy(np.maximum(np.cumsum(is_token) - 1, 0)).to(device)
    return GroupLayout(
        num_prompts=len(prompts),
        prompt_width=prompt_width,
        completion_width=width,
        completions_of_prompt=tuple(counts),
        longest=max(length + max(group) for length, group in zip(prompt_lengths, completion_lengths)),
        lengths=torch.from_numpy(of_rows).to(device),
        mask=torch.from_numpy(mask[:, None]).to(device),
        prompt_mask=None if prompt_mask is None else torch.from_numpy(prompt_mask[:, None]).to(device),
        tokens=tokens,
        positions=positions,
    )


class _Unpack(torch.autograd.Function):
    """Unpack (N, ...) tokens to padded positions. Padding does not affect any result, so its gradient is zero and the
    backward pass is an index_select too, much faster than the default scatter-add."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        return states.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return gradients[0].index_select(0, positions), None, None


class _Pack(torch.autograd.Function):
    """Pack padded positions into (N, ...) tokens; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.num_positions = len(states)
        return states.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        padded = gradients[0].new_zeros(ctx.num_positions, *gradients[0].shape[1:])
        return padded.index_copy_(0, positions, gradients[0]), None


class _Repeat(torch.autograd.Function):
    """Repeat (P, ...) prompt states to (B, ...), once per completion. The backward pass sums per prompt, which is
    faster than the default row by row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return torch.cat([states[[row]].expand(count, *states.shape[1:]) for row, count in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.stack([part.sum(0) for part in gradients[0].split(ctx.counts)]), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, *, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attention of packed groups.

    Args:
        query: (N, H, D).
        key: (N, K, D), K dividing H.
        value: (N, K, D).
        layout: from :meth:`GroupLayout.prepared`.
        scale: of the scores; defaults to 1 / sqrt(D).
        dropout: of the attention weights.

    Returns:
        (N, H, D).
    """
    num_heads, num_keys, size = query.shape[1], key.shape[1], query.shape[2]
    split = layout.num_prompts * layout.prompt_width
    unpacked = []
    for states in (query, key, value):
        if layout.tokens is not None:
            states = _Unpack.apply(states, layout.tokens, layout.positions)  # type: ignore[no-untyped-call]
        prompts, completions = states[:split], states[split:]
        unpacked.append(
            (
                prompts.unflatten(0, (-1, layout.prompt_width)).transpose(1, 2),  # (P, heads, Tp, D)
                completions.unflatten(0, (-1, layout.completion_width)).transpose(1, 2),  # (B, heads, Tc, D)
            )
        )
    (prompt_query, own_query), (prompt_key, own_key), (prompt_value, own_value) = unpacked
    of_prompts = F.scaled_dot_product_attention(
        prompt_query,
        prompt_key,
        prompt_value,
        attn_mask=layout.prompt_mask,
        dropout_p=dropout,
        is_causal=layout.prompt_mask is None,
        scale=scale,
        enable_gqa=num_heads != num_keys,
    )  # (P, H, Tp, D)

    counts = layout.completions_of_prompt
    shared_key = _Repeat.apply(prompt_key, counts)  # type: ignore[no-untyped-call]
    shared_value = _Repeat.apply(prompt_value, counts)  # type: ignore[no-untyped-call]
    own_query = own_query.reshape(len(own_query), num_keys, -1, size)  # (B, K, H / K * Tc, D)
    of_completions = F.scaled_dot_product_attention(
        own_query,
        torch.cat([shared_key, own_key], dim=2),  # (B, K, Tp + Tc, D)
        torch.cat([shared_value, own_value], dim=2),
        attn_mask=layout.mask,
        dropout_p=dropout,
        scale=scale,
    ).view(len(own_query), num_heads, -1, size)
    together = torch.cat(
        [of_prompts.transpose(1, 2).flatten(0, 1), of_completions.transpose(1, 2).flatten(0, 1)]
    )  # (positions, H, D)
    if layout.positions is None:
        return together
    packed: Tensor = _Pack.apply(together, layout.positions)  # type: ignore[no-untyped-call]
    return packed


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    group_layout: GroupLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer, for (1, heads, N, D) packed groups or any input of sdpa."""
    if group_layout is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    assert query.shape[0] == 1, "packed groups are one row"
    if sliding_window is not None and group_layout.windowed is not None:
        group_layout = group_layout.windowed
    query, key, value = (states.transpose(1, 2)[0] for states in (query, key, value))
    return attend(query, key, value, group_layout, scale=scaling, dropout=dropout)[None], None


def attention_mask(
    segments: Tensor, blocks: Tensor | None = None, positions: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Make the (R, 1, T, T) bool mask in which a token attends to its prompt and its own completion, causally.

    Padding attends to itself, because a softmax over nothing is NaN.

    Args:
        segments: (R, T) 0 at prompts, 1, 2 ... at the completions of the row, -1 at padding.
        blocks: (R, T) tokens with the same number attend to each other in both directions; -1 at all others.
        positions: (R, T), for a window.
        window: number of positions that a token attends to, its own included.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]  # (R, T, 1), (R, 1, T)
    order = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    is_self = torch.eye(length, dtype=torch.bool, device=segments.device)
    if blocks is not None:
        order = order | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0))
    if window is not None:
        assert positions is not None, "windows are measured in positions"
        order = order & (positions[:, None, :] > positions[:, :, None] - window)
    visible = order & ((key == query) | (key == _PROMPT)) & (query != _PADDING)
    return (visible | is_self)[:, None]


def mask_argument(
    language_model: Any,
    window: int | None,
    segments: Tensor,
    blocks: Tensor | None,
    positions: Tensor,
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """The argument ``attention_mask`` of a language model with sdpa or eager attention: (R, 1, T, T), or one for each
    type of layers if some have a sliding window.

    Args:
        language_model: the model.
        window: of its layers with a sliding window; None if there are none.
        segments, blocks, positions: as for :func:`attention_mask`.
        dtype: of the embeddings.
    """

    def prepared(mask: Tensor) -> Tensor:
        if language_model.config._attn_implementation != "eager":
            return mask
        # Eager attention adds its mask, so a boolean one would be silently wrong.
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return additive.masked_fill(~mask, torch.finfo(dtype).min)

    mask = prepared(attention_mask(segments, blocks))
    if window is None:
        return mask
    is_long = segments.shape[1] > window
    near = prepared(attention_mask(segments, blocks, positions, window)) if is_long else mask
    return {FULL: mask, SLIDING: near}


def unused_mask(device: torch.device | str) -> Tensor:
    """A mask to pass beside a layout: transformers makes no mask of its own if it gets one with four dimensions, and
    the attention above does not read it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_group_attention(language_model: Any) -> None:
    """Make a language model with sdpa attention accept packed groups; its other inputs are not affected.

    The change is permanent, because layers look up the attention in every call, including recomputed checkpoints.
    """
    if language_model.config._attn_implementation == "sdpa":
        language_model.config._attn_implementation = ATTENTION
