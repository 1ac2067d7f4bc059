"""The schema of ``judged.json``: the fields that tables, reports and cards read. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, TypeAdapter

Number = float | None
"""None where it is not defined."""


class _Interval(BaseModel):
    estimate: Number
    low: Number
    high: Number


class _Agreement(BaseModel):
    n: int
    label_yes_rate: Number
    accuracy: _Interval | None
    kappa: _Interval | None
    false_yes_rate: _Interval | None
    false_no_rate: _Interval | None


class _Reasoning(BaseModel):
    unscored: int
    scores: dict[str, int]
    mean: _Interval | None
    of_right: _Interval | None
    of_wrong: _Interval | None


class _Correctness(BaseModel):
    unscored: int
    right: _Interval | None
    against_scorer: dict[str, _Agreement]


class _Check(BaseModel):
    check: str
    of: str
    n: int
    unscored: int
    changed: _Interval | None
    raised: _Interval | None
    lowered: _Interval | None
    p: Number


class _Bias(BaseModel):
    checks: list[_Check]
    left_out: list[str]


class _Judge(BaseModel):
    name: str
    fingerprint: str
    strictness: float
    rubrics: dict[str, str]


class _OneJudge(BaseModel):
    judge: _Judge
    reasoning: _Reasoning | None
    correctness: _Correctness | None
    bias: _Bias | None


class _Evaluation(BaseModel):
    dataset: str
    template: str
    judged: int
    images: int


class _SameGrades(BaseModel):
    n: int
    same: _Interval | None
    kappa: _Interval | None


class _Judged(BaseModel):
    evaluation: _Evaluation
    judges: list[_OneJudge]
    agreement: dict[str, _SameGrades] | None
    warnings: list[str]


JUDGED = TypeAdapter(_Judged)
