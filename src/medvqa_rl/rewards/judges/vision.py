"""A vision-language model on this machine as judge that sees, of any supported family.

Answers are scored as those of a text judge are. Prompts about the same images begin with the same tokens, which go
through the model once, as in an evaluation (:mod:`medvqa_rl.models.prefix.prefill`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medvqa_rl.config import JudgeConfig, ModelConfig
from medvqa_rl.core.types import EncodedPrompt
from medvqa_rl.data.images.files import shrunk
from medvqa_rl.models.dimensions import uses_bfloat16
from medvqa_rl.models.families.generic import PER_TOKEN, as_generic
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.models.prefix.prefill import prefill
from medvqa_rl.models.processor import Processor
from medvqa_rl.rewards.judges.local import LevelJudge, LocalJudge, YesNoJudge, common_prefix
from medvqa_rl.rewards.judges.local_model import FIXED, JudgeModel, device_of, folder_of
from medvqa_rl.rewards.judges.prompts import JudgePrompt, chat_prompt, defused
from medvqa_rl.rewards.judges.protocol import JudgeRequest


@dataclass
class SeeingModel(JudgeModel):
    """A vision-language model with its processor and prompt."""

    policy: Policy | None = None
    max_pixels: int = 0
    """Larger images are shrunk to this area."""

    @property
    def processor(self) -> Processor:
        assert self.policy is not None
        return self.policy.processor


def load_seeing_model(config: JudgeConfig) -> SeeingModel:
    """Load a judge's vision-language model from a folder, the Hub, or the package.

    Raises:
        ValueError: it does not exist, or does not see images.
    """
    device = device_of(config)
    folder = folder_of(config)
    dtype = "bfloat16" if uses_bfloat16(config.dtype, device.type) else "float32"
    try:
        policy = load_policy(ModelConfig(path=str(folder), device="cpu", dtype=dtype))
    except ValueError as error:
        raise ValueError(
            f"judge.sees is image, but the judge {config.model!r} cannot be loaded as a model that sees. "
            f"{str(error).replace('model.path', 'judge.model')} Or set judge.sees to text or description."
        ) from error
    policy = replace(policy, model=policy.model.to(device).eval(), device=device)
    processor, tokenizer = policy.processor, policy.processor.tokenizer
    marks = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return SeeingModel(
        config.model,
        policy.model,
        tokenizer,
        replace(_chat(processor), marks=marks),
        config.batch_size,
        policy=policy,
        max_pixels=config.max_pixels,
    )


def _chat(processor: Processor) -> JudgePrompt:
    def apply(text: str, images: int) -> str:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
        return processor.render([{"role": "user", "content": content}], **FIXED)

    return chat_prompt(apply)


class _SeenCase(NamedTuple):
    """A prompt with its images, and each of its answers as tokens."""

    prompt: EncodedPrompt
    """Without the answers, up to the last token that all of them share."""
    tails: tuple[tuple[int, ...], ...]
    """The tokens of each answer behind that."""

    @property
    def start(self) -> int:
        """Where the answers begin."""
        return len(self.prompt.input_ids)

    @property
    def length(self) -> int:
        """Tokens to read; the last one of an answer need not be."""
        return len(self.prompt.input_ids) + max(map(len, self.tails)) - 1


class _Sees(LocalJudge):
    """Scores answers behind prompts with images."""

    loaded: SeeingModel

    def __init__(self, loaded: SeeingModel, *arguments: Any, **named: Any) -> None:
        super().__init__(loaded, *arguments, **named)
        shown = f"{self.identity.prompt_hash} {loaded.max_pixels}"
        prompt_hash = hashlib.sha256(shown.encode()).hexdigest()[:16]
        self.identity = replace(self.identity, prompt_hash=prompt_hash)

    def _encode(self, request: JudgeRequest) -> _SeenCase:
        """
        Raises:
            ValueError: an image cannot be decoded.
        """
        text = self._prompt(defused(request, self.loaded.special))
        images = [shrunk(seen.image, self.loaded.max_pixels) for seen in self.rubric.images(request)]
        tokenize = self.loaded.processor.tokenize
        answers = [tuple(tokenize(text + answer).tolist()) for answer in self.answers]
        start = len(common_prefix(answers))
        whole = self.loaded.processor.encode_text(text + self.answers[0], images)
        end = len(whole.input_ids) - (len(answers[0]) - start)  # images are longer than their placeholders
        inputs = {name: array[:, :end] if name in PER_TOKEN else array for name, array in whole.image_inputs.items()}
        prompt = replace(whole, input_ids=whole.input_ids[:end], image_inputs=inputs)
        return _SeenCase(prompt, tuple(answer[start:] for answer in answers))

    @torch.no_grad()
    def _log_probs(self, cases: Sequence[_SeenCase]) -> list[list[float]]:
        """Log-probability of each answer of each case, summed over the answer's tokens."""
        # What is read behind each prompt: answers of one token share the same.
        read = [dict.fromkeys(tail[:end] for tail in case.tails for end in range(len(tail))) for case in cases]
        prompts = [
            replace(case.prompt, input_ids=np.concatenate([case.prompt.input_ids, np.array(more, dtype=np.int64)]))
            for case, behind in zip(cases, read)
            for more in behind
        ]
        size = self.loaded.batch_size
        batches = [self._next(prompts[first : first + size]) for first in range(0, len(prompts), size)]
        found = (row for batch in batches for row in batch)
        scores = [{more: next(found) for more in behind} for behind in read]
        return [
            [sum(float(own[tail[:end]][tail[end]]) for end in range(len(tail))) for tail in case.tails]
            for case, own in zip(cases, scores)
        ]

    def _next(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """(P, V) float64 log-probabilities of the next token behind each prompt."""
        policy = self.loaded.policy
        assert policy is not None
        if isinstance(policy.family, SharedFamily):
            logits = prefill(policy, prompts, shares_images=True)[0].logits
        else:
            family, padded = as_generic(policy.family), policy.processor.pad(prompts, policy.device)
            hidden = family.separate_hidden_states(policy.model, prompts, padded.input_ids, padded.mask)
            last = padded.mask.sum(dim=-1) - 1
            logits = family.logits(policy.model, hidden[torch.arange(len(prompts), device=policy.device), last])
        return logits.double().log_softmax(-1).cpu()


class SeeingYesNoJudge(_Sees, YesNoJudge):
    """Judges with Yes and No what it sees."""


class SeeingLevelJudge(_Sees, LevelJudge):
    """Grades on a rubric what it sees."""
