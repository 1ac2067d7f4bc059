"""The parts of the reward and their weighted sum. Imports no torch.

To add a part, write a function, add a line to :data:`PARTS`, and add its weight to
:class:`medvqa_rl.config.RewardsConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medvqa_rl.config import RewardsConfig, RolloutConfig
from medvqa_rl.core.answers import Read, read_group
from medvqa_rl.core.types import Group
from medvqa_rl.rewards.functions import RewardFunction, RewardLog, call_functions, load_function
from medvqa_rl.rewards.judged import score_reasoning, score_semantic
from medvqa_rl.rewards.judges import Judge
from medvqa_rl.rewards.length import (
    calibration,
    composite_length,
    correctness_weighted_length,
    cosine_length,
    extended_chain,
    looking,
    repetition_penalty,
    soft_overlong,
)
from medvqa_rl.rewards.open_answers import Compare, score_answers
from medvqa_rl.rewards.process import Step, judge_steps, process_score
from medvqa_rl.rewards.scores import Scores
from medvqa_rl.rewards.statements import distinct, split_statements


@dataclass(frozen=True)
class Batch:
    """The B completions being scored, prompt by prompt, and what the parts need to score them."""

    reads: Sequence[Read]
    config: RewardsConfig
    limit: int
    """Maximum tokens of a completion."""
    judges: Mapping[str, Judge]
    """By the rubric's name."""
    credit: NDArray[np.float64]
    """(B,) credit for the answers, 0 to 1; NaN if no enabled part needs it."""
    log: RewardLog
    gains: NDArray[np.float64] | None = None
    """(B,) nats by which completions are likelier with their images than with others; None unless known."""

    confidences: NDArray[np.float64] | None = None
    """(B,) the policy's probabilities of its answers; None unless known."""

    @cached_property
    def coherence(self) -> NDArray[np.float64]:
        """(B,) verdicts of the judge of coherence, who is asked once for all parts that need them."""
        return score_semantic(self.reads, self.judges["coherence"], self.log)

    @cached_property
    def steps(self) -> list[list[Step]]:
        """(B) judged steps of each completion."""
        return judge_steps(self.reads, self.judges["step"], self.log)


Part = Callable[[Batch], ArrayLike]
"""Scores a batch: (B,) values, NaN for unscored."""

PARTS: dict[str, Part] = {
    "format": lambda batch: [read.parsed.is_well_formed for read in batch.reads],
    "correctness": lambda batch: batch.credit,
    "semantic": lambda batch: batch.coherence,
    "reasoning": lambda batch: score_reasoning(
        batch.reads, batch.judges["reasoning"], batch.credit, batch.config.reasoning_gate, batch.log
    ),
    "process": lambda batch: [
        process_score([step.validity for step in steps], batch.config.process_discount) for steps in batch.steps
    ],
    "ecr": lambda batch: [extended_chain(read.think_tokens, batch.config.length_target) for read in batch.reads],
    "cwr": lambda batch: [
        correctness_weighted_length(read.think_tokens, batch.config.length_target, is_correct=read.is_right)
        for read in batch.reads
    ],
    "composite": lambda batch: _composite(batch),
    "looking": lambda batch: _looking(batch),
    "calibration": lambda batch: _calibration(batch),
    "cosine": lambda batch: [
        cosine_length(
            len(read.completion.token_ids),
            batch.limit,
            is_correct=read.is_right,
            is_truncated=read.completion.is_truncated,
            correct=batch.config.cosine_correct,
            wrong=batch.config.cosine_wrong,
            exceeded=batch.config.cosine_exceeded,
        )
        for read in batch.reads
    ],
    "overlong": lambda batch: [
        soft_overlong(len(read.completion.token_ids), batch.limit, batch.config.overlong_buffer * batch.limit)
        for read in batch.reads
    ],
    "repetition": lambda batch: [repetition_penalty(read.text, batch.config.repetition_ngram) for read in batch.reads],
}
"""The built-in parts by name; each has a weight of the same name in the settings."""


def _looking(batch: Batch) -> list[float]:
    config, gains = batch.config, batch.gains
    assert gains is not None, "the looking reward needs what the policy makes of other images: pass gains"
    right = np.array([read.is_right for read in batch.reads])
    batch.log.columns["looking_gain"] = [round(gain, 6) for gain in gains.tolist()]
    batch.log.metrics["rewards/looking/gain"] = [float(gains.mean())]
    ignoring = right & (gains <= config.looking_threshold)
    batch.log.metrics["rewards/looking/right_ignoring"] = [float(ignoring.mean())]
    return [
        looking(gain, threshold=config.looking_threshold, cap=config.looking_cap, is_correct=is_right)
        for gain, is_right in zip(gains.tolist(), right.tolist(), strict=True)
    ]


def _calibration(batch: Batch) -> list[float]:
    sure = batch.confidences
    assert sure is not None, "the calibration reward needs the policy's probabilities of its answers: pass confidences"
    batch.log.columns["confidence"] = [round(value, 6) for value in sure.tolist()]
    batch.log.metrics["rewards/calibration/confidence"] = [float(sure.mean())]
    return [calibration(value, is_correct=read.is_right) for value, read in zip(sure.tolist(), batch.reads)]


