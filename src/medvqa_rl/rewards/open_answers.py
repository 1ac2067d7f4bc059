"""Credit for open answers that are not word for word the gold answer. Imports no torch.

One rule for all ways: an answer that equals the gold answer gets 1, one that contradicts it
(:mod:`medvqa_rl.rewards.guards`) gets 0, and only what is in between is compared. Evaluations do not use this: their
accuracy is exact match, with token F1 beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.answers import is_correct, parse_completion, token_f1
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.types import AnswerType, Group
from medvqa_rl.rewards.functions import FunctionLog
from medvqa_rl.rewards.guards import conflict
from medvqa_rl.rewards.judged import grade_request, log_grades
from medvqa_rl.rewards.judges import Grader


class Compare(Protocol):
    """Similarity of texts to references, pair by pair (:class:`Similarity`)."""

    def compare(self, texts: Sequence[str], references: Sequence[str]) -> list[float]: ...


@dataclass(frozen=True)
class OpenScorer:
    """What gives credit to open answers, by ``rewards.open_correctness``."""

    config: RewardsConfig
    similarity: Compare | None = None
    """Needed by ``similarity``."""
    grader: Grader | None = None
    """Needed by ``judge``: grades on the rubric of correctness."""

    @property
    def is_exact(self) -> bool:
        """Whether there is nothing between right and wrong."""
        return self.config.open_correctness in (None, "exact")


def score_answers(groups: Sequence[Group], scorer: OpenScorer, log: FunctionLog) -> NDArray[np.float64]:
    """(B,) credit for the answers, prompt by prompt, from 0 to 1.

    1 for what :func:`medvqa_rl.core.answers.is_correct` calls right, 0 for every other answer to a choice or
    closed question, and for no answer. Any other answer to an open question gets 0 where it contradicts the gold
    answer, else

    - ``token_f1``: the token F1 of both, continuous;
    - ``similarity``: 1 where their similarity is at least ``rewards.similarity_threshold``, else 0;
    - ``judge``: a judge's grade on :data:`CORRECTNESS` / 3; NaN (unscored) where it failed.

    Args:
        log: gets, unless nothing is between right and wrong, the share of right answers
            (``rewards/correctness/exact``), the share of open answers that were withheld credit as contradictions
            (``rewards/correctness/guarded``), and per completion why (``correctness_guard``), or its similarity or
            grade.
    """
    completions = [(group, completion) for group in groups for completion in group.completions]
    samples = [as_asked(group.sample, group.template) for group, _ in completions]
    answers = [parse_completion(completion.text, group.template).answer for group, completion in completions]
    credit = np.array([float(is_correct(sample, answer)) for sample, answer in zip(samples, answers)])
    if scorer.is_exact:
        return credit
    log.metrics["rewards/correctness/exact"] = [float(credit.mean())]
    is_open = [sample.answer_type == "open" for sample in samples]
    guards = [""] * len(completions)
    compared: list[int] = []
    for place, (sample, answer) in enumerate(zip(samples, answers)):
        if is_open[place] and not credit[place] and answer is not None:
            guards[place] = conflict(answer, sample.answer) or ""
            if not guards[place]:
                compared.append(place)
    log.columns["correctness_guard"] = guards
    if any(is_open):
        log.metrics["rewards/correctness/guarded"] = [sum(map(bool, guards)) / sum(is_open)]
    golds = {place: samples[place].answer for place in compared}
    if scorer.config.open_correctness == "token_f1":
        for place, gold in golds.items():
            credit[place] = token_f1(answers[place], gold)
    elif scorer.config.open_correctness == "similarity":
        found = _similarities(scorer, {place: answers[place] or "" for place in compared}, golds)
        for place, value in found.items():
            credit[place] = float(value >= scorer.config.similarity_threshold)
        log.columns["correctness_similarity"] = [
            round(found[place], 6) if place in found else None for place in range(len(completions))
        ]
    else:
        assert scorer.grader is not None, "judge asks a grader: pass one"
        requests = [
            # What the rubric does not show must not make a kept grade another one.
            replace(grade_request(group, completion), reasoning="", description="")
            for group, completion in (completions[place] for place in compared)
        ]
        grades = dict(zip(compared, scorer.grader.grade(requests)))
        for place, grade in grades.items():
            credit[place] = grade.value
        log_grades("correctness", [grades.get(place) for place in range(len(completions))], scorer.grader, log)
    return credit


def _similarities(scorer: OpenScorer, answers: Mapping[int, str], golds: Mapping[int, str]) -> dict[int, float]:
    """Similarity of answers to their gold answers, by place. One gold answer at a time, so that what an answer gets
    does not depend on the other questions of its step."""
    assert scorer.similarity is not None, "similarity compares texts: pass what does"
    places: dict[str, list[int]] = {}
    for place, gold in golds.items():
        places.setdefault(gold, []).append(place)
    found: dict[int, float] = {}
    for gold, some in places.items():
        found.update(zip(some, scorer.similarity.compare([answers[place] for place in some], [gold] * len(some))))
    return found


def unrewardable(config: RewardsConfig, kinds: Iterable[AnswerType]) -> tuple[str | None, str | None]:
    """What is wrong with rewarding questions of these kinds by exact match alone.

    Nothing to choose from and only the gold answer's very words paid: a policy that never hits them by chance learns
    nothing. Where every question is open that is an error unless ``exact`` was asked for by name; where at least half
    are, a warning, for the others can still teach.

    Returns:
        An error and a warning, each a sentence or None.
    """
    given = list(kinds)
    share = sum(kind == "open" for kind in given) / len(given) if given else math.nan
    if config.open_correctness is not None or not config.correctness or not share >= 0.5:
        return None, None
    remedy = "set rewards.open_correctness to token_f1, similarity or judge, or to exact if that is what you want."
    if share == 1:
        return f"All training questions are open, and only exact words would be rewarded: {remedy}", None
    return None, f"Warning: {share:.0%} of the training questions are open and rewarded for exact words only: {remedy}"
