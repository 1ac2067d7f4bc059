"""The process reward: each step of a reasoning judged by itself, for the advantages of its tokens. Imports no torch.

Steps are the statements of the reasoning (:mod:`medvqa_rl.rewards.statements`): its sentences, or the items of a list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medvqa_rl.core.answers import Read
from medvqa_rl.rewards.functions import RewardLog
from medvqa_rl.rewards.judged import judge_requests
from medvqa_rl.rewards.judges import Judge, JudgeRequest
from medvqa_rl.rewards.statements import split_statements


@dataclass(frozen=True)
class Step:
    """A judged step of a completion."""

    start: int
    """Where it begins in the completion's text, in characters."""
    end: int
    validity: float
    """1 if the judge finds it valid, else 0; NaN if the judge failed."""


def judge_steps(reads: Sequence[Read], judge: Judge, log: RewardLog) -> list[list[Step]]:
    """Have every step of every completion judged, given the steps before it.

    Args:
        log: gets ``process_steps`` per completion (the verdicts in order, None where the judge failed), the mean
            numbers of steps and of invalid ones per completion (``rewards/process/steps`` and ``.../invalid``), and
            the judge's counters as ``judge/step/...``.
    """
    requests: list[JudgeRequest] = []
    places: list[list[tuple[int, int]]] = []
    for read, request in zip(reads, judge_requests(reads)):
        think = read.parsed.think or ""
        text, tag = read.completion.text, read.wording.think[0]
        first = text.index(think, text.index(tag) + len(tag)) if think else 0
        steps = split_statements(think)
        requests += [replace(request, reasoning=think[: step.end], step=step.text) for step in steps]
        places.append([(first + step.start, first + step.end) for step in steps])
    grades = iter(judge.grade(requests) if requests else [])
    found = [[Step(start, end, next(grades).score) for start, end in own] for own in places]
    log.columns["process_steps"] = [
        [None if math.isnan(step.validity) else int(step.validity) for step in steps] for steps in found
    ]
    invalid = sum(step.validity == 0 for steps in found for step in steps)
    log.metrics["rewards/process/steps"] = [sum(map(len, found)) / len(found)]
    log.metrics["rewards/process/invalid"] = [invalid / len(found)]
    for counter, total in judge.counters.items():
        log.metrics[f"judge/step/{counter}"] = [float(total)]
    return found


def process_score(validities: Sequence[float], discount: float) -> float:
    """The weighted share of valid steps, from 0 to 1: sum of w_k * v_k / sum of w_k with w_k = discount^(k - 1).

    An earlier invalid step costs more. Without steps it is 0; with a failed verdict, which is NaN, it is NaN.
    """
    weights = [discount**place for place in range(len(validities))]
    return sum(w * v for w, v in zip(weights, validities)) / sum(weights) if validities else 0.0


def step_advantages(validities: Sequence[Sequence[float]], discount: float) -> list[list[float]]:
    """Advantages of the steps of one group's completions, each from -1 to 1.

    a_ik = w_k * (v_ik - m), with w_k = discount^(k - 1) and m the weighted share of valid steps of the whole group,
    sum of w_k * v_ik / sum of w_k, so that they sum to 0 over the group. A valid step never gets less than 0, an
    invalid one never more, and a group whose steps are all valid, or all invalid, gets 0. The steps of a completion
    with a failed verdict (NaN) get 0 and do not count. The idea of judging steps is that of process supervision
    (DeepSeekMath, arXiv 2402.03300, section 4.1.3); the formula is ours.

    Args:
        validities: for each completion, 1 or 0 for each of its steps.
        discount: weight of a step relative to the one before it, above 0 and at most 1.
    """
    counted = [[] if any(map(math.isnan, own)) else own for own in validities]
    total = sum(discount**place for own in counted for place in range(len(own)))
    valid = sum(discount**place * value for own in counted for place, value in enumerate(own))
    mean = valid / total if total else 0.0
    if valid in (0.0, total):  # not by rounding
        return [[0.0] * len(own) for own in validities]
    return [
        [discount**place * (value - mean) for place, value in enumerate(own)] if kept else [0.0] * len(own)
        for own, kept in zip(validities, counted)
    ]
