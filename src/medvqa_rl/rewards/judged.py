"""Rewards for reasoning judged by a language model: the semantic verdict and the graded reasoning. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.prompts import as_asked, asks_reasoning
from medvqa_rl.core.types import Completion, Group, Sample, Template
from medvqa_rl.rewards.functions import FunctionLog
from medvqa_rl.rewards.judges.protocol import Judge, JudgeRequest
from medvqa_rl.rewards.judges.rubric import Grade, Grader, GradeRequest


def judge_request(sample: Sample, text: str, template: Template = "think_answer") -> JudgeRequest:
    """What a judge is shown of a completion: question, options and the text inside the think tags, which is empty
    where they are missing, unclosed or not unique."""
    return JudgeRequest(sample.question, sample.options, parse_completion(text, template).think or "")


def score_semantic(groups: Sequence[Group], judge: Judge, log: FunctionLog) -> NDArray[np.float64]:
    """1 where the judge says that the reasoning is clinically coherent, else 0; NaN (unscored) where it failed.

    A language model reads question, options and reasoning, and says Yes where log P("Yes") > log P("No"); empty
    reasoning is 0. From arXiv 2505.13973, whose judge prompt is not known: ours are in
    :mod:`medvqa_rl.rewards.judges.prompts`.

    Args:
        log: gets, per completion, the margin, why a verdict failed and whose it is; and the judge's counters.

    Returns:
        (B,) values, prompt by prompt.
    """
    requests = [
        judge_request(group.sample, completion.text, group.template)
        for group in groups
        for completion in group.completions
    ]
    verdicts = judge.judge(requests)
    log.columns["judge"] = [str(judge.identity)] * len(verdicts)
    log.columns["judge_margin"] = [None if math.isnan(v.margin) else round(v.margin, 6) for v in verdicts]
    if any(verdict.reason for verdict in verdicts):
        log.columns["judge_failure"] = [verdict.reason for verdict in verdicts]
    for name, total in judge.counters.items():
        log.metrics[f"judge/{name}"] = [float(total)]
    return np.array([verdict.value for verdict in verdicts], dtype=np.float64)


def gated(value: float, correctness: float, gate: float) -> float:
    """What counts of a reward for reasoning: min(value, gate + (1 - gate) * correctness).

    Without a limit a policy that cannot find the answer learns to argue well for a wrong one. A right answer
    (correctness 1) is not limited, a wrong one (0) by the gate, partial credit in between.

    Args:
        value: of the reasoning, in [0, 1]; NaN stays NaN.
        correctness: of the answer, in [0, 1]; NaN (unscored) gives NaN unless nothing is limited (gate 1).
        gate: the most that a wrong answer can get, in [0, 1].
    """
    if math.isnan(value) or (math.isnan(correctness) and gate < 1):
        return math.nan
    return value if gate >= 1 else min(value, gate + (1 - gate) * correctness)


def grade_request(group: Group, completion: Completion) -> GradeRequest:
    """What a grader is shown of a completion: the question as it was asked, its options and gold answer, the
    description of the image where the data has one, and what the completion says."""
    sample, parsed = as_asked(group.sample, group.template), parse_completion(completion.text, group.template)
    gold = f"{sample.answer}: {sample.answer_text}" if sample.answer_type == "choice" else sample.answer
    answer, think = parsed.answer or "", parsed.think or ""
    return GradeRequest(sample.question, sample.options, gold, answer, think, sample.description)


def log_grades(name: str, grades: Sequence[Grade | None], grader: Grader, log: FunctionLog) -> None:
    """Put per completion ``{name}_score``, ``{name}_reason`` and ``{name}_judge`` into the log (None where nobody was
    asked), and the grader's counters as ``judge/{name}/...``."""
    scored = [grade if grade is not None and not math.isnan(grade.score) else None for grade in grades]
    log.columns[f"{name}_judge"] = [None if grade is None else str(grader.identity) for grade in grades]
    log.columns[f"{name}_score"] = [None if grade is None else int(grade.score) for grade in scored]
    log.columns[f"{name}_reason"] = [None if grade is None else grade.reason for grade in grades]
    for counter, total in grader.counters.items():
        log.metrics[f"judge/{name}/{counter}"] = [float(total)]


def score_reasoning(
    groups: Sequence[Group],
    grader: Grader,
    correctness: NDArray[np.float64],
    gate: float,
    log: FunctionLog,
) -> NDArray[np.float64]:
    """The grade of the reasoning from 0 to 1, limited by :func:`gated`; NaN (unscored) where the grader failed.

    Completions of a prompt that asks for no reasoning all get 0, without a grade. That punishes none of them: a group
    answers one prompt, and what is the same for the whole group leaves its advantages as they are.

    A reward for reasoning quality beside the answer as in RARL (arXiv 2506.06600), whose formula is not known: the
    rubric (:data:`medvqa_rl.rewards.judges.rubric.REASONING`), its mapping score / 3 and the gate are ours.

    Args:
        correctness: (B,) of the answers, in [0, 1].
        gate: the most that a wrong answer can get.
        log: gets what :func:`log_grades` logs, and the means of grades before the gate: ``rewards/reasoning/ungated``,
            and of answers without any credit ``rewards/reasoning/ungated_wrong``.

    Returns:
        (B,) values, prompt by prompt.
    """
    asked = [asks_reasoning(group.template) for group in groups for _ in group.completions]
    shown = [group for group in groups if asks_reasoning(group.template)]
    requests = [grade_request(group, one) for group in shown for one in group.completions]
    given = iter(grader.grade(requests) if requests else ())
    grades = [next(given) if is_asked else None for is_asked in asked]
    log_grades("reasoning", grades, grader, log)
    values = np.array([0.0 if grade is None else grade.value for grade in grades])
    known = ~np.isnan(values) & np.array(asked)
    for name, chosen in (("ungated", known), ("ungated_wrong", known & (correctness == 0))):
        if chosen.any():
            log.metrics[f"rewards/reasoning/{name}"] = [float(values[chosen].mean())]
    return np.array([gated(value, right, gate) for value, right in zip(values.tolist(), correctness.tolist())])
