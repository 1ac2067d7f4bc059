"""Requests that arrive one by one, answered by transformers' own ``generate``, for models without the fast path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from medvqa_rl.models.families.generic import as_generic
from medvqa_rl.models.families.parts import causal_model
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import DIVERGED
from medvqa_rl.rollout.online import OnlineEngine
from medvqa_rl.rollout.sampling import pick_greedy, pick_tokens
from medvqa_rl.rollout.stock.generate import generating, padded_inputs


def make_online_engine(policy: Policy, *, max_sequences: int, max_length: int) -> OnlineEngine:
    """The engine for a policy's family."""
    kind = OnlineEngine if isinstance(policy.family, SharedFamily) else GenerateOnline
    return kind(policy, max_sequences=max_sequences, max_length=max_length)


class GenerateOnline(OnlineEngine):
    """Answers the requests that wait together; what comes meanwhile waits until the last of them ends."""

    def _step(self) -> None:
        """Answer some of the requests that wait."""
        new = self._next(self.max_sequences)
        if not new:
            return
        family, device = as_generic(self._policy.family), self._policy.device
        count = family.alike([request.prompt for request in new])[0]
        self._waiting.extendleft(reversed(new[count:]))
        new = new[:count]
        sequences = [sequence for number in self._start(new) for sequence in self._running[number]]
        prompts = [sequence.request.prompt for sequence in sequences]
        uniforms = torch.from_numpy(np.concatenate([self._uniforms(request) for request in new])).to(device)
        picker, rows = self._picker(sequences), torch.arange(len(sequences), device=device)

        def pick(scores: torch.Tensor) -> torch.Tensor:
            if not bool(scores.sum(dim=-1).isfinite().all()):
                raise FloatingPointError(DIVERGED)
            if picker.sampling is None:
                picked, _ = pick_greedy(scores, suppressed=picker.suppressed)
            else:
                steps = torch.tensor([len(sequence.tokens) for sequence in sequences], device=device)
                given = uniforms[rows, steps.clamp(max=uniforms.shape[1] - 1)]
                picked = pick_tokens(scores, given, suppressed=picker.suppressed, **picker.sampling._asdict())
            self._take(sequences, scores, picked)
            return picked

        def done() -> torch.Tensor:
            self._cancel()
            if is_closed := not self._receive():
                self.close()  # for the loop that calls this
            return torch.tensor([is_closed or sequence.is_done for sequence in sequences], device=device)

        ids, mask, inputs = padded_inputs(self._policy, prompts)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(request.max_length for request in new),
            do_sample=False,
            pad_token_id=self._policy.processor.pad_id,
        )
        model = causal_model(self._policy.model)
        with generating(model, settings):
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=[_Pick(pick)],
                stopping_criteria=[_Done(done)],
                synced_gpus=False,
                **inputs,
            )
        if all(sequence.is_done for sequence in sequences):  # else the engine was closed
            self._running.clear()


class _Pick(LogitsProcessor):
    """Leaves one token possible: the one that is picked."""

    def __init__(self, pick: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._pick = pick

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -torch.inf).scatter_(1, self._pick(scores)[:, None], 0.0)


class _Done(StoppingCriteria):
    """Ends rows."""

    def __init__(self, done: Callable[[], torch.Tensor]) -> None:
        self._done = done

    def __call__(self, input_ids: Any, scores: Any, **given: Any) -> Any:
        return self._done()
