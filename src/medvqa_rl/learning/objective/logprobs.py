"""Log-probabilities of completions under a model: the only forward pass of the update.

A prompt and its images are computed once per group instead of once per completion. By default all groups of a
micro-batch are packed into one row without padding, and models/prefix/group_attention.py keeps the completions apart.
Two slower layouts serve other attention implementations and tests.

Legend: P prompts, B completions, R rows, T tokens per row, Tc tokens per completion, N completion tokens, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvqa_rl.core.types import EncodedPrompt, Group
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.models.families import family_of
from medvqa_rl.models.families.generic import Generic, as_generic
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.prefix import group_attention
from medvqa_rl.models.prefix.group_attention import GroupLayout, group_layout
from medvqa_rl.models.processor import Processor

LOGITS_PER_CHUNK = 2**25
"""Logits held in memory at a time: 128 MiB in float32. More are computed in chunks, and recomputed in the backward."""

EntropyUse = Literal["none", "value", "gradient"]
"""What is computed of the entropy: nothing, its value, or its value with a gradient, which needs more memory."""

_PROMPT, _PADDING = 0, -1


@dataclass(frozen=True)
class CompletionBatch:
    """Whole groups laid out as rows of tokens, on one device."""

    layout: Layout
    prompts: tuple[EncodedPrompt, ...]
    """(P,) prompts."""
    features: tuple[Tensor | None, ...] | None
    """(P,) image features cached by the rollout; None if the vision tower is trained and must run again."""
    input_ids: Tensor
    """(R, T) prompts, then completions, then padding."""
    segments: Tensor
    """(R, T) 0 at prompts, 1, 2 ... at the completions of the row, -1 at padding."""
    position_ids: Tensor
    """(axes, R, T) positions; every completion continues from the end of its prompt."""
    prompts_in_rows: tuple[int, ...]
    """Index of each prompt in row order: each appears once, or once per completion in separate rows."""
    predictors: Tensor
    """(N,) for each completion token, the index (into the R * T tokens) of the token that predicts it."""
    targets: Tensor
    """(N,) the completion tokens, completion after completion."""
    mask: Tensor
    """(B, Tc) bool, True at completion tokens."""
    blocks: Tensor | None
    """(R, T) number of the block in which a token of a prompt attends in both directions, -1 elsewhere; None if all
    tokens attend causally, or if they are packed."""
    packing: GroupLayout | None
    """How packed groups attend; None in the padded layouts."""

    @property
    def num_completions(self) -> int:
        """B."""
        return self.mask.shape[0]


class TokenStats(NamedTuple):
    """Statistics of the model's distribution at each completion token; 0 at padding."""

    logps: Tensor
    """(B, Tc) float32 log-probabilities of the tokens under softmax(logits / temperature), full vocabulary."""
    entropy: Tensor | None
    """(B, Tc) float32 entropy of the same distribution in nats; None unless requested."""


@contextmanager
def scoring(forward: nn.Module) -> Iterator[None]:
    """Run passes without gradients in evaluation mode, because dropout would make any two passes differ."""
    is_training = forward.training
    forward.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        forward.train(is_training)


def layout_for(attention: str) -> Layout:
    """Return the fastest layout that an attention implementation of transformers supports.

    SDPA and eager attention accept a 4-D mask, so groups can share a row; flash attention does not.
    """
    layouts: dict[str, Layout] = {group_attention.ATTENTION: Layout.PACKED, "sdpa": Layout.ROWS, "eager": Layout.ROWS}
    return layouts.get(attention, Layout.SEPARATE)


def layout_of(policy: Policy) -> Layout:
    """Return the fastest layout that a policy supports; models without a fast path need separate rows."""
    if not isinstance(policy.family, SharedFamily):
        return Layout.SEPARATE
    return layout_for(policy.family.text(policy.model).config._attn_implementation)


