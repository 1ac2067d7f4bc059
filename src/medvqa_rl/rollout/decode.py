"""The rollout engine: encode each image once, prefill each prompt once, fork its cache, decode until all have ended.

Prompts of a batch are padded on the right. Causal attention never looks ahead, so the prefill needs no mask; while
decoding a mask hides the padding, and equal lengths need none at all. Positions are explicit, so where a key lies in
the cache does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from medvqa_rl.config import RolloutConfig
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.qwen_vl import backbone, causal_model, embed_prompts, image_features, pad_prompts
from medvqa_rl.prompts import Template
from medvqa_rl.rollout.sampling import Stream, pick_greedy, pick_tokens, uniform_table
from medvqa_rl.types import Completion, EncodedPrompt, Group, Sample

T = TypeVar("T")
Pick = Callable[[Tensor, Tensor, int], Tensor]
"""Chooses tokens: (logits (b, V), rows (b,) of the rollout that these are, position) -> token ids (b,)."""

COMPACT_SHARE = 0.25
"""Finished rows are dropped when they are this share of the batch: dropping copies the cache."""


class RolloutEngine:
    """Samples groups of completions from a policy as it is at each call."""

    def __init__(self, policy: Policy, template: Template = "think_answer") -> None:
        self._policy = policy
        self._template = template
        # Output layers are often padded to a round size; the surplus rows are no tokens.
        surplus = range(len(policy.processor.tokenizer), causal_model(policy.model).lm_head.weight.shape[0])
        suppressed = sorted({*policy.processor.suppressed_ids, *surplus})
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=policy.device)
        self._stop = torch.tensor(policy.processor.stop_ids, dtype=torch.long, device=policy.device)

    def encode(self, sample: Sample) -> EncodedPrompt:
        """A sample's prompt as :meth:`rollout` and :meth:`greedy` take it; may be called by any thread.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
        """
        return self._policy.processor.encode(sample, self._template)

    def encoding_bytes(self, sample: Sample) -> int:
        """Memory that :meth:`encode` takes at most (:meth:`Processor.encoding_bytes`)."""
        return self._policy.processor.encoding_bytes(sample)

    def rollout(
        self,
        samples: Sequence[Sample],
        config: RolloutConfig,
        *,
        seed: int,
        stream: Stream,
        step: int,
        occurrences: Sequence[int] | None = None,
        prompts: Sequence[EncodedPrompt] | None = None,
    ) -> list[Group]:
        """Sample G completions for each sample.

        Every token's randomness is addressed by (seed, stream, step, sample id, occurrence, completion index,
        position), so the result does not depend on the other samples, their order or ``max_batch``.

        Args:
            samples: the prompts.
            config: how to sample.
            seed: of the run.
            stream: what the numbers are for.
            step: of the run.
            occurrences: per sample, tells apart the times that it occurs in the step, on any rank; None counts them
                in this call.
            prompts: the samples' prompts as from :meth:`encode`; None encodes them here.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
            FloatingPointError: the model gives logits that are not finite.
        """
        numbers = iter(_count_occurrences(samples) if occurrences is None else occurrences)
        groups: list[Group] = []
        for batch in _batches(self._encoded(samples, prompts), config.max_batch):
            table = uniform_table(
                seed,
                stream,
                step,
                [sample.id for sample, _ in batch],
                list(islice(numbers, len(batch))),
                config.num_generations,
                config.max_completion_length,
            )
            u = torch.from_numpy(table).to(self._policy.device)

            def pick(logits: Tensor, rows: Tensor, position: int, u: Tensor = u) -> Tensor:
                return pick_tokens(
                    logits,
                    u[rows, position],
                    temperature=config.temperature,
                    top_k=config.top_k,
                    top_p=config.top_p,
                    suppressed=self._suppressed,
                )

            groups += self._complete(batch, config.num_generations, config.max_completion_length, pick)
        return groups

    def greedy(
        self,
        samples: Iterable[Sample],
        *,
        max_completion_length: int,
        batch_size: int,
        prompts: Iterable[EncodedPrompt] | None = None,
    ) -> Iterator[Group]:
        """The most likely completion of each sample, token by token, in order; groups of one.

        Args:
            prompts: the samples' prompts as from :meth:`encode`; None encodes them here, batch by batch.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
            FloatingPointError: the model gives logits that are not finite.
        """

        def pick(logits: Tensor, rows: Tensor, position: int) -> Tensor:
            return pick_greedy(logits, suppressed=self._suppressed)

        for batch in _batches(self._encoded(samples, prompts), batch_size):
            for group in self._complete(batch, 1, max_completion_length, pick):
                group.image_features = None
                yield group

    def _encoded(
        self, samples: Iterable[Sample], prompts: Iterable[EncodedPrompt] | None
    ) -> Iterator[tuple[Sample, EncodedPrompt]]:
        """Every sample with its prompt."""
        if prompts is not None:
            return zip(samples, prompts, strict=True)
        return ((sample, self.encode(sample)) for sample in samples)

    def _complete(
        self, batch: Sequence[tuple[Sample, EncodedPrompt]], num_generations: int, length: int, pick: Pick
    ) -> list[Group]:
        """Complete the prompts of one batch."""
        processor = self._policy.processor
        prompts = [prompt for _, prompt in batch]
        with torch.no_grad(), _evaluating(self._policy.model):
            features = image_features(self._policy.model, prompts, self._policy.device)
            tokens, lengths, is_stopped = self._decode(prompts, features, num_generations, length, pick)
        completions = [
            Completion(tuple(row[:count]), processor.decode(row[:count]), not stopped)
            for row, count, stopped in zip(tokens.tolist(), lengths.tolist(), is_stopped.tolist())
        ]
        keeps_features = self._policy.vision_is_frozen
        return [
            Group(
                sample,
                prompt,
                completions[index * num_generations : (index + 1) * num_generations],
                features[index] if keeps_features else None,
            )
            for index, (sample, prompt) in enumerate(batch)
        ]

    def _decode(
        self,
        prompts: Sequence[EncodedPrompt],
        features: Sequence[Tensor | None],
        num_generations: int,
        length: int,
        pick: Pick,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prefill, fork and decode.

        Returns:
            (B, length) token ids, (B,) how many of them count, (B,) True where a stop token ended them.
        """
        model, device = self._policy.model, self._policy.device
        language_model: Any = backbone(model).language_model
        lm_head: Any = causal_model(model).lm_head
        pad_id = self._policy.processor.pad_id

        padded = pad_prompts(model, prompts, pad_id=pad_id, device=device, side="right")
        prefilled = DynamicCache()
        hidden = language_model(
            inputs_embeds=embed_prompts(model, padded.input_ids, padded.mask, features),
            position_ids=padded.position_ids,
            past_key_values=prefilled,
            use_cache=True,
        ).last_hidden_state
        prompt_lengths = padded.mask.sum(dim=-1)
        last = hidden[torch.arange(len(prompts), device=device), prompt_lengths - 1]
        logits = lm_head(last).repeat_interleave(num_generations, dim=0)

        width = padded.mask.shape[1]
        cache = Cache(layers=[_ForkedLayer(layer, num_generations, width + length) for layer in prefilled.layers])
        positions = padded.next_positions.repeat_interleave(num_generations)
        mask = None
        if not bool(padded.mask.all()):
            mask = torch.ones(len(prompts), width + length, dtype=torch.bool, device=device)
            mask[:, :width] = padded.mask
            mask = mask.repeat_interleave(num_generations, dim=0)

        count = len(prompts) * num_generations
        tokens = torch.full((count, length), pad_id, dtype=torch.long, device=device)
        lengths = torch.full((count,), length, dtype=torch.long, device=device)
        is_stopped = torch.zeros(count, dtype=torch.bool, device=device)
        rows = torch.arange(count, device=device)  # which rows of the rollout are still in the batch
        is_finite = torch.ones((), dtype=torch.bool, device=device)
        for position in range(length):
            is_finite &= logits.isfinite().all()
            picked = pick(logits, rows, position)
            is_done = is_stopped[rows]
            picked = torch.where(is_done, pad_id, picked)
            tokens[rows, position] = picked
            ends = (picked.unsqueeze(-1) == self._stop).any(dim=-1) & ~is_done
            is_done = is_done | ends
            is_stopped[rows] = is_done
            lengths[rows[ends]] = position + 1
            num_done = int(is_done.sum())
            if num_done == len(rows) or position + 1 == length:
                break
            if num_done >= COMPACT_SHARE * len(rows):
                kept = (~is_done).nonzero().squeeze(-1)
                rows, picked, positions = rows[kept], picked[kept], positions[kept]
                mask = None if mask is None else mask[kept]
                cache.batch_select_indices(kept)
            hidden = language_model(
                inputs_embeds=language_model.embed_tokens(picked).unsqueeze(1),
                position_ids=(positions + position).expand(3, -1).unsqueeze(-1),
                past_key_values=cache,
                attention_mask=None if mask is None else self._attention_mask(mask[:, : width + position + 1]),
                use_cache=True,
            ).last_hidden_state
            logits = lm_head(hidden[:, -1])
        if not bool(is_finite):
            raise FloatingPointError(
                "The model gives logits that are not finite numbers, so nothing can be sampled: its weights have "
                "diverged. Go back to an earlier checkpoint and lower the learning rate."
            )
        return tokens, lengths, is_stopped

    def _attention_mask(self, mask: Tensor) -> Tensor:
        """A (b, keys) mask of one query per row in the form that the model's attention takes untouched."""
        attention = backbone(self._policy.model).language_model.config._attn_implementation
        if attention == "flash_attention_2":
            return mask
        if attention == "sdpa":
            return mask[:, None, None]
        additive = torch.zeros(mask.shape, dtype=causal_model(self._policy.model).dtype, device=mask.device)
        return additive.masked_fill_(~mask, torch.finfo(additive.dtype).min)[:, None, None]


