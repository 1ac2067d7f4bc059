"""Rollouts on vLLM, with the policy's weights at each step.

**Not yet run on a GPU.** The code is tested against vLLM 0.32 on a CPU (tests/engines), and with a stand-in that has
its signatures (tests/fakes/vllm). docs/vllm.md lists what to check in a first run.

vLLM's kernels round differently, so its probabilities differ slightly from those that training computes. The
log-probability that each token was sampled with is kept (``Completion.logps``) and corrected for
(:mod:`medvqa_rl.learning.objective.mismatch`). Random numbers are not addressed per token as in
:mod:`medvqa_rl.rollout.decode`: the completions of a prompt share an addressed seed, and what vLLM draws from it
depends on its batching.
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
from medvqa_rl.core.files import writing
from medvqa_rl.core.packages import TESTED, is_too_old, was_tested
from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.models.adapters import ADAPTER_FILE
from medvqa_rl.models.families.shared import as_shared
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.rollout.decode import evaluating
from medvqa_rl.rollout.sampling import Stream
from medvqa_rl.rollout.vllm.agreement import VllmError, check_agreement, never_sampled

NEVER = -1e9
"""Added to the logits of suppressed tokens, whose probability becomes exactly 0 in float32. JSON has no infinity."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for ``max_lora_rank``."""


class Request(NamedTuple):
    """A prompt to complete."""

    sample: Sample
    prompt: EncodedPrompt
    features: Tensor | None
    """(image tokens, hidden) of its images, if the source takes features."""
    params: Mapping[str, Any]
    """Fields of vLLM's ``SamplingParams``."""


class Sampled(NamedTuple):
    """A completion returned by vLLM."""

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    """Per token, after suppression, temperature, top-k and top-p; NaN if unknown."""
    finish_reason: str | None


class Answer(NamedTuple):
    """The result of a request."""

    prompt_ids: Sequence[int]
    """The prompt as vLLM read it, with image placeholders expanded."""
    completions: Sequence[Sampled]


class Source(Protocol):
    """A vLLM engine: :class:`Colocated` or :class:`Server`."""

    takes_features: bool
    """Images are passed as features of the policy's own vision tower, not as files."""

    def load(self, policy: Policy) -> None:
        """Update the weights and clear all caches; called on all ranks together."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Answer]: ...

    def rest(self) -> None:
        """Called when no requests follow until the next :meth:`load`."""
        ...


class VllmEngine:
    """Samples groups of completions for training.

    Evaluations use :class:`medvqa_rl.rollout.decode.RolloutEngine`, so that they equal ``medvqa-rl eval``.
    """

    def __init__(self, policy: Policy, source: Source) -> None:
        """
        Args:
            policy: trained between calls.
            source: the engine to send requests to.
        """
        self._policy, self._source = policy, source
        self._logit_bias = dict.fromkeys(never_sampled(policy), NEVER)
        self._agrees = False

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Give vLLM the policy's current weights for the block; entered on all ranks together.

        Raises:
            VllmError: vLLM could not load them.
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
        """Sample G completions for each sample, inside :meth:`fresh`.

        Args:
            samples: the samples to prompt with.
            config: the sampling settings.
            seed: the run's seed.
            stream: the purpose of the random numbers.
            step: the run's step.
            occurrences: per sample, how often its id came before in this step.
            prompts: the samples' prompts from :meth:`RolloutEngine.encode`.

        Raises:
            VllmError: vLLM fails, reads a prompt differently from training, ends a completion early, or in the first
                call reports other log-probabilities than the policy computes.
        """
        features = self._features(prompts, config.max_batch)
        requests = [
            Request(sample, prompt, feature, self._params(config, (seed, stream, step, sample.id, occurrence)))
            for sample, prompt, feature, occurrence in zip(samples, prompts, features, occurrences, strict=True)
        ]
        answers = self._source.generate(requests)
        groups = [self._group(*pair, config.num_generations) for pair in zip(requests, answers, strict=True)]
        if not self._agrees:
            check_agreement(self._policy, groups[:1], config)
            self._agrees = True
        return groups

    def _features(self, prompts: Sequence[EncodedPrompt], batch_size: int) -> list[Tensor | None]:
        """Encode the images of all prompts, for vLLM and, if the vision tower is frozen, for the update."""
        if not (self._source.takes_features or self._policy.vision_is_frozen):
            return [None] * len(prompts)
        model, found = self._policy.model, []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                found += as_shared(self._policy.family).image_features(model, batch, self._policy.device)
        return found

    def _params(self, config: RolloutConfig, parts: tuple[int | str, ...]) -> dict[str, Any]:
        """Sampling parameters of a prompt. They list the stop tokens, or vLLM would use those in the model's files."""
        return {
            "n": config.num_generations,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "max_tokens": config.max_completion_length,
            # vLLM adds the completion's index to it, in signed 64-bit integers.
            "seed": address(*parts) >> 2,
            "stop_token_ids": list(self._policy.processor.stop_ids),
            "ignore_eos": True,
            "logit_bias": self._logit_bias,
            "logprobs": 0,  # of the sampled token only
            "detokenize": False,
        }

    def _group(self, request: Request, answer: Answer, num_generations: int) -> Group:
        """Check a result and turn it into a group."""
        sample, prompt = request.sample, request.prompt
        if list(answer.prompt_ids) != prompt.input_ids.tolist():
            raise VllmError(
                f"vLLM read the prompt of sample {shown(sample.id)} as {len(answer.prompt_ids)} tokens, but "
                "training reads "
                f"other tokens ({len(prompt.input_ids)}): serve the model that is trained, and resize images as "
                "training does (for a server, --mm-processor-kwargs as in docs/vllm.md)."
            )
        if len(answer.completions) != num_generations:
            raise VllmError(
                f"vLLM returned {len(answer.completions)} completions for sample {shown(sample.id)} instead of "
                f"{num_generations}."
            )
        return Group(
            sample,
            prompt,
            [self._completion(sample, prompt, sampled) for sampled in answer.completions],
            request.features if self._policy.vision_is_frozen else None,
        )

    def _completion(self, sample: Sample, prompt: EncodedPrompt, sampled: Sampled) -> Completion:
        if sampled.finish_reason not in ("stop", "length") or not sampled.token_ids:
            raise VllmError(
                f"vLLM ended a completion for sample {shown(sample.id)} early, after {len(sampled.token_ids)} tokens "
                f"(reason: {sampled.finish_reason})."
            )
        text = prompt.opening + self._policy.processor.decode(sampled.token_ids)
        return Completion(sampled.token_ids, text, sampled.finish_reason == "length", sampled.logps)


