"""Rollouts by transformers' own ``generate``, for models without the fast path, and the choice between the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Template
from medvqa_rl.models.families.generic import as_generic
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import DIVERGED, Generation, PromptRequest, RolloutEngine
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens
from medvqa_rl.rollout.step import Picker


def make_engine(
    policy: Policy, template: Template = "think_answer", *, engine: Literal["eager", "graph"] = "eager"
) -> RolloutEngine:
    """The rollout engine for a policy's family.

    Raises:
        ValueError: CUDA graphs are requested for a model that has no fast path, or that is not on a GPU.
    """
    if isinstance(policy.family, SharedFamily):
        return RolloutEngine(policy, template, engine=engine)
    if engine == "graph":
        raise ValueError(
            f"rollout.engine is graph, but {policy.family.title} has no fast path that graphs could be made of: set "
            "rollout.engine to eager."
        )
    return GenerateEngine(policy, template)


class GenerateEngine(RolloutEngine):
    """Computes every completion with its prompt; tokens are picked as in :class:`RolloutEngine`."""

    def _complete(self, requests: Iterable[PromptRequest], generation: Generation) -> Iterator[list[Group]]:
        waiting = iter(requests)
        while batch := list(islice(waiting, generation.max_prompts)):
            first = 0
            for count in as_generic(self._policy.family).alike([request.prompt for request in batch]):
                yield self._generate(batch[first : first + count], generation)
                first += count

    def _generate(self, requests: Sequence[PromptRequest], generation: Generation) -> list[Group]:
        """The groups of prompts that can share a batch, padded on the left."""
        model, device = causal_model(self._policy.model), self._policy.device
        size = generation.num_generations
        prompts = [request.prompt for request in requests for _ in range(size)]
        ids, mask, inputs = padded_inputs(self._policy, prompts)
        width = ids.shape[1]
        uniforms = None
        if generation.uniforms is not None:
            uniforms = torch.from_numpy(generation.uniforms(requests)).to(device)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=generation.max_length,
            do_sample=False,
            eos_token_id=list(self.processor.stop_ids),
            pad_token_id=self.processor.pad_id,
        )
        pick = _Pick(generation.picker, uniforms, width)
        with generating(model, settings):
            output = model.generate(
                input_ids=ids, attention_mask=mask, logits_processor=[pick], synced_gpus=False, **inputs
            )
        logps = torch.stack(pick.logps, dim=1).tolist() if pick.logps else [None] * len(output)
        completions = [self._completion(*row) for row in zip(output[:, width:].tolist(), logps, strict=True)]
        return [
            Group(request.sample, request.prompt, completions[index * size : (index + 1) * size])
            for index, request in enumerate(requests)
        ]

    def _completion(self, tokens: Sequence[int], logps: Sequence[float] | None) -> Completion:
        """A completion up to its first stop token; padding follows it."""
        stops = [index for index, token in enumerate(tokens) if token in self.processor.stop_ids]
        ids = tuple(tokens[: stops[0] + 1] if stops else tokens)
        known = None if logps is None else tuple(logps[: len(ids)])
        return Completion(ids, self.processor.decode(ids), not stops, known)


def padded_inputs(policy: Policy, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(R, T) token ids, (R, T) attention mask, and the images of rows that can share a batch, padded on the left.

    Args:
        prompts: of each row.
    """
    width = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), policy.processor.pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.input_ids) :] = torch.from_numpy(prompt.input_ids)
    lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
    mask = torch.arange(width) >= width - lengths[:, None]
    inputs = as_generic(policy.family).stock_inputs(causal_model(policy.model), prompts, width, is_left=True)
    return ids.to(policy.device), mask.long().to(policy.device), inputs


class _Pick(LogitsProcessor):
    """Leaves one token possible: the one that the next uniform picks."""

    def __init__(self, picker: Picker, uniforms: Tensor | None, width: int) -> None:
        """
        Args:
            uniforms: (rows, L); None decodes greedily.
            width: tokens of the padded prompts.
        """
        self._picker, self._uniforms, self._width = picker, uniforms, width
        self.logps: list[Tensor] = []
        """(rows,) of every step, where tokens are picked greedily."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not bool(scores.sum(dim=-1).isfinite().all()):
            raise FloatingPointError(DIVERGED)
        picker = self._picker
        if picker.sampling is None or self._uniforms is None:
            picked, logps = pick_greedy(scores, suppressed=picker.suppressed)
            self.logps.append(logps)
        else:
            uniforms = self._uniforms[:, input_ids.shape[1] - self._width]
            picked = pick_tokens(scores, uniforms, suppressed=picker.suppressed, **picker.sampling._asdict())
        return torch.full_like(scores, -torch.inf).scatter_(1, picked[:, None], 0.0)


@contextmanager
def generating(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace a checkpoint's own settings of generation, such as a penalty of repetition, for the block."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
