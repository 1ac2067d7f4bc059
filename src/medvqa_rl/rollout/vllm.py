"""Rollouts on vLLM: completions are sampled by another engine, from the weights as they are at each step.

**Not yet run on a GPU.** vLLM needs one; what is here was written against the signatures of vLLM 0.32 and 0.33 and is
tested with a stand-in that has them (tests/fakes/vllm). docs/vllm.md says what to look at in a first run.

vLLM computes with its own kernels, so its probabilities differ a little from those that training computes: what it
sampled each token with is kept (``Completion.logps``) and corrected for (:mod:`mismatch`).
Randomness is not addressed token by token as in :mod:`medvqa_rl.rollout.decode`: a prompt's completions share a seed
with an address, and what vLLM makes of it depends on its batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.randomness import address
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.models.loading import ADAPTER_FILE, Policy
from medvqa_rl.models.qwen_vl import causal_model, image_features
from medvqa_rl.rollout.decode import evaluating
from medvqa_rl.rollout.sampling import Stream

NEVER = -1e9
"""Added to the logits of suppressed tokens: their probability is exactly 0 in float32. JSON knows no infinity."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM can make room for."""


class VllmError(RuntimeError):
    """vLLM did not do what it was asked for. The weights that are trained are sound."""


class Request(NamedTuple):
    """A prompt to complete."""

    sample: Sample
    prompt: EncodedPrompt
    features: Tensor | None
    """(image tokens, hidden) of its images, where the source takes them."""
    params: Mapping[str, Any]
    """Fields of vLLM's ``SamplingParams``."""


class Sampled(NamedTuple):
    """A completion as vLLM gives it."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Of each token as it was sampled: after suppression, temperature, top-k and top-p; NaN where unknown."""
    finish_reason: str | None


class Answer(NamedTuple):
    """What vLLM made of a request."""

    prompt_ids: Sequence[int]
    """The prompt as it read it, image placeholders expanded."""
    completions: Sequence[Sampled]


class Source(Protocol):
    """A vLLM engine, wherever it runs."""

    takes_features: bool
    """Images go there as the features that the policy's own tower makes of them."""

    def load(self, policy: Policy) -> None:
        """Take over the weights and forget all that was computed with others; all ranks call this together."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    def rest(self) -> None:
        """Nothing is asked for until the next :meth:`load`."""
        ...


class VllmEngine:
    """Samples groups of completions for training, as :class:`medvqa_rl.rollout.decode.RolloutEngine` does.

    Evaluations are not its business: they are answered by the plain engine, so that their numbers are those of
    ``medvqa-rl eval``.
    """

    def __init__(self, policy: Policy, source: Source) -> None:
        """
        Args:
            policy: is trained between calls.
            source: where completions come from.
        """
        self._policy, self._source = policy, source
        processor = policy.processor
        surplus = range(len(processor.tokenizer), causal_model(policy.model).lm_head.out_features)
        self._logit_bias = dict.fromkeys(sorted({*processor.suppressed_ids, *surplus}), NEVER)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """For the time of the block vLLM has the weights that the policy has now; all ranks enter it together.

        Raises:
            VllmError: it did not take them.
        """
        self._source.load(self._policy)
        yield
        self._source.rest()

    def rollout(
        self,
        samples: Sequence[Sample],
        config: RolloutConfig,
        *,
        seed: int,
        stream: Stream,
        step: int,
        occurrences: Sequence[int],
        prompts: Sequence[EncodedPrompt],
    ) -> list[Group]:
        """Sample G completions for each sample, with the weights of :meth:`fresh`.

        Args:
            samples: the prompts.
            config: how to sample.
            seed: of the run.
            stream: what the numbers are for.
            step: of the run.
            occurrences: per sample, tells apart the times that it occurs in the step.
            prompts: the samples' prompts as from :meth:`RolloutEngine.encode`.

        Raises:
            VllmError: vLLM fails, reads a prompt otherwise than training does, or ends a completion for a reason of
                its own.
        """
        features = self._features(prompts, config.max_batch)
        requests = [
            Request(sample, prompt, feature, self._params(config, (seed, stream, step, sample.id, occurrence)))
            for sample, prompt, feature, occurrence in zip(samples, prompts, features, occurrences, strict=True)
        ]
        answers = self._source.generate(requests)
        return [self._group(*pair, config.num_generations) for pair in zip(requests, answers, strict=True)]

    def _features(self, prompts: Sequence[EncodedPrompt], at_a_time: int) -> list[Tensor | None]:
        """The images of every prompt, encoded once for vLLM and, where the tower is frozen, for the update."""
        if not (self._source.takes_features or self._policy.vision_is_frozen):
            return [None] * len(prompts)
        model, found = self._policy.model, []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(prompts), at_a_time):
                found += image_features(model, prompts[start : start + at_a_time], self._policy.device)
        return found

    def _params(self, config: RolloutConfig, place: tuple[int | str, ...]) -> dict[str, Any]:
        """How to sample one prompt. Stop tokens are named, because vLLM reads others from the model's files."""
        return {
            "n": config.num_generations,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "max_tokens": config.max_completion_length,
            # vLLM adds the completion's index to it, in 64 bits with a sign.
            "seed": address(*place) >> 2,
            "stop_token_ids": list(self._policy.processor.stop_ids),
            "ignore_eos": True,
            "logit_bias": self._logit_bias,
            "logprobs": 0,  # of the token that was sampled alone
            "detokenize": False,
        }

    def _group(self, request: Request, answer: Answer, num_generations: int) -> Group:
        """A prompt with its completions."""
        sample, prompt = request.sample, request.prompt
        if list(answer.prompt_ids) != prompt.input_ids.tolist():
            raise VllmError(
                f"vLLM read the prompt of sample {sample.id!r} as {len(answer.prompt_ids)} tokens and training as "
                f"{len(prompt.input_ids)}, or as others: have it resize images as training does (a server with "
                "--mm-processor-kwargs as docs/vllm.md has it), and serve the model that is trained."
            )
        if len(answer.completions) != num_generations:
            raise VllmError(
                f"vLLM gave {len(answer.completions)} completions for sample {sample.id!r} where {num_generations} "
                "were asked for."
            )
        return Group(
            sample,
            prompt,
            [self._completion(sample, sampled) for sampled in answer.completions],
            request.features if self._policy.vision_is_frozen else None,
        )

    def _completion(self, sample: Sample, sampled: Sampled) -> Completion:
        if sampled.finish_reason not in ("stop", "length") or not sampled.token_ids:
            raise VllmError(
                f"vLLM ended a completion for sample {sample.id!r} before its end (reason: {sampled.finish_reason}, "
                f"after {len(sampled.token_ids)} tokens)."
            )
        text = self._policy.processor.decode(sampled.token_ids)
        return Completion(sampled.token_ids, text, sampled.finish_reason == "length", sampled.logps)