def _composite(batch: Batch) -> list[float]:
    values = []
    for read, coherence in zip(batch.reads, batch.coherence.tolist(), strict=True):
        assert read.count_tokens is not None, "counting tokens needs the policy's tokenizer: pass count_tokens"
        statements = split_statements(read.parsed.think or "")
        new = distinct(statements)
        values.append(
            composite_length(
                read.count_tokens(" ".join(statement.text for statement in new)),
                len(statements),
                len(new),
                length_target=batch.config.length_target,
                statements_target=batch.config.statements_target,
                is_correct=read.is_right,
                coherence=coherence,
            )
        )
    return values


class Rewards:
    """Scores groups of completions with the enabled parts. A part with weight 0 is neither loaded nor computed."""

    def __init__(
        self,
        config: RewardsConfig,
        *,
        max_completion_length: int = RolloutConfig().max_completion_length,
        judges: Mapping[str, Judge] | None = None,
        similarity: Compare | None = None,
        functions: Mapping[str, RewardFunction] = MappingProxyType({}),
    ) -> None:
        """Load the user's functions.

        Args:
            config: weights of the parts and their parameters.
            max_completion_length: token limit of a completion.
            judges: by rubric: ``semantic`` and ``composite`` need ``coherence``, ``process`` needs ``step``,
                ``reasoning`` needs ``reasoning``, and ``open_correctness: judge`` needs ``correctness``.
            similarity: compares texts to references; ``open_correctness: similarity`` needs it.
            functions: those of ``rewards.functions`` that a program passes itself, by dotted path; the others are
                imported.

        Raises:
            ValueError: no part is enabled, two parts have the same name, or a function cannot be loaded
                (:func:`medvqa_rl.rewards.functions.load_function`).
        """
        self._config, self._judges, self._similarity = config, dict(judges or {}), similarity
        self._limit = max_completion_length
        self._weights = {name: weight for name, weight in config.weights.items() if weight != 0}
        self._functions: dict[str, tuple[str, RewardFunction]] = {}  # by name: (path, function)
        for path, weight in config.functions.items():
            if weight == 0:
                continue
            name = path.rpartition(".")[2]
            if name in self._weights:
                raise ValueError(
                    f"Two reward parts are called {name!r} (one is the function {path!r}), but each part is logged "
                    "under its own name: rename the function or set the other's weight to 0."
                )
            self._weights[name] = weight
            self._functions[name] = (path, functions[path] if path in functions else load_function(path))
        if not self._weights:
            raise ValueError(
                "No reward is enabled, but training needs one: set rewards.format, rewards.correctness, another "
                "part or a weight in rewards.functions to a number other than 0."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the enabled parts, as in ``Scores.parts`` and the logged ``rewards/{name}/mean``."""
        return tuple(self._weights)

    @property
    def functions(self) -> dict[str, RewardFunction]:
        """The user's functions that score, by dotted path."""
        return dict(self._functions.values())

    def score(
        self,
        groups: Sequence[Group],
        *,
        step: int,
        count_tokens: Callable[[str], int] | None = None,
        gains: NDArray[np.float64] | None = None,
        confidences: NDArray[np.float64] | None = None,
    ) -> Scores:
        """Score every completion of P groups of G.

        The total is sum(weight * part) over the enabled parts that apply to the completion, without ``process``, which
        counts by the steps; it is NaN (unscored) where any of them is NaN, or none applies.

        Args:
            groups: P groups with the same number G of completions.
            step: optimizer steps done, passed on to user functions.
            count_tokens: counts tokens as the policy's tokenizer does; ``ecr``, ``cwr`` and ``composite`` need it.
            gains: (P * G) nats by which completions are likelier with their images; ``looking`` needs it.
            confidences: (P * G) the policy's probabilities of its answers; ``calibration`` needs it.

        Returns:
            (P, G) totals and parts.
        """
        sizes = {len(group.completions) for group in groups}
        assert len(sizes) == 1, f"groups have different sizes: {sorted(sizes)}"
        shape = (len(groups), sizes.pop())
        log = RewardLog()
        reads = [read for group in groups for read in read_group(group, count_tokens)]
        credit = np.full(len(reads), np.nan)
        if {"correctness", "reasoning"} & self._weights.keys():
            credit = score_answers(reads, self._config, log, self._similarity, self._judges.get("correctness"))
        batch = Batch(reads, self._config, self._limit, self._judges, credit, log, gains, confidences)
        called = call_functions(self.functions, groups, step=step, log=log)
        parts: dict[str, NDArray[np.float64]] = {}
        applies = {name: np.ones(shape, dtype=np.bool_) for name in self.names}
        for name in self.names:
            values: ArrayLike
            if name in self._functions:
                given = called[self._functions[name][0]]
                applies[name] = np.array([value is not None for value in given]).reshape(shape)
                values = [math.nan if value is None else value for value in given]
            else:
                values = PARTS[name](batch)
            parts[name] = np.asarray(values, dtype=np.float64).reshape(shape)
        # Steps count by the advantages of their tokens; one that could not be judged still leaves its total unscored.
        total = _total(self._weights | ({"process": 0.0} if "process" in parts else {}), parts, applies)
        extras = {name: float(np.mean(values)) for name, values in log.metrics.items()}
        steps = batch.steps if "process" in parts else ()
        return Scores(total, parts, applies, extras, log.columns, reads, steps)


def _total(
    weights: Mapping[str, float], parts: Mapping[str, NDArray[np.float64]], applies: Mapping[str, NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """(P, G) weighted sum of the parts that apply."""
    total = np.sum([np.where(applies[name], weight * parts[name], 0.0) for name, weight in weights.items()], axis=0)
    return np.where(np.any(list(applies.values()), axis=0), total, np.nan)
