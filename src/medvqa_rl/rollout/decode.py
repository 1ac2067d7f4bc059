"""The rollout engine: prefill each prompt once, and decode all its completions from that prefix.

Batching is continuous: finished sequences leave the batch and waiting prompts take their rows. Prompts are padded on
the right, so the prefill needs no mask beyond causality. Positions are explicit, so attention does not depend on where
in the cache a key is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample, Template
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.prefix.prefill import Prefilled, prefill
from medvqa_rl.rollout.cuda_graph import GraphDecoder, capture_graph
from medvqa_rl.rollout.sampling import Stream, uniform_table
from medvqa_rl.rollout.state import Capacity, DecodeState, Owner
from medvqa_rl.rollout.step import Picker, Sampling, advance, append_tokens

COMPACT_SHARE = 0.25
"""Finished sequences are removed from the batch once they are this share of it."""
DIVERGED = (
    "The model returned logits that are not finite, so no token can be sampled: its weights have diverged. Go back to "
    "an earlier checkpoint and lower the learning rate."
)


class PromptRequest(NamedTuple):
    """A prompt to complete."""

    sample: Sample
    prompt: EncodedPrompt
    occurrence: int


class Generation(NamedTuple):
    """Parameters of one call, the same for all its prompts."""

    num_generations: int
    """G."""
    max_length: int
    """L."""
    max_prompts: int
    """The batch has at most this many times G sequences."""
    more_may_come: bool
    """There may be more prompts than ``max_prompts``."""
    shares_images: bool
    """Prompts about the same images share their prefill."""
    picker: Picker
    uniforms: Callable[[Sequence[PromptRequest]], NDArray[np.float64]] | None
    """Returns the (P * G, L) uniforms of P requests; None decodes greedily."""


@dataclass
class _Running:
    """A prompt whose completions are being decoded."""

    request: PromptRequest
    features: Tensor | None
    """Of its images, if the vision tower is frozen."""
    completions: dict[int, Completion] = field(default_factory=dict)


def suppressed_tokens(policy: Policy) -> Tensor:
    """(n,) tokens that are never picked: control tokens, and the rows of the output layer beyond the tokenizer, which
    pad it to a round size."""
    padding = range(len(policy.processor.tokenizer), causal_model(policy.model).lm_head.weight.shape[0])
    suppressed = sorted({*policy.processor.suppressed_ids, *padding})
    return torch.tensor(suppressed, dtype=torch.long, device=policy.device)


def stop_tokens(policy: Policy) -> Tensor:
    """(n,) tokens that end a completion."""
    return torch.tensor(policy.processor.stop_ids, dtype=torch.long, device=policy.device)


class RolloutEngine:
    """Samples groups of completions from a policy, with its weights at the time of each call."""

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
            template: the prompt template.
            engine: ``rollout.engine``.

        Raises:
            ValueError: CUDA graphs are requested for a model that is not on a GPU.
        """
        self.processor = policy.processor
        self._policy = policy
        self._template = template
        device = torch.device(policy.device)
        if engine == "graph" and device.type != "cuda":
            raise ValueError(
                f"rollout.engine is graph, but the model is on the device {device.type!r}: CUDA graphs need an NVIDIA "
                "GPU; set rollout.engine to eager, or model.device to cuda where there is one."
            )
        self._graphs = GraphDecoder(policy.model, device, capture_graph) if engine == "graph" else None
        self._suppressed, self._stop = suppressed_tokens(policy), stop_tokens(policy)

    def encode(self, sample: Sample, template: Template | None = None) -> EncodedPrompt:
        """Encode a sample's prompt for :meth:`rollout` and :meth:`greedy`; thread-safe.

        Args:
            template: defaults to the engine's.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
        """
        return self.processor.encode(sample, template or self._template)

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

        Each token's random number is addressed by (seed, stream, step, sample id, occurrence, completion index,
        position), so the result does not depend on the other samples, their order or ``max_batch``.

        Args:
            samples: the samples to prompt with.
            config: the sampling settings.
            seed: the run's seed.
            stream: the purpose of the random numbers.
            step: the run's step.
            occurrences: per sample, how often its id came before in this step on any rank; defaults to counting within
                this call.
            prompts: the samples' prompts from :meth:`encode`; by default they are encoded here.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
            FloatingPointError: the model returns logits that are not finite.
        """
        if occurrences is None:
            occurrences = _count_occurrences(samples)
        encoded = zip(self._encoded(samples, prompts), occurrences, strict=True)
        requests = (PromptRequest(sample, prompt, occurrence) for (sample, prompt), occurrence in encoded)

        def uniforms(requests: Sequence[PromptRequest]) -> NDArray[np.float64]:
            return uniform_table(
                seed,
                stream,
                step,
                [request.sample.id for request in requests],
                [request.occurrence for request in requests],
                config.num_generations,
                config.max_completion_length,
            )

        generation = Generation(
            config.num_generations,
            config.max_completion_length,
            config.max_batch,
            len(samples) > config.max_batch,
            stream == "eval",  # the prompts of a training step are independent draws
            Picker(Sampling(config.temperature, config.top_k, config.top_p), self._suppressed, self._stop),
            uniforms,
        )
        with torch.no_grad(), evaluating(self._policy.model):
            return [group for groups in self._complete(requests, generation) for group in groups]

    def greedy(
        self,
        samples: Iterable[Sample],
        *,
        max_completion_length: int,
        batch_size: int,
        prompts: Iterable[EncodedPrompt] | None = None,
    ) -> Iterator[Group]:
        """Decode one completion of each sample greedily; yields groups of one, in order.

        Args:
            prompts: the samples' prompts from :meth:`encode`; by default each is encoded when it joins the batch.

        Raises:
            ValueError: an image cannot be used; the message names the sample.
            FloatingPointError: the model returns logits that are not finite.
        """
        requests = (PromptRequest(sample, prompt, 0) for sample, prompt in self._encoded(samples, prompts))
        picker = Picker(None, self._suppressed, self._stop)
        finished = self._complete(requests, Generation(1, max_completion_length, batch_size, True, True, picker, None))
        while True:
            # Do not leak no_grad into the caller between yields.
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
        """Pairs of sample and prompt."""
        if prompts is not None:
            return zip(samples, prompts, strict=True)
        return ((sample, self.encode(sample)) for sample in samples)

    def _complete(self, requests: Iterable[PromptRequest], generation: Generation) -> Iterator[list[Group]]:
        """Complete all requests with continuous batching; yields groups as they finish, in the requests' order."""
        waiting = iter(requests)
        keeps_features = self._policy.vision_is_frozen
        running: dict[int, _Running] = {}
        num_admitted = num_finished = 0
        state: DecodeState | None = None
        new = list(islice(waiting, generation.max_prompts))
        try:
            while new or running:
                if new:
                    prefilled, features = prefill(
                        self._policy, [request.prompt for request in new], shares_images=generation.shares_images
                    )
                    if state is None:
                        state = self._make_state(generation, len(new), prefilled.keys[0].shape[2])
                    self._admit(state, prefilled, new, num_admitted, generation)
                    for request, feature in zip(new, features):
                        running[num_admitted] = _Running(request, feature if keeps_features else None)
                        num_admitted += 1
                assert state is not None
                is_done = self._decode(state, generation)
                for owner, completion in self._read(state, is_done, running, is_greedy=generation.uniforms is None):
                    running[owner.prompt].completions[owner.completion] = completion
                state.remove(is_done)
                finished = []
                while num_finished in running and len(running[num_finished].completions) == generation.num_generations:
                    finished.append(_group(running.pop(num_finished)))
                    num_finished += 1
                yield finished
                new = list(islice(waiting, min(state.free_rows // generation.num_generations, state.free_slots)))
        finally:
            if state is not None and self._graphs is not None:
                self._graphs.release(state)

    def _make_state(self, generation: Generation, num_prompts: int, prompt_length: int) -> DecodeState:
        """Allocate the batch for its first prompts. If more may come, there are slots for twice as many, because the
        last sequences of earlier prompts share the rows with new ones."""
        rows = num_prompts * generation.num_generations
        slots = min(2 * num_prompts, rows) if generation.more_may_come else num_prompts
        capacity = Capacity(slots, generation.num_generations, rows, prompt_length, generation.max_length)
        if self._graphs is not None:
            return self._graphs.acquire(capacity)
        return DecodeState(self._policy.model, capacity, self._policy.device)

    def _admit(
        self,
        state: DecodeState,
        prefilled: Prefilled,
        new: Sequence[PromptRequest],
        num_admitted: int,
        generation: Generation,
    ) -> None:
        """Add prompts to the batch and pick the first tokens."""
        size = generation.num_generations
        owners = [[Owner(num_admitted + index, number) for number in range(size)] for index in range(len(new))]
        uniforms = None
        if generation.uniforms is not None:
            uniforms = torch.from_numpy(generation.uniforms(new)).to(self._policy.device)
        rows = state.admit(prefilled, owners, uniforms)
        append_tokens(state, rows, prefilled.logits.repeat_interleave(size, dim=0), generation.picker)

    def _decode(self, state: DecodeState, generation: Generation) -> list[bool]:
        """Decode until enough sequences are done for removing them to pay; returns which, by row."""
        while True:
            is_done: list[bool] = state.is_done[: state.num_rows].tolist()
            if all(is_done) or sum(is_done) >= COMPACT_SHARE * len(is_done):
                break
            if self._graphs is not None:
                self._graphs.advance(state, generation.picker)
            else:
                advance(self._policy.model, state, state.shape(), generation.picker)
                state.count_step()
        if not bool(state.is_finite):
            raise FloatingPointError(DIVERGED)
        return is_done

    def _read(
        self, state: DecodeState, is_done: Sequence[bool], running: Mapping[int, _Running], *, is_greedy: bool
    ) -> Iterator[tuple[Owner, Completion]]:
        """The completions of the sequences that are done."""
        rows = [row for row, done in enumerate(is_done) if done]
        index = torch.tensor(rows, device=self._policy.device)
        buffers = (state.tokens, state.token_index, state.is_stopped, state.logps)
        found = (values[index].tolist() for values in buffers)
        owners = state.owners
        for row, tokens, last, is_stopped, logps in zip(rows, *found):
            ids = tuple(tokens[: last + 1])
            text = running[owners[row].prompt].request.prompt.opening + self.processor.decode(ids)
            yield owners[row], Completion(ids, text, not is_stopped, tuple(logps[: last + 1]) if is_greedy else None)


def _group(prompt: _Running) -> Group:
    """The group of a prompt whose completions are all done."""
    completions = [prompt.completions[index] for index in sorted(prompt.completions)]
    return Group(prompt.request.sample, prompt.request.prompt, completions, prompt.features)


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
    """Put the model in evaluation mode for the block."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
