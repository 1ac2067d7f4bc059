"""Answers of an evaluation judged by one or two language models: how good, and how far the two agree. No torch.

A judge grades on the rubrics of :mod:`rubric`: the reasoning from 0 to 3, and the answer, which
counts as right where it means the same as the reference (3). For choice and closed questions the package's scorer is
the reference, and the judge's agreement with it is a measure of the judge; open questions are reported apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.core.randomness import addresses
from medvqa_rl.evaluation.judging.agreement import agreement_with
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
from medvqa_rl.evaluation.statistics.stats import cluster_bootstrap, proportion_interval
from medvqa_rl.rewards.judges.rubric import TOP, Grade, Grader, GradeRequest

OFS: tuple[Of, ...] = ("reasoning", "correctness")


@dataclass(frozen=True)
class RubricJudge:
    """A judge with what it can grade."""

    name: str
    graders: Mapping[str, Grader]
    """By rubric: reasoning and, unless it sees the reasoning alone, correctness."""
    is_embedded: bool
    """Knows the sentences of the phantom world alone."""


@dataclass(frozen=True)
class Judged:
    """What one judge said of the records, in their order."""

    judge: RubricJudge
    grades: Mapping[Of, Sequence[Grade]]


def grade_request(record: EvalRecord) -> GradeRequest:
    """What a grader is shown of a record: question, options, gold answer, what the model said, and of the image what
    the data set has in words."""
    answer, think = record.answer or "", record.think or ""
    return GradeRequest(record.question, record.options, record.reference, answer, think, record.description)


def chosen_records(records: Sequence[EvalRecord], count: int | None, seed: int) -> list[EvalRecord]:
    """The scored ones in their order, of too many a choice by the hash of their ids, so that evaluations of the same
    questions are judged on the same ones."""
    scored = [record for record in records if record.is_scored]
    if count is None or count >= len(scored):
        return scored
    hashes = addresses("judged questions", seed, last=[record.sample_id for record in scored])
    kept = {id for _, id in sorted(zip(hashes, (record.sample_id for record in scored)))[:count]}
    return [record for record in scored if record.sample_id in kept]


def judge_records(records: Sequence[EvalRecord], judge: RubricJudge) -> Judged:
    """Ask a judge about all records; about reasoning only where there is any in one of them."""
    requests = [grade_request(record) for record in records]
    has_reasoning = any(record.think for record in records)
    return Judged(
        judge,
        {
            of: judge.graders[of].grade(requests)
            for of in OFS
            if of in judge.graders and (of == "correctness" or has_reasoning)
        },
    )


def summarise_judged(records: Sequence[EvalRecord], judged: Judged, *, seed: int = 0) -> dict[str, Any]:
    """What a judge found.

    Returns:
        ``judge``: its identity, with ``rubrics``, the hash of each; ``counters``; ``reasoning`` (None where none was
        judged): ``n``, ``unscored``, ``scores`` (how often each), ``mean`` of 0 to 3, and that ``of_right`` and
        ``of_wrong`` answers; ``correctness`` (None where the judge sees no answers): ``n``, ``unscored``, ``scores``,
        ``right`` (share of score 3), and ``against_scorer`` by ``choice and closed`` and ``open``
        (:func:`agreement_with`). Shares and means with intervals that resample images.
    """
    graders = {of: judged.judge.graders[of] for of in judged.grades}
    identity = next(iter(graders.values())).identity
    found: dict[str, Any] = {
        "judge": {
            "name": identity.name,
            "fingerprint": identity.fingerprint,
            "strictness": identity.strictness,
            "rubrics": {of: grader.identity.prompt_hash for of, grader in graders.items()},
        },
        "counters": {of: dict(grader.counters) for of, grader in graders.items()},
        "reasoning": None,
        "correctness": None,
    }
    if (grades := judged.grades.get("reasoning")) is not None:
        found["reasoning"] = _counts(grades) | {
            "mean": _mean(records, grades, None, seed),
            "of_right": _mean(records, grades, True, seed),
            "of_wrong": _mean(records, grades, False, seed),
        }
    if (grades := judged.grades.get("correctness")) is not None:
        verdicts = [level(grade, "correctness") for grade in grades]
        rows = list(zip(records, verdicts))
        known = [(record.image_key, value == 1) for record, value in rows if not math.isnan(value)]
        right = (
            proportion_interval([flag for _, flag in known], [image for image, _ in known], seed=seed).to_json()
            if known
            else None
        )
        parts = {
            "choice and closed": [row for row in rows if row[0].answer_type != "open"],
            "open": [row for row in rows if row[0].answer_type == "open"],
        }
        found["correctness"] = _counts(grades) | {
            "right": right,
            "against_scorer": {
                name: agreement_with(
                    [bool(record.is_correct) for record, _ in some],
                    [value for _, value in some],
                    [record.image_key for record, _ in some],
                    seed=seed,
                )
                for name, some in parts.items()
                if some
            },
        }
    return found


def _counts(grades: Sequence[Grade]) -> dict[str, Any]:
    scores = Counter(int(grade.score) for grade in grades if not math.isnan(grade.score))
    failures = Counter(grade.reason for grade in grades if math.isnan(grade.score))
    return {
        "n": len(grades),
        "unscored": failures.total(),
        "failures": dict(failures.most_common(5)),
        "scores": {str(score): scores[score] for score in range(TOP + 1)},
    }


def _mean(
    records: Sequence[EvalRecord], grades: Sequence[Grade], is_correct: bool | None, seed: int
) -> dict[str, float] | None:
    some = [
        (grade.score, record.image_key)
        for record, grade in zip(records, grades, strict=True)
        if not math.isnan(grade.score) and (is_correct is None or record.is_correct == is_correct)
    ]
    if not some:
        return None
    return cluster_bootstrap([score for score, _ in some], [image for _, image in some], seed=seed).to_json()


def summarise_agreement(
    records: Sequence[EvalRecord], first: Judged, second: Judged, *, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """How far two judges agree, by what both graded: ``n`` (scored by both), ``same`` (share) and Cohen's ``kappa``
    (quadratic weights for the 0 to 3 of reasoning), with intervals that resample images; None where nothing was scored
    by both."""
    found: dict[str, dict[str, Any]] = {}
    for of in OFS:
        if of not in first.grades or of not in second.grades:
            continue
        rows = [
            (int(one), int(other), record.image_key)
            for record, a, b in zip(records, first.grades[of], second.grades[of], strict=True)
            if not math.isnan(one := level(a, of)) and not math.isnan(other := level(b, of))
        ]
        ones, others, images = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
        levels = TOP + 1 if of == "reasoning" else 2
        found[of] = {"n": len(rows), "same": None, "kappa": None}
        if rows:
            same = proportion_interval([one == other for one, other in zip(ones, others)], images, seed=seed)
            # With two levels both scales are the same.
            kappa = kappa_interval(ones, others, images, levels=levels, scale="interval", seed=seed)
            found[of] |= {"same": same.to_json(), "kappa": kappa.to_json()}
    return found


def check_bias(records: Sequence[EvalRecord], judge: RubricJudge, *, seed: int = 0) -> dict[str, Any]:
    """Ask a judge about edited cases.

    Returns:
        ``checks``: what :func:`medvqa_rl.evaluation.judging.judge_bias.moved` says of each that applies; ``left_out``:
        sentences about those that do not.
    """
    cases = [(record, grade_request(record)) for record in records]
    found, left_out = [], [NOT_EMBEDDED] if judge.is_embedded else []
    for check in EMBEDDED_CHECKS if judge.is_embedded else CHECKS:
        if check.of not in judge.graders:
            continue
        plain, edited, images = build_cases(check, cases, seed)
        if not plain:
            left_out.append(f"{check.of}, {check.name}: no answer is of a kind that this edit applies to.")
            continue
        grades = judge.graders[check.of].grade([*plain, *edited])
        found.append(moved(check, grades[: len(plain)], grades[len(plain) :], images, seed=seed))
    return {"checks": found, "left_out": left_out}