class _ForkedLayer(DynamicLayer):
    """One layer's keys and values with room for the completions: appending a token writes it, copying nothing."""

    def __init__(self, prefilled: Any, repeats: int, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device, self.is_initialized = prefilled.keys.dtype, prefilled.keys.device, True
        self._capacity = capacity
        self._make_room([states.repeat_interleave(repeats, dim=0) for states in (prefilled.keys, prefilled.values)])

    def _make_room(self, filled: Sequence[Tensor]) -> None:
        """New memory that begins with these keys and values, each (b, heads, length, size)."""
        batch, heads, self._length, size = filled[0].shape
        self._rooms = [states.new_empty(batch, heads, self._capacity, size) for states in filled]
        for room, states in zip(self._rooms, filled):
            room[:, :, : self._length] = states
        self.keys, self.values = self._filled()

    def _filled(self) -> list[Tensor]:
        return [room[:, :, : self._length] for room in self._rooms]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (b, heads, new, size) and return all there are."""
        start, self._length = self._length, self._length + key_states.shape[-2]
        assert self._length <= self._capacity, "the cache has no room for another token"
        for room, states in zip(self._rooms, (key_states, value_states)):
            room[:, :, start : self._length] = states
        keys, values = self._filled()
        self.keys, self.values = keys, values
        return keys, values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at these indices."""
        self._make_room([states.index_select(0, indices) for states in self._filled()])


def _count_occurrences(samples: Iterable[Sample]) -> list[int]:
    """How often each sample's id has come before it."""
    seen: Counter[str] = Counter()
    counts = []
    for sample in samples:
        counts.append(seen[sample.id])
        seen[sample.id] += 1
    return counts


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive batches of at most this size."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block."""
    is_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)
