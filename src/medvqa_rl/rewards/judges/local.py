"""A causal language model on this machine as judge. It writes nothing, so every verdict can be read.

Each rubric has answers: Yes and No for coherence, else its levels. Each answer is scored as a whole token sequence
after the same prompt, and the log-probabilities are compared. Prompts are batched by length, and the tokens shared by
the beginning of all prompts are computed once and cached.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from medvqa_rl.config import JudgeConfig
from medvqa_rl.core.text import printable
from medvqa_rl.models.cache import cache_argument
from medvqa_rl.rewards.judges.local_model import JudgeModel, load_judge_model
from medvqa_rl.rewards.judges.prompts import defused
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import COHERENCE, Rubric

BEGINNING = '{"score":'
"""The beginning of the reply that a graded rubric asks for; the level follows."""


class _Case(NamedTuple):
    """A prompt with each of its answers as tokens; the answers begin where the sequences differ."""

    answers: tuple[tuple[int, ...], ...]
    start: int

    @property
    def length(self) -> int:
        """Tokens to read; the last one of an answer need not be."""
        return max(map(len, self.answers)) - 1

    @property
    def tails(self) -> tuple[tuple[int, ...], ...]:
        """Each answer behind what all of them share."""
        return tuple(answer[self.start :] for answer in self.answers)


class _Piece(NamedTuple):
    """The tokens the model must read to score an answer; the answer's last token need not be read."""

    tokens: tuple[int, ...]
    start: int
    """Where the answer begins. Answers of one token share a piece."""


