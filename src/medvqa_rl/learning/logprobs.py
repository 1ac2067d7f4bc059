"""Log-probabilities of completions under a model: the one forward pass of the update.

A group is one row, its prompt followed by all its completions, and a mask keeps the completions from seeing each
other, so the prompt and its image are computed once per group and not once per completion. The same code lays every
completion out in a row of its own, which needs no such mask: slower, and the oracle that the rows of groups are
tested against.

Legend: P prompts, B completions, R rows, T tokens of a row, Tc tokens of a completion, N completion tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvqa_rl.models.qwen_vl import Processor, backbone, causal_model, embed_prompts, image_features, rope_positions
from medvqa_rl.types import EncodedPrompt, Group

LOGITS_PER_CHUNK = 2**25
"""Logits in memory at a time: 128 MiB in float32. Beyond it they are computed in chunks, and again in the backward."""

_PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class CompletionBatch:
    """Whole groups laid out as rows of tokens, on one device."""

    prompts: tuple[EncodedPrompt, ...]
    """(P,) prompts."""
    features: tuple[Tensor | None, ...] | None
    """(P,) image features kept from the rollout; None where the vision tower learns and they must be computed."""
    input_ids: Tensor
    """(R, T) prompt, then completions, then padding."""
    segments: Tensor
    """(R, T) 0 at the prompt, 1, 2 ... at the completions of the row, -1 at padding."""
    position_ids: Tensor
    """(3, R, T) M-RoPE positions; every completion continues from the end of its prompt."""
    prompt_of_row: tuple[int, ...]
    """(R,) index of the row's prompt."""
    predictors: Tensor
    """(N,) index into the R * T tokens of the token that predicts each completion token."""
    targets: Tensor
    """(N,) the completion tokens, completion after completion."""
    mask: Tensor
    """(B, Tc) bool, True at tokens of the completions."""
    has_shared_rows: bool
    """True where some row holds more than one completion."""

    @property
    def num_completions(self) -> int:
        """B."""
        return self.mask.shape[0]


class TokenStats(NamedTuple):
    """What the model says of every completion token; 0 at padding."""

    logps: Tensor
    """(B, Tc) float32 log-probabilities of the tokens, of logits / temperature over the full vocabulary."""
    entropy: Tensor | None
    """(B, Tc) float32 entropy of the same distribution in nats, without gradient."""


def collate(
    groups: Sequence[Group], processor: Processor, device: torch.device | str, *, share_prefix: bool = True
) -> CompletionBatch:
    """Lay groups out for :class:`GroupForward`.

    Args:
        groups: P groups; completions may differ in number and length, but none is empty.
        processor: of the model that the batch is for.
        device: where the tensors go.
        share_prefix: one row per group; False gives every completion a row with the prompt repeated.
    """
    rows: list[tuple[int, list[tuple[int, ...]]]] = []
    for index, group in enumerate(groups):
        completions = [completion.token_ids for completion in group.completions]
        assert all(completions), "a completion has no tokens"
        rows += [(index, completions)] if share_prefix else [(index, [ids]) for ids in completions]
    prompts = tuple(group.prompt for group in groups)
    merge_size = processor.image_processor.merge_size
    positions = [
        rope_positions(prompt, image_token_id=processor.image_token_id, merge_size=merge_size) for prompt in prompts
    ]
    width = max(len(prompts[index].input_ids) + sum(map(len, completions)) for index, completions in rows)
    lengths = [len(ids) for _, completions in rows for ids in completions]
    input_ids = np.full((len(rows), width), processor.pad_id, dtype=np.int64)
    segments = np.full((len(rows), width), _PADDING, dtype=np.int64)
    position_ids = np.zeros((3, len(rows), width), dtype=np.int64)
    predictors = []
    for row, (index, completions) in enumerate(rows):
        end = len(prompts[index].input_ids)
        input_ids[row, :end] = prompts[index].input_ids
        segments[row, :end] = _PROMPT
        position_ids[:, row, :end] = positions[index]
        last, following = end - 1, positions[index].max() + 1
        for segment, ids in enumerate(completions, start=1):
            columns = slice(end, end + len(ids))
            input_ids[row, columns] = ids
            segments[row, columns] = segment
            position_ids[:, row, columns] = following + np.arange(len(ids))
            # The prompt's last token predicts the first token of each completion.
            predictors.append(row * width + np.concatenate([[last], np.arange(end, end + len(ids) - 1)]))
            end += len(ids)
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    features = tuple(group.image_features for group in groups)
    is_cached = all((feature is None) == (prompt.pixel_values is None) for feature, prompt in zip(features, prompts))

    def as_tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return CompletionBatch(
        prompts=prompts,
        features=features if is_cached else None,
        input_ids=as_tensor(input_ids),
        segments=as_tensor(segments),
        position_ids=as_tensor(position_ids),
        prompt_of_row=tuple(index for index, _ in rows),
        predictors=as_tensor(np.concatenate(predictors)),
        targets=as_tensor(np.concatenate([ids for _, completions in rows for ids in completions])),
        mask=as_tensor(mask),
        has_shared_rows=any(len(completions) > 1 for _, completions in rows),
    )