def collate(
    groups: Sequence[Group], processor: Processor, device: torch.device | str, *, layout: Layout = Layout.PACKED
) -> CompletionBatch:
    """Lay groups out for :class:`GroupForward`, whose result does not depend on the layout.

    Args:
        groups: P groups; completions may differ in number and length, but must not be empty.
        processor: the model's processor.
        device: device of the batch.
    """
    prompts = tuple(group.prompt for group in groups)
    completions = [[completion.token_ids for completion in group.completions] for group in groups]
    assert all(ids for group in completions for ids in group), "a completion has no tokens"
    rows = _rows(completions, layout)
    lengths = [len(ids) for group in completions for ids in group]
    width = max(sum(len(prompts[prompt].input_ids if ids is None else ids) for prompt, ids in row) for row in rows)
    positions = [processor.positions(prompt) for prompt in prompts]
    input_ids = np.full((len(rows), width), processor.pad_id, dtype=np.int64)
    segments = np.full((len(rows), width), _PADDING, dtype=np.int64)
    position_ids = np.zeros((processor.family.num_axes, len(rows), width), dtype=np.int64)
    last = np.zeros(len(prompts), dtype=np.int64)  # index of each prompt's last token
    predictors = []
    for row, pieces in enumerate(rows):
        end, segment = 0, _PROMPT
        for prompt, ids in pieces:
            begin, end = end, end + len(prompts[prompt].input_ids if ids is None else ids)
            if ids is None:
                input_ids[row, begin:end] = prompts[prompt].input_ids
                segments[row, begin:end] = _PROMPT
                position_ids[:, row, begin:end] = positions[prompt]
                last[prompt] = row * width + end - 1
                continue
            segment += 1
            input_ids[row, begin:end] = ids
            segments[row, begin:end] = segment
            position_ids[:, row, begin:end] = positions[prompt].max() + 1 + np.arange(len(ids))
            # The prompt's last token predicts the first token of each completion.
            predictors.append(np.concatenate([last[[prompt]], row * width + np.arange(begin, end - 1)]))
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    features = tuple(group.image_features for group in groups)
    is_cached = all((feature is None) != bool(prompt.image_inputs) for feature, prompt in zip(features, prompts))

    def as_tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    blocks = [processor.blocks(prompt) for prompt in prompts]
    packing, in_rows = None, np.full((len(rows), width), -1, dtype=np.int64)
    if layout == Layout.PACKED:
        packing = group_layout(
            [len(prompt.input_ids) for prompt in prompts],
            [list(map(len, group)) for group in completions],
            device,
            blocks,
        )
    else:
        for row, ((prompt, _), *_) in enumerate(rows):  # a row begins with its only prompt
            block = blocks[prompt]
            if block is not None:
                in_rows[row, : len(block)] = block
    return CompletionBatch(
        layout=layout,
        prompts=prompts,
        features=features if is_cached else None,
        input_ids=as_tensor(input_ids),
        segments=as_tensor(segments),
        position_ids=as_tensor(position_ids),
        prompts_in_rows=tuple(prompt for row in rows for prompt, ids in row if ids is None),
        predictors=as_tensor(np.concatenate(predictors)),
        targets=as_tensor(np.concatenate([ids for group in completions for ids in group])),
        mask=as_tensor(mask),
        blocks=as_tensor(in_rows) if (in_rows >= 0).any() else None,
        packing=packing,
    )


def _rows(
    completions: Sequence[Sequence[tuple[int, ...]]], layout: Layout
) -> list[list[tuple[int, tuple[int, ...] | None]]]:
    """Arrange prompts and completions in rows: (index, None) is a prompt, (index, tokens) a completion of it.

    Args:
        completions: for each prompt, the tokens of its completions.
    """
    prompts: list[tuple[int, tuple[int, ...] | None]] = [(prompt, None) for prompt in range(len(completions))]
    if layout == Layout.PACKED:
        return [prompts + [(prompt, ids) for prompt, group in enumerate(completions) for ids in group]]
    if layout == Layout.ROWS:
        return [[prompts[prompt], *((prompt, ids) for ids in group)] for prompt, group in enumerate(completions)]
    return [[prompts[prompt], (prompt, ids)] for prompt, group in enumerate(completions) for ids in group]


