"""The parts of the reward and their weighted sum. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.config import RewardsConfig, RolloutConfig
from medvqa_rl.core.answers import is_correct, parse_completion, score_format, without_tags
from medvqa_rl.core.types import Completion, Group, Scores
from medvqa_rl.rewards.functions import FunctionLog, call_function, load_function
from medvqa_rl.rewards.judged import score_reasoning, score_semantic
from medvqa_rl.rewards.judges import Grader, Judge
from medvqa_rl.rewards.length import (
    correctness_weighted_length,
    cosine_length,
    extended_chain,
    repetition_penalty,
    soft_overlong,
)
from medvqa_rl.rewards.open_answers import Compare, OpenScorer, score_answers

TokenCounter = Callable[[str], int]
"""How many tokens the policy's tokenizer makes of a text."""

NAMED = ("format", "correctness", "semantic", "reasoning", "ecr", "cwr", "cosine", "overlong", "repetition")
"""The parts that have a weight of their own in the settings."""


class Rewards:
    """Scores groups of completions with the enabled parts. A part with weight 0 is off: not loaded, not computed."""

    def __init__(
        self,
        config: RewardsConfig,
        *,
        max_completion_length: int = RolloutConfig().max_completion_length,
        judge: Judge | None = None,
        graders: Mapping[str, Grader] | None = None,
        similarity: Compare | None = None,
    ) -> None:
        """Load the user's functions.

        Args:
            config: weights of the parts and what they need.
            max_completion_length: the token limit, by which length is measured.
            judge: asked for ``semantic``, which needs it.
            graders: by rubric; ``reasoning`` needs the one of that name, ``open_correctness: judge`` that of
                ``correctness``.
            similarity: compares texts; ``open_correctness: similarity`` needs it.

        Raises:
            ValueError: no part is enabled, two parts have the same name, or a function cannot be loaded
                (:func:`medvqa_rl.rewards.functions.load_function`).
        """
        self._config, self._judge, self._graders = config, judge, dict(graders or {})
        self._open = OpenScorer(config, similarity, self._graders.get("correctness"))
        self._limit = max_completion_length
        weights = config.model_dump(include=set(NAMED))
        self._weights: dict[str, float] = {name: weights[name] for name in NAMED if weights[name] != 0}
        self._functions = {}
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
            self._functions[name] = (path, load_function(path))
        if not self._weights:
            raise ValueError(
                "No reward is enabled, but training needs one: set rewards.format, rewards.correctness, another "
                "part or a weight in rewards.functions to a number other than 0."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the enabled parts, as in ``Scores.parts`` and the logged ``rewards/{name}/mean``."""
        return tuple(self._weights)

    def score(self, groups: Sequence[Group], *, step: int, count_tokens: TokenCounter | None = None) -> Scores:
        """Score every completion of P groups of G.

        The total is sum(weight * part) over the enabled parts; it is NaN (unscored) where any of them is NaN.

        Args:
            groups: P groups with the same number G of completions.
            step: optimizer steps done, passed on to user functions.
            count_tokens: of the policy's tokenizer; ``ecr`` and ``cwr`` need it.

        Returns:
            (P, G) totals and parts.
        """
        sizes = {len(group.completions) for group in groups}
        assert len(sizes) == 1, f"groups have different sizes: {sorted(sizes)}"
        shape = (len(groups), sizes.pop())
        log = FunctionLog({}, {})
        credit = np.full(shape[0] * shape[1], np.nan)
        if {"correctness", "reasoning"} & self._weights.keys():
            credit = score_answers(groups, self._open, log)
        parts = {name: self._part(name, groups, step, log, count_tokens, credit).reshape(shape) for name in self.names}
        total = np.sum([weight * parts[name] for name, weight in self._weights.items()], axis=0)
        extras = {name: float(np.mean(values)) for name, values in log.metrics.items()}
        return Scores(total, parts, extras, log.columns)

    def _part(
        self,
        name: str,
        groups: Sequence[Group],
        step: int,
        log: FunctionLog,
        count_tokens: TokenCounter | None,
        credit: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """(B,) one part before its weight, given the credit for the answers."""
        if name in self._functions:
            path, function = self._functions[name]
            return call_function(path, function, groups, step=step, log=log)
        if name == "semantic":
            assert self._judge is not None, "semantic asks a judge: pass one"
            return score_semantic(groups, self._judge, log)
        if name == "reasoning":
            assert name in self._graders, "reasoning asks a grader: pass one"
            gate = self._config.reasoning_gate
            return score_reasoning(groups, self._graders[name], credit, gate, log)
        if name == "correctness":
            return credit
        return np.array(
            [
                self._score_one(name, group, completion, count_tokens)
                for group in groups
                for completion in group.completions
            ]
        )

    def _score_one(self, name: str, group: Group, completion: Completion, count_tokens: TokenCounter | None) -> float:
        """One of the named parts of one completion, read in the form that its prompt asks for."""
        config, text, length = self._config, completion.text, len(completion.token_ids)
        sample, template = group.sample, group.template
        if name == "format":
            return score_format(text, template)
        if name == "overlong":
            return soft_overlong(length, self._limit, config.overlong_buffer * self._limit)
        if name == "repetition":
            return repetition_penalty(without_tags(text), config.repetition_ngram)
        parsed = parse_completion(text, template)
        is_right = is_correct(sample, parsed.answer)
        if name == "cosine":
            return cosine_length(
                length,
                self._limit,
                is_correct=is_right,
                is_truncated=completion.is_truncated,
                correct=config.cosine_correct,
                wrong=config.cosine_wrong,
                exceeded=config.cosine_exceeded,
            )
        assert count_tokens is not None, f"{name} counts tokens: pass the policy's count_tokens to score"
        num_tokens = 0 if parsed.think is None else count_tokens(parsed.think)
        if name == "ecr":
            return extended_chain(num_tokens, config.length_target)
        assert name == "cwr", name
        return correctness_weighted_length(num_tokens, config.length_target, is_correct=is_right)
