"""Attention of packed groups in two calls of scaled dot-product attention, so that no masked block is computed.

The tokens of a micro-batch stand in one row without padding: all prompts one after another, then all completions.
Everything but attention works on them as they are. For attention they are spread over two rectangles, prompts
(P, Tp) and completions (B, Tc), both padded on the right. Prompts attend causally to themselves; completions attend
to the keys of their prompt and causally to their own. Completions of a group never meet, so nothing is computed to be
masked away but the upper triangles and the padding.

Legend: P prompts, B completions, N tokens, Tp and Tc widths of the rectangles, H query heads, K key heads, D their
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

ATTENTION = "medvqa_sdpa"
"""Name under which transformers knows this attention: its own sdpa, except for packed groups."""


@dataclass(frozen=True)
class GroupLayout:
    """Where the tokens of packed groups stand in the two rectangles."""

    num_prompts: int
    """P."""
    prompt_width: int
    """Tp, tokens of the longest prompt."""
    completion_width: int
    """Tc, tokens of the longest completion."""
    completions_of_prompt: tuple[int, ...]
    """(P,) how many completions continue each prompt."""
    mask: Tensor
    """(B or 1, 1, Tc, Tp + Tc) bool, True where a completion's token sees a key of its prompt or its own; after
    :meth:`prepared` additive."""
    tokens: Tensor | None
    """(P * Tp + B * Tc,) the token in each place of the rectangles, any at padding; None where nothing is padded."""
    places: Tensor | None
    """(N,) the place of each token; None where nothing is padded."""

    def prepared(self, dtype: torch.dtype, queries_per_key: int) -> GroupLayout:
        """The layout with the mask as the attention adds it, computed once for all layers.

        Args:
            dtype: of queries and keys.
            queries_per_key: H / K; query heads that share a key head are laid out as rows of one query.
        """
        additive = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
        additive.masked_fill_(~self.mask, -torch.inf)
        return replace(self, mask=additive.repeat(1, 1, queries_per_key, 1))


def group_layout(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], device: torch.device | str
) -> GroupLayout:
    """The layout of packed groups.

    Args:
        prompt_lengths: (P,) tokens of each prompt.
        completion_lengths: (P, any) tokens of each prompt's completions, none 0.
        device: where the tensors go.
    """
    counts = [len(group) for group in completion_lengths]
    prompts, completions = np.asarray(prompt_lengths), np.concatenate(completion_lengths)
    prompt_width, width = int(prompts.max()), int(completions.max())
    is_prompt = np.arange(prompt_width) < prompts[:, None]  # (P, Tp)
    is_completion = np.arange(width) < completions[:, None]  # (B, Tc)
    causal = np.tril(np.ones((width, width), dtype=bool))
    # Padding on the right is hidden from the tokens before it by causality alone; only prompts of different lengths
    # need a mask for each completion.
    seen = is_prompt[:1] if is_prompt.all() else is_prompt.repeat(counts, axis=0)  # (B or 1, Tp)
    mask = np.concatenate(
        [
            np.broadcast_to(seen[:, None], (len(seen), width, prompt_width)),
            np.broadcast_to(causal, (len(seen), width, width)),
        ],
        axis=-1,
    )
    is_token = np.concatenate([is_prompt.reshape(-1), is_completion.reshape(-1)])
    tokens = places = None
    if not is_token.all():
        places = torch.from_numpy(np.flatnonzero(is_token)).to(device)
        tokens = torch.from_numpy(np.maximum(np.cumsum(is_token) - 1, 0)).to(device)
    return GroupLayout(
        num_prompts=len(prompts),
        prompt_width=prompt_width,
        completion_width=width,
        completions_of_prompt=tuple(counts),
        mask=torch.from_numpy(mask[:, None]).to(device),
        tokens=tokens,
        places=places,
    )


class _Spread(torch.autograd.Function):
    """(N, ...) tokens to the places of the rectangles. What stands at padding has no part in any result, so its
    gradient is zero and the way back is a selection too, which is much faster than adding up."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradients[0].index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """The places of the rectangles back to (N, ...) tokens; padding gets the gradient zero."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.num_places = len(states)
        return states.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        spread = gradients[0].new_zeros(ctx.num_places, *gradients[0].shape[1:])
        return spread.index_copy_(0, places, gradients[0]), None


class _Repeat(torch.autograd.Function):
    """(P, ...) states of prompts to (B, ...), once for each completion. Summed up per prompt on the way back, which
    is faster than adding row by row."""

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
        layout: as :meth:`GroupLayout.prepared` gives it.
        scale: factor of the scores; None is 1 / sqrt(D).
        dropout: of the attention's weights.

    Returns:
        (N, H, D).
    """
    num_heads, num_keys, size = query.shape[1], key.shape[1], query.shape[2]
    split = layout.num_prompts * layout.prompt_width
    rectangles = []
    for states in (query, key, value):
        if layout.tokens is not None:
            states = _Spread.apply(states, layout.tokens, layout.places)  # type: ignore[no-untyped-call]
        prompts, completions = states[:split], states[split:]
        rectangles.append(
            (
                prompts.unflatten(0, (-1, layout.prompt_width)).transpose(1, 2),  # (P, heads, Tp, D)
                completions.unflatten(0, (-1, layout.completion_width)).transpose(1, 2),  # (B, heads, Tc, D)
            )
        )
    (prompt_query, own_query), (prompt_key, own_key), (prompt_value, own_value) = rectangles
    of_prompts = F.scaled_dot_product_attention(
        prompt_query,
        prompt_key,
        prompt_value,
        dropout_p=dropout,
        is_causal=True,
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
    )  # (places, H, D)
    if layout.places is None:
        return together
    collected: Tensor = _Collect.apply(together, layout.places)  # type: ignore[no-untyped-call]
    return collected


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    group_layout: GroupLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (1, heads, N, D) of packed groups, or anything that its sdpa takes."""
    if group_layout is None:
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return result
    assert attention_mask is None and query.shape[0] == 1, "packed groups are one row, and the layout is their mask"
    query, key, value = (states.transpose(1, 2)[0] for states in (query, key, value))
    return attend(query, key, value, group_layout, scale=scaling, dropout=dropout)[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_group_attention(language_model: Any) -> None:
    """Let a language model that attends by sdpa take packed groups; nothing else changes for it.

    Its layers look the name up in each call, also when a checkpointed layer is computed again, so it stays switched.
    """
    if language_model.config._attn_implementation == "sdpa":
        language_model.config._attn_implementation = ATTENTION