def collapsed(prompt: EncodedPrompt, image_token_id: int, merge_size: int) -> list[int]:
    """A prompt's tokens with one placeholder per image, which vLLM expands itself.

    Args:
        merge_size: an image of n patches has n / merge_size**2 tokens.
    """
    ids: list[int] = prompt.input_ids.tolist()
    if prompt.image_grid_thw is None:
        return ids
    counts = (prompt.image_grid_thw.prod(axis=-1) // merge_size**2).tolist()
    result: list[int] = []
    token = 0
    while token < len(ids):
        result.append(ids[token])
        token += counts.pop(0) if ids[token] == image_token_id else 1
    assert not counts, "image tokens and image grids do not match"
    return result


def known(logp: float | None) -> float:
    """A log-probability, NaN where vLLM has none: it sends None, NaN, minus infinity, or -9999 in their place."""
    return logp if logp is not None and math.isfinite(logp) and logp > -9999.0 else math.nan


def adapter_rank(policy: Policy) -> int | None:
    """Rank of the adapter that is trained; None where none is."""
    return _adapter_settings(policy).r if policy.is_lora else None


def room_for(rank: int) -> int:
    """The least room for adapters that vLLM can be started with and that holds one of this rank.

    Raises:
        ValueError: the rank is above them all.
    """
    room = next((size for size in LORA_RANKS if size >= rank), None)
    if room is None:
        raise ValueError(
            f"The adapter has rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}: lower model.lora.rank, or set "
            "rollout.engine=eager."
        )
    return room


def trained_alongside(policy: Policy) -> list[str]:
    """Modules outside the language model that are trained whole with an adapter."""
    return list(_adapter_settings(policy).modules_to_save or ()) if policy.is_lora else []


def _adapter_settings(policy: Policy) -> LoraConfig:
    return cast(LoraConfig, cast(PeftModel, policy.model).peft_config["default"])


def write_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter of the language model alone as PEFT does; vLLM refuses modules that are trained whole."""
    model = cast(PeftModel, policy.model)
    state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if ".lora_" in name}
    save_file(own, folder / ADAPTER_FILE, {"format": "pt"})
    settings = copy.copy(_adapter_settings(policy))
    settings.modules_to_save = None
    settings.save_pretrained(str(folder))