def attention_mask(segments: Tensor) -> Tensor:
    """(R, 1, T, T) bool: a token sees the tokens before it in its prompt and in its own completion.

    Padding sees itself, because a softmax over nothing is NaN.

    Args:
        segments: (R, T) as in :class:`CompletionBatch`.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]  # (R, T, 1), (R, 1, T)
    is_causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    is_self = torch.eye(length, dtype=torch.bool, device=segments.device)
    visible = is_causal & ((key == query) | (key == _PROMPT)) & (query != _PADDING)
    return (visible | is_self)[:, None]


def token_statistics(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies from final hidden states.

    Args:
        head: the output layer, hidden -> V logits.
        hidden: (N, hidden) states that predict the targets.
        targets: (N,) token ids.

    Returns:
        (N,) float32 log-probabilities and (N,) float32 entropies, zeros unless asked for.
    """
    logits = head(hidden).float() / temperature  # (N, V)
    normaliser = torch.logsumexp(logits, dim=-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    if not with_entropy:
        return logps, torch.zeros_like(logps)
    with torch.no_grad():
        probabilities = torch.exp(logits - normaliser[:, None])
        return logps, normaliser - (probabilities * logits).sum(-1)


class GroupForward(nn.Module):
    """The module that is wrapped for distributed training: everything that needs gradients runs in its forward.

    Nothing else may call the model with gradients, or the wrapper's reduction would be skipped silently.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: CompletionBatch, *, temperature: float = 1.0, with_entropy: bool = False) -> TokenStats:
        """Score the completions of a batch.

        Args:
            batch: whole groups, from :func:`collate`.
            temperature: the one they were sampled at.
            with_entropy: compute the entropies too.

        Raises:
            ValueError: flash attention was chosen; it cannot take the mask that groups need.
        """
        inner = backbone(self.model)
        device = batch.input_ids.device
        features = batch.features
        if features is None:
            features = tuple(image_features(self.model, batch.prompts, device))
        embeds = embed_prompts(
            self.model,
            batch.input_ids,
            batch.segments == _PROMPT,
            [features[index] for index in batch.prompt_of_row],
        )
        hidden: Tensor = inner.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask=self._mask(batch, embeds.dtype),
            use_cache=False,
        ).last_hidden_state
        logps, entropy = self._score(
            hidden.flatten(0, 1).index_select(0, batch.predictors), batch.targets, temperature, with_entropy
        )
        table = torch.zeros(batch.mask.shape, dtype=torch.float32, device=device)
        return TokenStats(
            table.masked_scatter(batch.mask, logps),
            table.masked_scatter(batch.mask, entropy) if with_entropy else None,
        )

    def _mask(self, batch: CompletionBatch, dtype: torch.dtype) -> Tensor:
        """The attention mask in the form that the model's attention takes."""
        if not batch.has_shared_rows:
            return (batch.segments != _PADDING).long()  # (R, T)
        mask = attention_mask(batch.segments)
        implementation = backbone(self.model).language_model.config._attn_implementation
        if implementation == "sdpa":
            return mask
        if implementation == "eager":  # adds its mask, so a boolean one would be silently wrong
            return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        raise ValueError(
            f"model.attention is {implementation}, which cannot keep the completions of a group apart: set it to sdpa."
        )

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
        """:func:`token_statistics` in chunks, so that the logits of a large vocabulary never exist at once."""
        head = causal_model(self.model).lm_head
        size = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
        if len(targets) <= size:
            return token_statistics(head, hidden, targets, temperature, with_entropy)
        parts = [
            checkpoint(token_statistics, head, *chunk, temperature, with_entropy, use_reentrant=False)
            for chunk in zip(hidden.split(size), targets.split(size))
        ]
        logps, entropies = zip(*parts)
        return torch.cat(logps), torch.cat(entropies)
