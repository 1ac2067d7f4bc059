"""Rewards for reasoning judged by a language model: coherence (Yes or No) and a grade on a rubric. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.config import RewardsConfig
from medvqa_rl.config.rollout_and_rewards import Sees
from medvqa_rl.core.answers import Read
from medvqa_rl.core.prompts import asks_reasoning
from medvqa_rl.core.types import Sample
from medvqa_rl.rewards.functions import RewardLog
from medvqa_rl.rewards.judges import Grade, Judge, JudgeRequest
from medvqa_rl.rewards.judges.protocol import seen
from medvqa_rl.rewards.judges.rubric import REASONING


def judge_requests(reads: Sequence[Read]) -> list[JudgeRequest]:
    """The cases that a judge grades: question, options and gold answer, what the completion says, the data set's
    description of the image, and the image. Reasoning whose tags are missing, unclosed or repeated is empty."""
    images = {id(read.sample): seen(read.sample.images) for read in reads}  # decoded once per prompt
    return [
        JudgeRequest(
            read.sample.question,
            read.sample.options,
            read.parsed.think or "",
            read.parsed.answer or "",
            read.sample.reference,
            read.sample.description,
            images[id(read.sample)],
        )
        for read in reads
    ]


def score_semantic(reads: Sequence[Read], judge: Judge, log: RewardLog) -> NDArray[np.float64]:
    """(B,) 1 where the judge finds the reasoning clinically coherent, else 0; NaN (unscored) where it failed.

    The judge reads question, options and reasoning and says Yes if log P("Yes") > log P("No"); empty reasoning is 0.
    From arXiv 2505.13973, whose judge prompt is not published: ours are in :mod:`medvqa_rl.rewards.judges.prompts`.

    Args:
        log: gets, per completion, the judge (``judge``), its ``judge_margin`` and ``judge_failure``; and its counters.
    """
    grades = judge.grade(judge_requests(reads))
    log.columns["judge"] = [str(judge.identity)] * len(grades)
    log.columns["judge_margin"] = [None if math.isnan(grade.margin) else round(grade.margin, 6) for grade in grades]
    if not all(grade.is_scored for grade in grades):
        log.columns["judge_failure"] = ["" if grade.is_scored else grade.reason for grade in grades]
    for name, total in judge.counters.items():
        log.metrics[f"judge/{name}"] = [float(total)]
    return np.array([grade.score for grade in grades])


def gated(value: float, correctness: float, gate: float) -> float:
    """Limit a reward for reasoning by the answer's correctness: min(value, gate + (1 - gate) * correctness).

    Without the gate, a policy that cannot find the answer learns to argue well for a wrong one. A correct answer
    (1) is not limited, a wrong one (0) gets at most the gate, and partial credit is interpolated.

    Args:
        value: reward for the reasoning, in [0, 1]; NaN stays NaN.
        correctness: of the answer, in [0, 1]; NaN (unscored) gives NaN unless the gate is 1.
        gate: the most that a wrong answer can get, in [0, 1].
    """
    if math.isnan(value) or (math.isnan(correctness) and gate < 1):
        return math.nan
    return value if gate >= 1 else min(value, gate + (1 - gate) * correctness)


def log_grades(name: str, grades: Sequence[Grade | None], judge: Judge, log: RewardLog) -> None:
    """Log ``{name}_score``, ``{name}_reason`` and ``{name}_judge`` per completion (None where the judge was not
    asked), and the judge's counters as ``judge/{name}/...``."""
    log.columns[f"{name}_judge"] = [None if grade is None else str(judge.identity) for grade in grades]
    log.columns[f"{name}_score"] = [
        int(grade.score) if grade is not None and grade.is_scored else None for grade in grades
    ]
    log.columns[f"{name}_reason"] = [None if grade is None else grade.reason for grade in grades]
    for counter, total in judge.counters.items():
        log.metrics[f"judge/{name}/{counter}"] = [float(total)]


def score_reasoning(
    reads: Sequence[Read], judge: Judge, correctness: NDArray[np.float64], gate: float, log: RewardLog
) -> NDArray[np.float64]:
    """(B,) grade of the reasoning, from 0 to 1, limited by :func:`gated`; NaN (unscored) where the judge failed.

    Completions of a prompt that asks for no reasoning get 0 and are not graded. This penalises none of them: a group
    answers one prompt, and a constant over the group does not change its advantages.

    A reward for reasoning quality beside the answer as in RARL (arXiv 2506.06600), whose formula is not published: the
    rubric (:data:`medvqa_rl.rewards.judges.rubric.REASONING`), the mapping score / 3 and the gate are ours.

    Args:
        correctness: (B,) credit for the answers, in [0, 1].
        gate: the most that a wrong answer can get.
        log: gets what :func:`log_grades` logs, and the mean grade before the gate: of all completions
            (``rewards/reasoning/ungated``) and of those without any credit (``rewards/reasoning/ungated_wrong``).
    """
    is_asked = np.array([asks_reasoning(read.template) for read in reads])
    requests = judge_requests([read for read, asked in zip(reads, is_asked) if asked])
    given = iter(judge.grade(requests) if requests else [])
    grades = [next(given) if asked else None for asked in is_asked]
    log_grades("reasoning", grades, judge, log)
    values = np.array([0.0 if grade is None else grade.score / REASONING.top for grade in grades])
    known = ~np.isnan(values) & is_asked
    for name, chosen in (("ungated", known), ("ungated_wrong", known & (correctness == 0))):
        if chosen.any():
            log.metrics[f"rewards/reasoning/{name}"] = [float(values[chosen].mean())]
    return np.array([gated(value, right, gate) for value, right in zip(values.tolist(), correctness.tolist())])


def unseen(config: RewardsConfig, sees: Sees, samples: Sequence[Sample]) -> tuple[str | None, str | None]:
    """Check that the questions provide what the judge is set to see, and images for the looking reward.

    Returns:
        An error and a warning, each a sentence or None.
    """
    if config.looking and not any(sample.images for sample in samples):
        return f"rewards.looking is {config.looking:g}, but no training question has an image: set it to 0.", None
    missing = sum(not (sample.description if sees == "description" else sample.images) for sample in samples)
    if sees == "text" or not missing or not config.judged.keys() - {"correctness"}:
        return None, None
    what = "description of the image" if sees == "description" else "image"
    if missing < len(samples):
        return None, f"Warning: {missing / len(samples):.0%} of the training questions have no {what} for the judge."
    remedy = " or image, or name its column with data.columns.description" if sees == "description" else ""
    return f"judge.sees is {sees}, but no training question has one: set judge.sees=text{remedy}.", None
