"""The rollout engine: encode each image once, prefill each prompt once, decode all its completions from that one copy.

Completions that have ended leave the batch, and prompts that wait take their place. Prompts are padded on the right:
causal attention never looks ahead, so the prefill needs no mask. Positions are explicit, so where a key lies in the
cache does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache

from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample, Template
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.qwen_vl import backbone, causal_model, embed_prompts, image_features, pad_prompts
from medvqa_rl.rollout.cuda_graph import GraphDecoder, capture_graph
from medvqa_rl.rollout.sampling import Stream, uniform_table
from medvqa_rl.rollout.state import DecodeState, Prefilled, Room
from medvqa_rl.rollout.step import Picker, Sampling, advance, take

COMPACT_SHARE = 0.25
"""Finished rows are dropped, and their places given to waiting prompts, when they are this share of the batch."""


class _Request(NamedTuple):
    """A prompt that waits."""

    sample: Sample
    prompt: EncodedPrompt
    occurrence: int


class _Work(NamedTuple):
    """What is to be done with every prompt."""

    num_generations: int
    length: int
    max_prompts: int
    """The batch holds this many times ``num_generations`` completions."""
    more_may_come: bool
    """There may be more prompts than that."""
    picker: Picker
    uniforms: Callable[[Sequence[_Request]], NDArray[np.float64]] | None
    """The (P * G, L) uniforms of some prompts."""


@dataclass
class _Begun:
    """A prompt whose completions are being written."""

    request: _Request
    features: Tensor | None
    completions: dict[int, Completion] = field(default_factory=dict)


class RolloutEngine:
    """Samples groups of completions from a policy as it is at each call."""

    def __init__(
        self,
        policy: Policy,
        template: Template = "think_answer",
        *,
        engine: Literal["eager", "graph"] = "eager",
    ) -> None:
        """
        Args:
            policy: may be trained between calls.
            template: how questions are asked.
            engine: as ``rollout.engine``.

        Raises:
            ValueError: CUDA graphs are asked for and the model is not on a GPU.
        """
        self._policy = policy
        self._template = template
        device = torch.device(policy.device)
        if engine == "graph" and device.type != "cuda":
            raise ValueError(
                f"rollout.engine is graph, but the model is on the device {device.type!r}: CUDA graphs need an NVIDIA "
                "GPU; set rollout.engine to eager, or model.device to cuda where there is one."
            )
        self._graphs = GraphDecoder(policy.model, device, capture_graph) if engine == "graph" else None
        # Output layers are often padded to a round size; the surplus rows are no tokens.
        surplus = range(len(policy.processor.tokenizer), causal_model(policy.model).lm_head.weight.shape[0])
        suppressed = sorted({*policy.processor.suppressed_ids, *surplus})
        self._suppressed = torch.tensor(suppressed, dtype=torch.long, device=policy.device)
        self._stop = torch.tensor(policy.processor.stop_ids, dtype=torch.long, device=policy.device)

    def encode(self, sample: Sample, template: Template | None = None) -> EncodedPrompt:
        """A sample's prompt as :meth:`rollout` and :meth:`greedy` take it; may be called by any thread.

        Args:
            template: how to ask; None asks as the engine does.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
        """
        return self._policy.processor.encode(sample, template or self._template)

    def encoding_bytes(self, sample: Sample) -> int:
        """Memory that :meth:`encode` takes at most (:meth:`Processor.encoding_bytes`)."""
        return self._policy.processor.encoding_bytes(sample)

    def expected_tokens(self, sample: Sample) -> float:
        """Tokens of a sample's prompt, roughly (:meth:`Processor.expected_tokens`)."""
        return self._policy.processor.expected_tokens(sample)

    def count_tokens(self, text: str) -> int:
        """Tokens that the policy's tokenizer makes of a text."""
        return self._policy.processor.count_tokens(text)

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
        numbers = _count_occurrences(samples) if occurrences is None else occurrences
        encoded = zip(self._encoded(samples, prompts), numbers, strict=True)
        requests = (_Request(*pair, number) for pair, number in encoded)

        def uniforms(of: Sequence[_Request]) -> NDArray[np.float64]:
            ids, occurrences = [request.sample.id for request in of], [request.occurrence for request in of]
            return uniform_table(
                seed, stream, step, ids, occurrences, config.num_generations, config.max_completion_length
            )

        work = _Work(
            config.num_generations,
            config.max_completion_length,
            config.max_batch,
            len(samples) > config.max_batch,
            Picker(Sampling(config.temperature, config.top_k, config.top_p), self._suppressed, self._stop),
            uniforms,
        )
        with torch.no_grad(), evaluating(self._policy.model):
            return [group for groups in self._complete(requests, work) for group in groups]

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
            prompts: the samples' prompts as from :meth:`encode`; None encodes each when its turn comes.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
            FloatingPointError: the model gives logits that are not finite.
        """
        requests = (_Request(*pair, 0) for pair in self._encoded(samples, prompts))
        work = _Work(1, max_completion_length, batch_size, True, Picker(None, self._suppressed, self._stop), None)
        finished = self._complete(requests, work)
        while True:
            # The caller of a generator is not to find itself without gradients.
            with torch.no_grad(), evaluating(self._policy.model):
                groups = next(finished, None)
            if groups is None:
                return
            for group in groups:
                group.image_features = None
                yield group

    def _encoded(
        self, samples: Iterable[Sample], prompts: Iterable[EncodedPrompt] | None
    ) -> Iterator[tuple[Sample, EncodedPrompt]]:
        """Every sample with its prompt."""
        if prompts is not None:
            return zip(samples, prompts, strict=True)
        return ((sample, self.encode(sample)) for sample in samples)

    def _complete(self, requests: Iterable[_Request], work: _Work) -> Iterator[list[Group]]:
        """Complete prompts as there is room for them; groups come in the order of the requests, some at a time."""
        waiting = iter(requests)
        begun: dict[int, _Begun] = {}
        num_begun = num_given = 0
        state: DecodeState | None = None
        new = list(islice(waiting, work.max_prompts))
        try:
            while new or begun:
                if new:
                    prefilled, features = self._prefill([request.prompt for request in new])
                    if state is None:
                        state = self._make_state(work, len(new), prefilled.keys[0].shape[2])
                    self._admit(state, prefilled, new, num_begun, work)
                    begun |= {num_begun + index: _Begun(*pair) for index, pair in enumerate(zip(new, features))}
                    num_begun += len(new)
                assert state is not None
                done = self._advance(state, work)
                for owner, completion in self._read(state, done):
                    begun[owner // work.num_generations].completions[owner % work.num_generations] = completion
                state.remove(done)
                finished = []
                while num_given in begun and len(begun[num_given].completions) == work.num_generations:
                    finished.append(self._group(begun.pop(num_given), work.num_generations))
                    num_given += 1
                yield finished
                free_rows, free_slots = state.room
                new = list(islice(waiting, min(free_rows // work.num_generations, free_slots)))
        finally:
            if state is not None and self._graphs is not None:
                self._graphs.give_back(state)

    def _prefill(self, prompts: Sequence[EncodedPrompt]) -> tuple[Prefilled, list[Tensor | None]]:
        """Read prompts, padded on the right; their image features are given too."""
        model, device = self._policy.model, self._policy.device
        features = image_features(model, prompts, device)
        padded = pad_prompts(model, prompts, pad_id=self._policy.processor.pad_id, device=device, side="right")
        cache = DynamicCache()
        language_model: Any = backbone(model).language_model
        hidden = language_model(
            inputs_embeds=embed_prompts(model, padded.input_ids, padded.mask, features),
            position_ids=padded.position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        last = hidden[torch.arange(len(prompts), device=device), padded.mask.sum(dim=-1) - 1]
        layers: Any = cache.layers
        prefilled = Prefilled(
            keys=[layer.keys for layer in layers],
            values=[layer.values for layer in layers],
            logits=causal_model(model).lm_head(last),
            lengths=[len(prompt.input_ids) for prompt in prompts],
            next_positions=padded.next_positions,
        )
        return prefilled, features

    def _make_state(self, work: _Work, num_prompts: int, width: int) -> DecodeState:
        """Room for a first batch of so many prompts; where more wait, stragglers of twice as many share the rows."""
        rows = num_prompts * work.num_generations
        slots = min(2 * num_prompts, rows) if work.more_may_come else num_prompts
        room = Room(slots, work.num_generations, rows, width, work.length)
        if self._graphs is not None:
            return self._graphs.borrow(room)
        return DecodeState(self._policy.model, room, self._policy.device)

    def _admit(
        self, state: DecodeState, prefilled: Prefilled, new: Sequence[_Request], number: int, work: _Work
    ) -> None:
        """Give prompts their rows and pick the first tokens."""
        size, device = work.num_generations, self._policy.device
        owners = [range((number + index) * size, (number + index + 1) * size) for index in range(len(new))]
        u = None if work.uniforms is None else torch.from_numpy(work.uniforms(new)).to(device)
        rows = state.admit(prefilled, owners, u)
        take(state, rows, prefilled.logits.repeat_interleave(size, dim=0), work.picker)

    def _advance(self, state: DecodeState, work: _Work) -> list[bool]:
        """Decode until so many rows are done that dropping them pays; which ones, by row."""
        while True:
            done: list[bool] = state.is_done[: state.num_rows].tolist()
            if all(done) or sum(done) >= COMPACT_SHARE * len(done):
                break
            if self._graphs is not None:
                self._graphs.advance(state, work.picker)
            else:
                advance(self._policy.model, state, state.shape(), work.picker)
                state.tick()
        if not bool(state.is_finite):
            raise FloatingPointError(
                "The model gives logits that are not finite numbers, so nothing can be sampled: its weights have "
                "diverged. Go back to an earlier checkpoint and lower the learning rate."
            )
        return done

    def _read(self, state: DecodeState, done: Sequence[bool]) -> Iterator[tuple[int, Completion]]:
        """The completions of the rows that are done, with their owners."""
        rows = [row for row, is_done in enumerate(done) if is_done]
        index = torch.tensor(rows, device=self._policy.device)
        found = (values[index].tolist() for values in (state.tokens, state.step, state.is_stopped))
        for row, tokens, last, is_stopped in zip(rows, *found):
            ids = tuple(tokens[: last + 1])
            yield state.owners[row], Completion(ids, self._policy.processor.decode(ids), not is_stopped)

    def _group(self, begun: _Begun, num_generations: int) -> Group:
        """A prompt all of whose completions are there."""
        return Group(
            begun.request.sample,
            begun.request.prompt,
            [begun.completions[index] for index in range(num_generations)],
            begun.features if self._policy.vision_is_frozen else None,
        )


def _count_occurrences(samples: Iterable[Sample]) -> list[int]:
    """How often each sample's id has come before it."""
    seen: Counter[str] = Counter()
    counts = []
    for sample in samples:
        counts.append(seen[sample.id])
        seen[sample.id] += 1
    return counts


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block."""
    is_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(is_training)
