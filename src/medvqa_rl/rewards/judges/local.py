"""A causal language model on this machine as judge.

Coherence compares log P("Yes") with log P("No"), each scored as a whole token sequence after the same prompt; graded
rubrics generate a JSON reply greedily. Prompts are batched by length. For Yes or No, the tokens shared by the
beginning of all prompts are computed once and cached.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from medvqa_rl.config import JudgeConfig
from medvqa_rl.models.cache import cache_argument
from medvqa_rl.rewards.judges.local_model import JudgeModel, load_judge_model
from medvqa_rl.rewards.judges.prompts import defused
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import COHERENCE, Rubric

BEGINNING = '{"score":'
"""The model's reply on a graded rubric is started with this, so that small models write no preface."""


class _Case(NamedTuple):
    """A prompt with its two answers as tokens; the answers begin where the sequences differ."""

    yes: tuple[int, ...]
    no: tuple[int, ...]
    start: int


class _Piece(NamedTuple):
    """The tokens the model must read to score an answer; the answer's last token need not be read."""

    tokens: tuple[int, ...]
    start: int
    """Where the answer begins. Answers of one token share a piece."""


class LocalJudge(ABC):
    """What the two kinds of local judges share: identity, counters, and what is graded without the model."""

    def __init__(self, loaded: JudgeModel, rubric: Rubric, prompt_hash: str, strictness: float = 0.0) -> None:
        self.loaded, self.rubric = loaded, rubric
        self.identity = JudgeIdentity(loaded.name, loaded.fingerprint, prompt_hash, strictness)
        self._counts: Counter[str] = Counter()

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
    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests with the model; each has something to grade."""


class YesNoJudge(LocalJudge):
    """Judges coherence: Yes if log P("Yes") > log P("No") + strictness, else No."""

    def __init__(self, loaded: JudgeModel, *, strictness: float = 0.0) -> None:
        """
        Args:
            strictness: nats by which log P("Yes") must exceed log P("No").

        Raises:
            ValueError: the vocabulary cannot write Yes and No.
        """
        super().__init__(loaded, COHERENCE, loaded.prompt.hash, strictness)
        self._prefix_cache: Any = None
        self._check_answers()
        cases = [self._encode(request) for request in COHERENCE.probes]
        self._prefix = _common_prefix([case.yes[: case.start] for case in cases])

    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        cases = [self._encode(request) for request in requests]
        lengths = [max(len(case.yes), len(case.no)) - 1 for case in cases]
        limit = self.loaded.limit
        margins = iter(self._margins([case for case, length in zip(cases, lengths) if length <= limit]))
        return [
            self._verdict(next(margins))
            if length <= limit
            else Grade.failed(f"the prompt has {length} tokens, the judge reads {limit}")
            for length in lengths
        ]

    def _verdict(self, margin: float) -> Grade:
        if not math.isfinite(margin):
            return Grade.failed("the judge gives probabilities that are no finite numbers")
        return Grade(float(margin > self.identity.strictness), margin=margin)

    def _encode(self, request: JudgeRequest) -> _Case:
        prompt = self.loaded.prompt
        text = prompt.render(defused(request, self.loaded.special))
        yes, no = (tuple(self.loaded.encode(text + answer)) for answer in (prompt.yes, prompt.no))
        return _Case(yes, no, len(_common_prefix([yes, no])))

    def _check_answers(self) -> None:
        size = self.loaded.model.get_output_embeddings().weight.shape[0]
        for request in COHERENCE.probes:
            case = self._encode(request)
            tails = (case.yes[case.start :], case.no[case.start :])
            for answer, tail in zip(("Yes", "No"), tails):
                is_known = all(token < size and token != self.loaded.tokenizer.unk_token_id for token in tail)
                if not (tail and case.start and is_known):
                    raise ValueError(
                        f"The judge {self.loaded.name!r} cannot answer {answer!r}: its vocabulary does not write Yes "
                        f"and No behind the prompt {self.loaded.prompt.name!r}, so choose another judge.model or "
                        "judge.template."
                    )

    @torch.no_grad()
    def _margins(self, cases: Sequence[_Case]) -> list[float]:
        """log P("Yes") - log P("No") of each case.

        Prompts that begin with the cached prefix continue from it; equal pieces are read once.
        """
        pieces = dict.fromkeys(_Piece(answer[:-1], case.start) for case in cases for answer in (case.yes, case.no))
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
            """Sum over the answer's tokens."""
            tail = torch.tensor(answer[start:])
            return float(scores[_Piece(answer[:-1], start)].gather(1, tail[:, None]).sum())

        return [log_prob(case.yes, case.start) - log_prob(case.no, case.start) for case in cases]

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


