"""The prefill: images and prompts go through the model once, before their completions are decoded.

Prompts about the same images begin with the same tokens: system prompt, images, and what the questions have in common.
If asked to, these are computed once. The tokens are packed into one row, as in the update, and attention computes no
masked block (:mod:`medvqa_rl.models.prefix.group_attention`):

    [shared start 1 | shared start 2 | rest of prompt 1 | rest of prompt 2 | rest of prompt 3]

Legend: P prompts, T tokens of the longest, N packed tokens, K key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache

from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.models.cache import cache_argument
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.prefix.group_attention import ATTENTION, group_layout, mask_argument, unused_mask


class Prefilled(NamedTuple):
    """Prompts after the prefill, padded on the right."""

    keys: Sequence[Tensor]
    """Per layer (P, K, T, D)."""
    values: Sequence[Tensor]
    logits: Tensor
    """(P, V) for the first completion token."""
    lengths: Sequence[int]
    next_positions: Tensor
    """(P,) the position of the first completion token."""


class Shared(NamedTuple):
    """Prompts that begin with the same tokens and images."""

    length: int
    """Tokens that they share, at least one less than the shortest prompt has."""
    prompts: list[int]
    """Their indices."""


def prefill(
    policy: Policy, prompts: Sequence[EncodedPrompt], *, shares_images: bool = False
) -> tuple[Prefilled, list[Tensor | None]]:
    """Run prompts through the model.

    Args:
        policy: the model.
        prompts: P prompts.
        shares_images: compute images and the start of prompts that are equal once. Results differ by rounding.

    Returns:
        The keys and values, and per prompt the features (image tokens, width) of its images or None.
    """
    family, model, device = as_shared(policy.family), policy.model, policy.device
    if not shares_images:
        features = family.image_features(model, prompts, device)
        return _padded(policy, prompts, features), features
    owners = same_images(prompts)
    distinct = sorted(set(owners))
    found = dict(zip(distinct, family.image_features(model, [prompts[owner] for owner in distinct], device)))
    features = [found[owner] for owner in owners]
    is_packable = family.text(model).config._attn_implementation == ATTENTION
    if len(distinct) == len(prompts) or not is_packable:
        return _padded(policy, prompts, features), features
    return _packed(
        policy, prompts, features, shared_starts(prompts, owners, policy.processor.image_token_id)
    ), features


def same_images(prompts: Sequence[EncodedPrompt]) -> list[int]:
    """For each prompt, the index of the first one with the same images; its own without images."""
    first: dict[Any, int] = {}
    owners = []
    for index, prompt in enumerate(prompts):
        # A few values tell most images apart, so whole arrays are compared once per prompt at most.
        glance = tuple(
            (name, array.shape, array.reshape(-1)[:: 1 + array.size // 64].tobytes())
            for name, array in prompt.image_inputs.items()
        )
        owner = first.setdefault(glance, index) if glance else index
        others = prompts[owner].image_inputs
        is_same = owner == index or all(np.array_equal(array, others[n]) for n, array in prompt.image_inputs.items())
        owners.append(owner if is_same else index)
    return owners


def shared_starts(prompts: Sequence[EncodedPrompt], owners: Sequence[int], image_token: int) -> list[Shared]:
    """What prompts with the same images have in common. Every prompt is in one group, perhaps alone.

    Args:
        owners: from :func:`same_images`.
        image_token: id of the placeholder; a start holds all of them, or it is not shared.
    """
    groups: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        groups.setdefault(owner, []).append(index)
    starts = []
    for group in groups.values():
        first = prompts[group[0]].input_ids
        length = min(_common(first, prompts[index].input_ids) for index in group)
        images = np.flatnonzero(first == image_token)
        end = int(images[-1]) + 1 if len(images) else 0
        if length >= end:
            starts.append(Shared(length, group))
        else:  # the questions come before the images
            starts += [Shared(len(prompts[index].input_ids) - 1, [index]) for index in group]
    return starts


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Tokens with which both begin, without the last one of either."""
    length = min(len(one), len(other)) - 1
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length