def collapsed(prompt: EncodedPrompt, processor: Processor) -> list[int]:
    """A prompt's tokens with one placeholder per image, which vLLM expands."""
    ids: list[int] = prompt.input_ids.tolist()
    counts = as_shared(processor.family).image_lengths(prompt, processor.readers)
    result: list[int] = []
    token = 0
    while token < len(ids):
        result.append(ids[token])
        token += counts.pop(0) if ids[token] == processor.image_token_id else 1
    assert not counts, "image tokens and images do not match"
    return result


def check_version(version: str | None) -> str | None:
    """Check a release of vLLM.

    Args:
        version: None if unknown.

    Returns:
        A warning if it was not tested.

    Raises:
        ValueError: it is too old.
    """
    tested = TESTED["vllm"]
    if version is not None and is_too_old("vllm", version):
        raise ValueError(
            f"vLLM {version} is too old: run `pip install 'vllm=={tested.newest}.*'`, which was tested, or set "
            "rollout.engine=eager."
        )
    if version is not None and was_tested("vllm", version):
        return None
    return (
        f"Warning: rollouts were tested with vLLM {tested}, not with {version or 'this version'}: run with --dry-run "
        "first, which compares its log-probabilities and hands weights over."
    )


def known(logp: float | None) -> float:
    """A log-probability, or NaN if vLLM has none (it returns None, NaN, minus infinity or -9999)."""
    return logp if logp is not None and math.isfinite(logp) and logp > -9999.0 else math.nan


def adapter_rank(policy: Policy) -> int | None:
    """Rank of the trained adapter; None without LoRA."""
    return _adapter_settings(policy).r if policy.is_lora else None


def max_lora_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` that vLLM accepts for an adapter of this rank.

    Raises:
        ValueError: the rank is too large for vLLM.
    """
    accepted = next((size for size in LORA_RANKS if size >= rank), None)
    if accepted is None:
        raise ValueError(
            f"The adapter has rank {rank}, but vLLM takes at most {LORA_RANKS[-1]}: lower model.lora.rank, or set "
            "rollout.engine=eager."
        )
    return accepted


def trained_alongside(policy: Policy) -> list[str]:
    """Modules outside the language model that are fully trained with an adapter."""
    return list(_adapter_settings(policy).modules_to_save or ()) if policy.is_lora else []


def _adapter_settings(policy: Policy) -> LoraConfig:
    return cast(LoraConfig, cast(PeftModel, policy.model).peft_config["default"])


def write_adapter(policy: Policy, folder: Path) -> None:
    """Save the adapter of the language model as PEFT does, without fully trained modules, which vLLM refuses."""
    model = cast(PeftModel, policy.model)
    state = get_peft_model_state_dict(model, adapter_name="default", save_embedding_layers=False)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if ".lora_" in name}
    settings = copy.copy(_adapter_settings(policy))
    settings.modules_to_save = None
    with writing(folder):
        save_file(own, folder / ADAPTER_FILE, {"format": "pt"})
        settings.save_pretrained(str(folder))
