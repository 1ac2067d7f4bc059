"""How sure a model is of its answers, and whether it is right as often as it is sure. Imports no torch.

The confidence in an answer is its probability under the model, given the prompt and the reasoning before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.answers import Decode, compared, token_span
from medvqa_rl.core.text import is_abstention
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import cluster_bootstrap

BINS = 10
COVERAGES = (0.9, 0.8, 0.5)
"""Shares of the questions, those of highest confidence, whose accuracy is reported."""


def answer_probability(
    token_ids: Sequence[int],
    logps: Sequence[float],
    span: tuple[int, int],
    decode: Decode,
) -> float | None:
    """Probability of an answer given what comes before it: the product over the tokens that overlap its text.

    Args:
        token_ids: of the completion.
        logps: log-probability of each.
        span: where the answer begins and ends in the decoded tokens (:func:`medvqa_rl.core.answers.answer_span`).
        decode: decodes tokens as the completion's text was.

    Returns:
        The probability, or None if a log-probability is unknown or the tokens cannot be told apart, because the text
        of the first of them is not a beginning of the whole text.
    """
    start, stop = token_span(token_ids, *span, decode)
    if start >= stop or not decode(token_ids).startswith(decode(token_ids[:start])):
        return None
    total = math.fsum(logps[start:stop])
    return None if math.isnan(total) else min(1.0, math.exp(total))


def expected_calibration_error(
    confidences: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, equation 3).

    sum over bins of n_b / n * |accuracy_b - confidence_b|, where bin b of B holds the confidences in
    ((b - 1) / B, b / B], and 0 belongs to the first.

    Returns:
        The error, NaN without answers, and ``n``, mean ``confidence`` and ``accuracy`` of each bin that has answers,
        with its bounds ``low`` and ``high``.
    """
    members: dict[int, list[tuple[float, bool]]] = {}
    for confidence, is_right in zip(confidences, right, strict=True):
        members.setdefault(max(0, math.ceil(confidence * bins) - 1), []).append((confidence, is_right))
    rows = [
        {
            "low": index / bins,
            "high": (index + 1) / bins,
            "n": len(found),
            "confidence": fmean(confidence for confidence, _ in found),
            "accuracy": fmean(float(is_right) for _, is_right in found),
        }
        for index, found in sorted(members.items())
    ]
    if not rows:
        return math.nan, []
    total = math.fsum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return total / len(confidences), rows


def auroc(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """Probability that a right answer has a higher confidence than a wrong one, ties counted half; NaN if all answers
    are right, or all wrong."""
    num_right = sum(right)
    num_wrong = len(right) - num_right
    if not num_right or not num_wrong:
        return math.nan
    won, wrong_below = 0.0, 0
    for tied in _blocks(confidences, right, descending=False):
        tied_right = sum(tied)
        won += tied_right * (wrong_below + (len(tied) - tied_right) / 2)
        wrong_below += len(tied) - tied_right
    return won / (num_right * num_wrong)


def risks(confidences: Sequence[float], right: Sequence[bool]) -> list[float]:
    """Share of wrong answers among the k of highest confidence, for k = 1 ... n: the risk at coverage k / n.

    Answers of equal confidence are taken in random order, of which this is the expectation.
    """
    found: list[float] = []
    wrong = 0.0
    for tied in _blocks(confidences, right, descending=True):
        share = 1 - sum(tied) / len(tied)
        for _ in tied:
            wrong += share
            found.append(wrong / (len(found) + 1))
    return found


def _blocks(confidences: Sequence[float], right: Sequence[bool], *, descending: bool) -> list[list[bool]]:
    """Answers of equal confidence together, in the order of their confidence."""
    ordered = sorted(zip(confidences, right, strict=True), key=lambda pair: pair[0], reverse=descending)
    return [[is_right for _, is_right in block] for _, block in groupby(ordered, key=lambda pair: pair[0])]


def abstains(record: EvalRecord) -> bool:
    """Whether an answer declines to answer ("cannot tell") where that is not the gold answer."""
    return record.answer is not None and not record.is_correct and is_abstention(record.answer)


def confidence_summary(records: Sequence[EvalRecord], config: EvalConfig) -> dict[str, Any]:
    """Summarise confidence and abstention over the scored questions.

    Returns:
        ``n``: answers whose confidence is known; ``mean``: their mean confidence; ``accuracy``: theirs;
        ``brier``: mean of (confidence - right)^2 (Brier 1950), with the interval ``brier_low`` to ``brier_high``
        (images resampled); ``ece`` with its ``bins`` (:func:`expected_calibration_error`); ``auroc``
        (:func:`auroc`); ``aurc``: area under risk against coverage, the mean of :func:`risks` (Geifman and El-Yaniv
        2017, arXiv 1705.08500); ``accuracy_at``: coverage -> accuracy of that share of highest confidence.
        ``votes``: the same for another confidence, the share of the sampled answers that vote as the greedy answer
        does (self-consistency); empty without sampled answers.
        ``abstained``: share of the scored questions in which the model declines to answer, and
        ``accuracy_answered``: accuracy of the others. What does not apply is NaN.
    """
    scored = [record for record in records if record.is_scored]
    votes = [(record, vote_share(record)) for record in scored if record.sampled]
    answered = [float(bool(record.is_correct)) for record in scored if not abstains(record)]
    return {
        **_reliability([(record, record.answer_probability) for record in scored], config),
        "votes": _reliability(votes, config) if votes else {},
        "abstained": 1 - len(answered) / len(scored) if scored else math.nan,
        "accuracy_answered": fmean(answered) if answered else math.nan,
    }


def vote_share(record: EvalRecord) -> float | None:
    """Share of the sampled answers whose vote is that of the greedy answer; None without an answer to vote for."""
    if record.is_correct:
        return fmean(float(answer.is_correct) for answer in record.sampled)
    vote = record.choice
    if record.answer_type != "choice" and record.answer is not None:
        vote = compared(record.answer, record.answers_as) or record.answer.strip()
    return None if vote is None else fmean(float(answer.vote == vote) for answer in record.sampled)


def _reliability(answers: Sequence[tuple[EvalRecord, float | None]], config: EvalConfig) -> dict[str, Any]:
    """The numbers of :func:`confidence_summary` for one confidence."""
    known = [record for record, confidence in answers if confidence is not None]
    sure = [confidence for _, confidence in answers if confidence is not None]
    right = [bool(record.is_correct) for record in known]
    summary: dict[str, Any] = {
        "n": len(known),
        "mean": fmean(sure) if sure else math.nan,
        "accuracy": fmean(map(float, right)) if right else math.nan,
        **dict.fromkeys(("brier", "brier_low", "brier_high", "ece", "auroc", "aurc"), math.nan),
        "accuracy_at": {},
        "bins": [],
    }
    if not known:
        return summary
    interval = cluster_bootstrap(
        [(confidence - is_right) ** 2 for confidence, is_right in zip(sure, right, strict=True)],
        [record.image_key for record in known],
        resamples=config.bootstrap,
        seed=config.seed,
        method=config.interval,
    )
    risk = risks(sure, right)
    error, bins = expected_calibration_error(sure, right)
    return summary | {
        "brier": interval.estimate,
        "brier_low": interval.low,
        "brier_high": interval.high,
        "ece": error,
        "auroc": auroc(sure, right),
        "aurc": fmean(risk),
        "accuracy_at": {f"{share:g}": 1 - risk[max(1, round(share * len(risk))) - 1] for share in COVERAGES},
        "bins": bins,
    }
