"""Partial credit for open answers that do not equal the gold answer. Imports no torch.

The rule is the same for every method: an answer equal to the gold answer gets 1, one that contradicts it
(:mod:`medvqa_rl.rewards.guards`) gets 0, and only the others are compared. Evaluation does not use this: its accuracy
is exact match, with token F1 reported beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.answers import Read, answer_f1
from medvqa_rl.core.types import AnswerType
from medvqa_rl.rewards.functions import RewardLog
from medvqa_rl.rewards.guards import conflict
from medvqa_rl.rewards.judged import judge_requests, log_grades
from medvqa_rl.rewards.judges import Judge
from medvqa_rl.rewards.judges.rubric import CORRECTNESS

Compare = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(texts, references) -> similarity of each pair."""


def score_answers(
    reads: Sequence[Read],
    config: RewardsConfig,
    log: RewardLog,
    similarity: Compare | None = None,
    judge: Judge | None = None,
) -> NDArray[np.float64]:
    """(B,) credit for the answers, from 0 to 1.

    Correct answers (:func:`medvqa_rl.core.answers.is_correct`) get 1. Other answers to choice or closed questions, and
    missing answers, get 0. Any other answer to an open question gets 0 if it contradicts the gold answer, else by
    ``rewards.open_correctness``. Of several gold answers, the most similar one that it does not contradict counts.

    - ``token_f1``: the token F1 of the two, continuous;
    - ``similarity``: 1 if their similarity is at least ``rewards.similarity_threshold``, else 0;
    - ``judge``: a judge's grade on the rubric of correctness, divided by 3; NaN (unscored) where it failed.

    Args:
        log: gets, unless only exact answers are credited, the share of correct answers
            (``rewards/correctness/exact``), the share of open answers denied credit as contradictions
            (``rewards/correctness/guarded``), and per completion the contradiction (``correctness_guard``) and its
            similarity or grade.
        similarity: needed by ``similarity``.
        judge: needed by ``judge``; grades on the rubric of correctness.
    """
    credit = np.array([float(read.is_right) for read in reads])
    if config.open_correctness in (None, "exact"):
        return credit
    log.metrics["rewards/correctness/exact"] = [float(credit.mean())]
    guards = [""] * len(reads)
    compared: dict[int, Read] = {}
    golds: dict[int, list[str]] = {}
    for index, read in enumerate(reads):
        answer = read.parsed.answer
        if read.sample.answer_type == "open" and not read.is_right and answer is not None:
            conflicts = {gold: conflict(answer, gold) for gold in read.sample.answers}
            golds[index] = [gold for gold, found in conflicts.items() if not found]
            if golds[index]:
                compared[index] = read
            else:
                guards[index] = conflicts[read.sample.answer] or ""
    log.columns["correctness_guard"] = guards
    if num_open := sum(read.sample.answer_type == "open" for read in reads):
        log.metrics["rewards/correctness/guarded"] = [sum(map(bool, guards)) / num_open]
    if config.open_correctness == "token_f1":
        for index, read in compared.items():
            credit[index] = answer_f1(read.parsed.answer, golds[index], read.sample.answers_as)
    elif config.open_correctness == "similarity":
        assert similarity is not None, "open_correctness similarity compares texts: pass similarity"
        found = _similarities(compared, golds, similarity)
        for index, value in found.items():
            credit[index] = float(value >= config.similarity_threshold)
        log.columns["correctness_similarity"] = [
            round(found[index], 6) if index in found else None for index in range(len(reads))
        ]
    else:
        assert judge is not None, "open_correctness judge needs a judge of correctness: pass it"
        grades = dict(zip(compared, judge.grade(judge_requests([*compared.values()]))))
        for index, grade in grades.items():
            credit[index] = grade.score / CORRECTNESS.top
        log_grades("correctness", [grades.get(index) for index in range(len(reads))], judge, log)
    return credit


def _similarities(compared: dict[int, Read], golds: dict[int, list[str]], similarity: Compare) -> dict[int, float]:
    """Similarity of answers to their gold answers, by index. Computed separately for each gold answer, so that an
    answer's credit does not depend on the other questions of its step."""
    by_gold: dict[str, list[int]] = {}
    for index in compared:
        for gold in golds[index]:
            by_gold.setdefault(gold, []).append(index)
    found: dict[int, float] = {}
    for gold, indices in by_gold.items():
        answers = [compared[index].parsed.answer or "" for index in indices]
        for index, value in zip(indices, similarity(answers, [gold] * len(indices))):
            found[index] = max(value, found.get(index, -math.inf))
    return found


def unrewardable(config: RewardsConfig, kinds: Iterable[AnswerType]) -> tuple[str | None, str | None]:
    """Check whether exact match alone can reward questions of these types.

    A policy that never samples an open question's gold answer word for word gets no reward to learn from. It is an
    error if all questions are open, unless ``exact`` is set explicitly, and a warning if at least half are.

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
