"""Grades of an evaluation's answers by one or two judges: how good the answers are, and how far the judges agree.

A judge grades the reasoning from 0 to 3, and the answer, which counts as right if it means the same as the reference
(3). For choice and closed questions the package's scorer is the ground truth, and the judge's agreement with it
measures the judge; open questions are reported separately. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.core.randomness import addresses
from medvqa_rl.evaluation.judging.agreement import agreement
from medvqa_rl.evaluation.judging.instrument import judge_request
from medvqa_rl.evaluation.judging.intervals import mean_interval, share_interval
from medvqa_rl.evaluation.judging.judge_bias import (
    CHECKS,
    EMBEDDED_CHECKS,
    NOT_EMBEDDED,
    Of,
    build_cases,
    level,
    moved,
)
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.raters import kappa_interval
from medvqa_rl.rewards.judges import Grade, Judge
from medvqa_rl.rewards.judges.rubric import REASONING

OFS: tuple[Of, ...] = ("reasoning", "correctness")


@dataclass(frozen=True)
class NamedJudges:
    """One model as judge on each rubric that it can grade."""

    name: str
    judges: Mapping[str, Judge]
    """By rubric: reasoning and, unless it reads reasoning only, correctness."""
    is_embedded: bool
    """Only knows the sentences of the phantom world."""


@dataclass(frozen=True)
class Judged:
    """One model's grades of the records, in their order."""

    judge: NamedJudges
    grades: Mapping[Of, Sequence[Grade]]


def chosen_records(records: Sequence[EvalRecord], count: int | None, seed: int) -> list[EvalRecord]:
    """The scored records in order, at most ``count`` of them. They are chosen by the hash of their ids, so that
    evaluations of the same questions are judged on the same ones."""
    scored = [record for record in records if record.is_scored]
    if count is None or count >= len(scored):
        return scored
    hashes = addresses("judged questions", seed, last=[record.sample_id for record in scored])
    kept = {id for _, id in sorted(zip(hashes, (record.sample_id for record in scored)))[:count]}
    return [record for record in scored if record.sample_id in kept]


def judge_records(records: Sequence[EvalRecord], judge: NamedJudges) -> Judged:
    """Grade all records; reasoning only if any record has some."""
    requests = [judge_request(record) for record in records]
    has_reasoning = any(record.think for record in records)
    used = [of for of in OFS if of in judge.judges and (of == "correctness" or has_reasoning)]
    return Judged(judge, {of: judge.judges[of].grade(requests) for of in used})


def summarise_judged(records: Sequence[EvalRecord], judged: Judged, *, seed: int = 0) -> dict[str, Any]:
    """Summarise one judge's grades.

    Returns:
        ``judge``: its identity, with ``rubrics``, the hash of each; ``counters``; ``reasoning`` (None if none was
        judged): ``n``, ``unscored``, ``scores`` (the count of each), the ``mean`` from 0 to 3, and the mean
        ``of_right`` and ``of_wrong`` answers; ``correctness`` (None if the judge sees no answers): ``n``,
        ``unscored``, ``scores``, ``right`` (share of score 3), and ``against_scorer`` for ``choice and closed`` and
        ``open`` (:func:`agreement`). Shares and means have intervals that resample images.
    """
    used = {of: judged.judge.judges[of] for of in judged.grades}
    identity = next(iter(used.values())).identity
    found: dict[str, Any] = {
        "judge": {
            "name": identity.name,
            "fingerprint": identity.fingerprint,
            "strictness": identity.strictness,
            "rubrics": {of: judge.identity.prompt_hash for of, judge in used.items()},
        },
        "counters": {of: dict(judge.counters) for of, judge in used.items()},
        "reasoning": None,
        "correctness": None,
    }
    if (grades := judged.grades.get("reasoning")) is not None:
        scored = [
            (grade.score, record.image_key, record.is_correct)
            for record, grade in zip(records, grades, strict=True)
            if grade.is_scored
        ]
        found["reasoning"] = _counts(grades) | {
            "mean": mean_interval([(score, image) for score, image, _ in scored], seed=seed),
            "of_right": mean_interval([(score, image) for score, image, is_right in scored if is_right], seed=seed),
            "of_wrong": mean_interval(
                [(score, image) for score, image, is_right in scored if not is_right], seed=seed
            ),
        }
    if (grades := judged.grades.get("correctness")) is not None:
        rows = [
            (record, grade.is_scored, level(grade, "correctness"))
            for record, grade in zip(records, grades, strict=True)
        ]
        against: dict[str, Any] = {}
        for name in ("choice and closed", "open"):
            some = [(record, value) for record, _, value in rows if (record.answer_type == "open") == (name == "open")]
            if some:
                labels = [bool(record.is_correct) for record, _ in some]
                images = [record.image_key for record, _ in some]
                against[name] = agreement(labels, [value for _, value in some], images, seed=seed)
        found["correctness"] = _counts(grades) | {
            "right": share_interval(
                [(value == 1, record.image_key) for record, is_in, value in rows if is_in], seed=seed
            ),
            "against_scorer": against,
        }
    return found


def _counts(grades: Sequence[Grade]) -> dict[str, Any]:
    scores = Counter(int(grade.score) for grade in grades if grade.is_scored)
    failures = Counter(grade.reason for grade in grades if not grade.is_scored)
    return {
        "n": len(grades),
        "unscored": failures.total(),
        "failures": dict(failures.most_common(5)),
        "scores": {str(score): scores[score] for score in range(REASONING.top + 1)},
    }


def summarise_agreement(
    records: Sequence[EvalRecord], first: Judged, second: Judged, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Agreement of two judges for each rubric both graded on: ``n`` (scored by both), ``same`` (share) and Cohen's
    ``kappa`` (with quadratic weights for reasoning), with intervals that resample images; None if nothing was scored
    by both."""
    found: dict[str, dict[str, Any]] = {}
    for of in OFS:
        if of not in first.grades or of not in second.grades:
            continue
        rows = [
            (int(level(one, of)), int(level(other, of)), record.image_key)
            for record, one, other in zip(records, first.grades[of], second.grades[of], strict=True)
            if one.is_scored and other.is_scored
        ]
        kappa = None
        if rows:
            ones, others, images = zip(*rows)
            levels = len(REASONING.levels) if of == "reasoning" else 2
            # With two levels both scales are the same.
            kappa = kappa_interval(ones, others, images, levels=levels, scale="interval", seed=seed).to_json()
        same = share_interval([(one == other, image) for one, other, image in rows], seed=seed)
        found[of] = {"n": len(rows), "same": same, "kappa": kappa}
    return found


def check_bias(records: Sequence[EvalRecord], judge: NamedJudges, *, seed: int = 0) -> dict[str, Any]:
    """Check a judge for biases by having edited cases graded.

    Returns:
        ``checks``: the result of :func:`medvqa_rl.evaluation.judging.judge_bias.moved` for each check that applies;
        ``left_out``: a sentence for each of the others.
    """
    cases = [(record, judge_request(record)) for record in records]
    found, left_out = [], [NOT_EMBEDDED] if judge.is_embedded else []
    for check in EMBEDDED_CHECKS if judge.is_embedded else CHECKS:
        if check.of not in judge.judges:
            continue
        plain, edited, images = build_cases(check, cases, seed)
        if not plain:
            left_out.append(f"{check.of}, {check.name}: no answer is of a kind that this edit applies to.")
            continue
        grades = judge.judges[check.of].grade([*plain, *edited])
        found.append(moved(check, grades[: len(plain)], grades[len(plain) :], images, seed=seed))
    return {"checks": found, "left_out": left_out}