class WritingJudge(LocalJudge):
    """Grades on a rubric: the model writes its grade as JSON, greedily (:meth:`Rubric.parse`)."""

    def __init__(self, loaded: JudgeModel, rubric: Rubric) -> None:
        """
        Raises:
            ValueError: the model follows no instructions.
        """
        super().__init__(loaded, rubric, rubric.hash)
        if loaded.prompt.wrap is None:
            raise ValueError(
                f"The judge {loaded.name!r} continues text (prompt {loaded.prompt.name!r}) and follows no "
                "instructions, so it cannot grade on a rubric: set judge.model to a chat or instruct model, or to an "
                "endpoint's."
            )
        self._wrap = loaded.prompt.wrap
        tokenizer, ends = loaded.tokenizer, loaded.model.generation_config.eos_token_id
        self._generation = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models' own settings penalise the braces and quotes of JSON
            no_repeat_ngram_size=0,
            max_new_tokens=rubric.max_tokens,
            eos_token_id=tokenizer.eos_token_id if ends is None else ends,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        )

    def check(self) -> None:
        """Grade one request, to find out before training whether the model writes grades.

        Raises:
            ValueError: it does not; the message says what it wrote.
        """
        (grade,) = self.grade(self.rubric.probes[:1])
        if not grade.is_scored:
            raise ValueError(
                f"The judge {self.loaded.name!r} does not grade on the rubric {self.rubric.name!r} ({grade.reason}): "
                "set judge.model to a model that follows instructions."
            )

    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        shown = [self.rubric.render(defused(request, self.loaded.special)) for request in requests]
        prompts = [self.loaded.encode(self._wrap(text) + BEGINNING) for text in shown]
        limit, room = self.loaded.limit, self.rubric.max_tokens
        fitting = [index for index, prompt in enumerate(prompts) if len(prompt) + room <= limit]
        fitting.sort(key=lambda index: len(prompts[index]))
        replies: dict[int, str] = {}
        for first in range(0, len(fitting), self.loaded.batch_size):
            some = fitting[first : first + self.loaded.batch_size]
            replies.update(zip(some, self._write([prompts[index] for index in some])))
        return [
            self.rubric.parse(BEGINNING + replies[index])
            if index in replies
            else Grade.failed(
                f"the prompt has {len(prompt)} tokens and the verdict up to {room}, the judge reads {limit}"
            )
            for index, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def _write(self, prompts: Sequence[list[int]]) -> list[str]:
        """Generate a reply to each prompt, padded on the left."""
        model, width = self.loaded.model, max(map(len, prompts))
        ids = torch.full((len(prompts), width), int(self._generation.pad_token_id or 0))
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        written = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=self._generation
        )
        texts: list[str] = self.loaded.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        return texts


def load_local_judge(config: JudgeConfig) -> YesNoJudge:
    """Load a local judge of coherence.

    Raises:
        ValueError: it cannot be loaded (:func:`load_judge_model`), or cannot write Yes and No.
    """
    return YesNoJudge(load_judge_model(config), strictness=config.strictness)


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens at the beginning of all sequences."""
    length = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        length += 1
    return sequences[0][:length]