class LocalJudge(ABC):
    """Compares the log-probabilities of the answers to each prompt."""

    def __init__(
        self, loaded: JudgeModel, rubric: Rubric, answers: Sequence[str], prompt_hash: str, strictness: float = 0.0
    ) -> None:
        """
        Args:
            answers: as the model writes them behind the prompt.
            prompt_hash: of prompt and answers.
            strictness: see :class:`YesNoJudge`.

        Raises:
            ValueError: the vocabulary cannot write the answers.
        """
        self.loaded, self.rubric, self.answers = loaded, rubric, tuple(answers)
        self.identity = JudgeIdentity(loaded.name, loaded.fingerprint, prompt_hash, strictness)
        self._counts: Counter[str] = Counter()
        self._prefix_cache: Any = None
        self._check_answers([self._encode(request) for request in rubric.probes])

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked`` and ``failed``."""
        return dict(self._counts)

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; one with nothing to grade gets 0, and one that exceeds the context length fails."""
        grades = self.rubric.grade(requests, self._ask)
        self._counts.update(asked=len(requests), failed=sum(not grade.is_scored for grade in grades))
        return grades

    @abstractmethod
    def _prompt(self, request: JudgeRequest) -> str:
        """The text before the answer."""

    @abstractmethod
    def _verdict(self, log_probs: Sequence[float]) -> Grade:
        """The grade that the answers' log-probabilities, which are finite, give."""

    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests with the model; each has something to grade."""
        cases = [self._case(request) for request in requests]
        found = iter(self._log_probs([case for case in cases if not isinstance(case, Grade)]))
        return [case if isinstance(case, Grade) else self._read_verdict(next(found)) for case in cases]

    def _case(self, request: JudgeRequest) -> Any:
        """The encoded request, or the failed grade of one that cannot be asked."""
        try:
            case = self._encode(request)
        except ValueError as error:  # an image
            return Grade.failed(printable(str(error)))
        if case.length > self.loaded.limit:
            return Grade.failed(f"the prompt has {case.length} tokens, the judge reads {self.loaded.limit}")
        return case

    def _read_verdict(self, log_probs: Sequence[float]) -> Grade:
        if not all(map(math.isfinite, log_probs)):
            return Grade.failed("the judge gives probabilities that are no finite numbers")
        return self._verdict(log_probs)

    def _encode(self, request: JudgeRequest) -> Any:
        """The request's prompt and answers as tokens."""
        text = self._prompt(defused(request, self.loaded.special))
        answers = tuple(tuple(self.loaded.encode(text + answer)) for answer in self.answers)
        return _Case(answers, len(common_prefix(answers)))

    @cached_property
    def _prefix(self) -> tuple[int, ...]:
        """The tokens with which all prompts begin."""
        cases = [self._encode(request) for request in self.rubric.probes]
        return common_prefix([case.answers[0][: case.start] for case in cases])

    def _check_answers(self, cases: Sequence[Any]) -> None:
        size, words = self.loaded.model.get_output_embeddings().weight.shape[0], [a.strip() for a in self.answers]
        for case in cases:
            for word, tail in zip(words, case.tails):
                is_known = all(token < size and token != self.loaded.tokenizer.unk_token_id for token in tail)
                if not (tail and case.start and is_known):
                    raise ValueError(
                        f"The judge {self.loaded.name!r} cannot answer {word!r}: its vocabulary does not write "
                        f"{', '.join(words[:-1])} and {words[-1]} behind the prompt {self.loaded.prompt.name!r}, so "
                        "choose another judge.model or judge.template."
                    )

    @torch.no_grad()
    def _log_probs(self, cases: Sequence[Any]) -> list[list[float]]:
        """Log-probability of each answer of each case, summed over the answer's tokens.

        Prompts that begin with the cached prefix continue from it; equal pieces are read once.
        """
        pieces = dict.fromkeys(_Piece(answer[:-1], case.start) for case in cases for answer in case.answers)
        scores: dict[_Piece, Tensor] = {}
        size = len(self._prefix)
        prefixed: list[_Piece] = []
        others: list[_Piece] = []
        for piece in sorted(pieces, key=lambda piece: len(piece.tokens)):
            is_prefixed = 0 < size < piece.start and piece.tokens[:size] == self._prefix
            (prefixed if is_prefixed else others).append(piece)
        for some, skipped in ((prefixed, size), (others, 0)):
            for first in range(0, len(some), self.loaded.batch_size):
                batch = some[first : first + self.loaded.batch_size]
                scores.update(zip(batch, self._read(batch, skipped)))

        def log_prob(answer: tuple[int, ...], start: int) -> float:
            tail = torch.tensor(answer[start:])
            return float(scores[_Piece(answer[:-1], start)].gather(1, tail[:, None]).sum())

        return [[log_prob(answer, case.start) for answer in case.answers] for case in cases]

    def _read(self, pieces: Sequence[_Piece], skipped: int) -> list[Tensor]:
        """(answer tokens, V) float64 log-probabilities of the next token after each position of the answer.

        Pieces are padded on the right: causal attention does not look ahead, so real tokens do not see the padding.

        Args:
            skipped: tokens at the beginning that are in the prefix cache.
        """
        device = self.loaded.model.device
        width, first = max(len(piece.tokens) for piece in pieces), min(piece.start for piece in pieces) - 1
        ids = torch.zeros(len(pieces), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(pieces):
            ids[row, : len(piece.tokens)] = torch.tensor(piece.tokens)
            mask[row, : len(piece.tokens)] = 1
        cache = self._forked_prefix(len(pieces)) if skipped else None
        logits = self.loaded.model(
            input_ids=ids[:, skipped:].to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(skipped, width, device=device)[None],
            use_cache=cache is not None,
            logits_to_keep=torch.arange(first - skipped, width - skipped, device=device),
            **cache_argument(self.loaded.model, cache),
        ).logits
        return [
            logits[row, piece.start - 1 - first : len(piece.tokens) - first].double().log_softmax(-1).cpu()
            for row, piece in enumerate(pieces)
        ]

    def _forked_prefix(self, count: int) -> Any:
        """The KV cache of the prefix, repeated for ``count`` rows."""
        if self._prefix_cache is None:
            ids = torch.tensor([self._prefix], device=self.loaded.model.device)
            cache = DynamicCache(config=self.loaded.model.config)
            argument = cache_argument(self.loaded.model, cache)
            self.loaded.model(input_ids=ids, use_cache=True, logits_to_keep=1, **argument)
            self._prefix_cache = cache
        forked = copy.deepcopy(self._prefix_cache)
        forked.batch_repeat_interleave(count)
        return forked


class YesNoJudge(LocalJudge):
    """Judges a rubric with two levels: Yes if log P("Yes") > log P("No") + strictness, else No."""

    def __init__(self, loaded: JudgeModel, *, strictness: float = 0.0, rubric: Rubric = COHERENCE) -> None:
        """
        Args:
            strictness: nats by which log P("Yes") must exceed log P("No").
            rubric: with two levels.

        Raises:
            ValueError: the vocabulary cannot write Yes and No.
        """
        prompt = loaded.prompt
        super().__init__(loaded, rubric, (prompt.yes, prompt.no), prompt.hash_for(rubric), strictness)

    def _prompt(self, request: JudgeRequest) -> str:
        return self.loaded.prompt.render(request, self.rubric)

    def _verdict(self, log_probs: Sequence[float]) -> Grade:
        margin = log_probs[0] - log_probs[1]
        return Grade(float(margin > self.identity.strictness), margin=margin)


class LevelJudge(LocalJudge):
    """Grades on a rubric: the most likely of its levels behind :data:`BEGINNING`, the lower one of equally likely
    ones. The reason gives the probabilities of all levels, which sum to 1."""

    def __init__(self, loaded: JudgeModel, rubric: Rubric) -> None:
        """
        Raises:
            ValueError: the model follows no instructions, or the vocabulary cannot write the levels.
        """
        if loaded.prompt.wrap is None:
            raise ValueError(
                f"The judge {loaded.name!r} continues text (prompt {loaded.prompt.name!r}) and follows no "
                "instructions, so it cannot grade on a rubric: set judge.model to a chat or instruct model, or to an "
                "endpoint's."
            )
        self._wrap = loaded.prompt.wrap
        answers = [f" {score}" for score in range(len(rubric.levels))]
        self.rubric = rubric
        shown = "\0".join([*map(self._prompt, rubric.probes), *answers])
        super().__init__(loaded, rubric, answers, hashlib.sha256(shown.encode()).hexdigest()[:16])

    def _prompt(self, request: JudgeRequest) -> str:
        return self._wrap(self.rubric.render(request), len(self.rubric.images(request))) + BEGINNING

    def _verdict(self, log_probs: Sequence[float]) -> Grade:
        values = np.asarray(log_probs)
        shares = np.exp(values - values.max())
        shares /= shares.sum()
        return Grade(float(values.argmax()), f"P(0 to {len(values) - 1}) = {', '.join(f'{p:.2f}' for p in shares)}")


def load_local_judge(config: JudgeConfig) -> YesNoJudge:
    """Load a local judge of coherence.

    Raises:
        ValueError: it cannot be loaded (:func:`load_judge_model`), or cannot write Yes and No.
    """
    return YesNoJudge(load_judge_model(config), strictness=config.strictness)


def common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens at the beginning of all sequences."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return sequences[0][:length]