def token_statistics(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float, entropy: EntropyUse
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropies from final hidden states.

    Args:
        head: output layer, hidden -> V logits.
        hidden: (N, hidden) states that predict the targets.
        targets: (N,) token ids.
        entropy: whether entropies are needed, and their gradient, which is that of -sum of p log p.

    Returns:
        (N,) float32 log-probabilities and (N,) float32 entropies, zeros unless requested.
    """
    logits = head(hidden).float() / temperature  # (N, V)
    normaliser = torch.logsumexp(logits, dim=-1)
    logps = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    if entropy == "none":
        return logps, torch.zeros_like(logps)
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
        probabilities = torch.exp(logits - normaliser[:, None])
        return logps, normaliser - (probabilities * logits).sum(-1)


class GroupForward(nn.Module):
    """The module that is wrapped for distributed training: everything that needs gradients runs in its forward.

    Calling the model directly with gradients would silently skip the wrapper's all-reduce.
    """

    def __init__(self, model: nn.Module, *, always_sees: bool = False) -> None:
        """
        Args:
            always_sees: if no prompt has an image, run a trained vision tower on a blank one whose output is
                multiplied by 0, because ranks that exchange its weights or gradients wait for each other.
        """
        super().__init__()
        self.model = model
        self._always_sees = always_sees

    def forward(self, batch: CompletionBatch, *, temperature: float = 1.0, entropy: EntropyUse = "none") -> TokenStats:
        """Score the completions of a batch.

        Args:
            batch: groups from :func:`collate`.
            temperature: sampling temperature.
            entropy: compute entropies, too, without or with a gradient.

        Raises:
            ValueError: the attention implementation does not support the batch's layout.
        """
        family = family_of(self.model)
        device = batch.input_ids.device
        if isinstance(family, SharedFamily):
            hidden = self._shared(family, batch)
        else:
            hidden = self._separate(as_generic(family), batch)
        logps, entropies = self._score(
            hidden.flatten(0, 1).index_select(0, batch.predictors), batch.targets, temperature, entropy
        )
        table = torch.zeros(batch.mask.shape, dtype=torch.float32, device=device)
        return TokenStats(
            table.masked_scatter(batch.mask, logps),
            table.masked_scatter(batch.mask, entropies) if entropy != "none" else None,
        )

    def _shared(self, family: SharedFamily, batch: CompletionBatch) -> Tensor:
        """(R, T, hidden) states, with each image encoded once."""
        device = batch.input_ids.device
        features = batch.features
        if features is None:
            features = tuple(family.image_features(self.model, batch.prompts, device))
        blank = None
        if self._always_sees and not any(prompt.image_inputs for prompt in batch.prompts):
            # Here, where the tower would run: sharded ranks gather weights in the order in which modules run.
            blank = None if family.vision_is_frozen(self.model) else family.blank_features(self.model, device)
        embedded = family.embed(
            self.model,
            batch.input_ids,
            batch.segments == _PROMPT,
            [features[index] for index in batch.prompts_in_rows],
        )
        if blank is not None:
            embedded = embedded._replace(embeds=embedded.embeds + 0.0 * blank.sum())
        return family.hidden_states(
            self.model,
            embedded,
            batch.position_ids,
            use_cache=False,
            **self._attention(family, batch, embedded.embeds.dtype),
        )

    def _separate(self, family: Generic, batch: CompletionBatch) -> Tensor:
        """(R, T, hidden) states of the model's own forward."""
        assert batch.layout == Layout.SEPARATE
        prompts = [batch.prompts[index] for index in batch.prompts_in_rows]
        mask = batch.segments != _PADDING
        return family.separate_hidden_states(self.model, prompts, batch.input_ids, mask)

    def _attention(self, family: SharedFamily, batch: CompletionBatch, dtype: torch.dtype) -> dict[str, Any]:
        """Return the language model's arguments that tell which tokens attend to which."""
        language_model, window = family.text(self.model), family.window(self.model)
        config = language_model.config
        match batch.layout, config._attn_implementation:
            case Layout.SEPARATE, _ if batch.blocks is None:
                return {"attention_mask": (batch.segments != _PADDING).long()}  # (R, T)
            case Layout.PACKED, group_attention.ATTENTION:
                assert batch.packing is not None
                packing = batch.packing.prepared(
                    dtype, config.num_attention_heads // config.num_key_value_heads, window
                )
                return {"attention_mask": group_attention.unused_mask(batch.mask.device), "group_layout": packing}
            case Layout.ROWS | Layout.SEPARATE, group_attention.ATTENTION | "sdpa" | "eager":
                positions = batch.position_ids[0]
                mask = group_attention.mask_argument(
                    language_model, window, batch.segments, batch.blocks, positions, dtype
                )
                return {"attention_mask": mask}
        raise ValueError(
            f"model.attention is {config._attn_implementation}, which cannot mask the completions of a group from "
            "each other: set it to sdpa."
        )

    def _score(
        self, hidden: Tensor, targets: Tensor, temperature: float, entropy: EntropyUse
    ) -> tuple[Tensor, Tensor]:
        """Run :func:`token_statistics` in chunks, so that a large vocabulary's logits never exist all at once."""
        size = max(1, LOGITS_PER_CHUNK // causal_model(self.model).lm_head.out_features)
        head = partial(family_of(self.model).logits, self.model)
        if len(targets) <= size:
            return token_statistics(head, hidden, targets, temperature, entropy)
        parts = [
            checkpoint(token_statistics, head, *chunk, temperature, entropy, use_reentrant=False)
            for chunk in zip(hidden.split(size), targets.split(size))
        ]
        logps, entropies = zip(*parts)
        return torch.cat(logps), torch.cat(entropies)