def _padded(policy: Policy, prompts: Sequence[EncodedPrompt], features: Sequence[Tensor | None]) -> Prefilled:
    """A row per prompt, padded on the right."""
    model, device, family = policy.model, policy.device, as_shared(policy.family)
    padded = policy.processor.pad(prompts, device)
    embedded = family.embed(model, padded.input_ids, padded.mask, features)
    masks: dict[str, Any] = {}
    if padded.blocks is not None:  # else transformers masks by causality and window itself
        masks["attention_mask"] = mask_argument(
            family.text(model),
            family.window(model),
            padded.mask.long() - 1,
            padded.blocks,
            padded.position_ids[0],
            embedded.embeds.dtype,
        )
    cache = DynamicCache()  # without a configuration, so that layers with a sliding window keep all keys
    hidden = family.hidden_states(
        model, embedded, padded.position_ids, use_cache=True, **cache_argument(family.text(model), cache), **masks
    )
    last = hidden[torch.arange(len(prompts), device=device), padded.mask.sum(dim=-1) - 1]
    layers: Any = cache.layers
    return Prefilled(
        keys=[layer.keys for layer in layers],
        values=[layer.values for layer in layers],
        logits=causal_model(model).lm_head(last),
        lengths=[len(prompt.input_ids) for prompt in prompts],
        next_positions=padded.next_positions,
    )


def _packed(
    policy: Policy, prompts: Sequence[EncodedPrompt], features: Sequence[Tensor | None], starts: Sequence[Shared]
) -> Prefilled:
    """One row: every shared start, then the rest of every prompt."""
    model, device, family, processor = policy.model, policy.device, as_shared(policy.family), policy.processor
    text = family.text(model)
    owners = [prompts[start.prompts[0]] for start in starts]
    members = [(index, start.length) for start in starts for index in start.prompts]
    positions = {index: processor.positions(prompts[index]) for index, _ in members}
    blocks = [processor.blocks(owner) for owner in owners]
    ids = [owner.input_ids[: start.length] for owner, start in zip(owners, starts)]
    ids += [prompts[index].input_ids[length:] for index, length in members]
    placed = [positions[start.prompts[0]][:, : start.length] for start in starts]
    placed += [positions[index][:, length:] for index, length in members]
    layout = group_layout(
        [start.length for start in starts],
        [[len(prompts[index].input_ids) - start.length for index in start.prompts] for start in starts],
        device,
        [None if block is None else block[: start.length] for block, start in zip(blocks, starts)],
    )
    row = torch.from_numpy(np.concatenate(ids)[None]).to(device)  # (1, N)
    embedded = family.embed(
        model, row, torch.ones_like(row, dtype=torch.bool), [features[start.prompts[0]] for start in starts]
    )
    config = text.config
    cache = DynamicCache()
    hidden = family.hidden_states(
        model,
        embedded,
        torch.from_numpy(np.concatenate(placed, axis=1)[:, None]).to(device),
        use_cache=True,
        **cache_argument(text, cache),
        attention_mask=unused_mask(device),
        group_layout=layout.prepared(
            embedded.embeds.dtype, config.num_attention_heads // config.num_key_value_heads, family.window(model)
        ),
    )
    where = torch.from_numpy(_places(prompts, starts)).to(device)  # (P, T)
    lengths = [len(prompt.input_ids) for prompt in prompts]
    last = where[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]
    layers: Any = cache.layers
    return Prefilled(
        keys=[layer.keys[0][:, where].transpose(0, 1) for layer in layers],
        values=[layer.values[0][:, where].transpose(0, 1) for layer in layers],
        logits=causal_model(model).lm_head(hidden[0, last]),
        lengths=lengths,
        next_positions=torch.tensor([int(positions[index].max()) + 1 for index in range(len(prompts))], device=device),
    )


def _places(prompts: Sequence[EncodedPrompt], starts: Sequence[Shared]) -> NDArray[np.int64]:
    """(P, T) where in the row each token of a prompt is; 0 at padding."""
    places = np.zeros((len(prompts), max(len(prompt.input_ids) for prompt in prompts)), dtype=np.int64)
    begin, rest = 0, sum(start.length for start in starts)
    for start in starts:
        for index in start.prompts:
            places[index, : start.length] = np.arange(begin, begin + start.length)
            length = len(prompts[index].input_ids)
            places[index, start.length : length] = np.arange(rest, rest + length - start.length)
            rest += length - start.length
        begin += start.length
    return places
