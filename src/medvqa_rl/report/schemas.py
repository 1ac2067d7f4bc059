"""The fields of a run's files that pages, figures and cards read. Imports no torch."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter

from medvqa_rl.evaluation.judging.judged_results import JUDGED
from medvqa_rl.rewards.attack.results import FILE as ATTACK
from medvqa_rl.rewards.attack.results import RESULT


class _Status(BaseModel):
    kind: str = ""
    state: str = ""
    step: int = 0
    steps: int = 0
    updated: str = ""
    best_accuracy: float | None = None
    best_step: int | None = None
    reason: str | None = None


class _Environment(BaseModel):
    packages: dict[str, str] = {}
    git: dict[str, Any] | None = None


class _Data(BaseModel):
    name: str
    fingerprint: str
    samples: int | None = None
    notes: dict[str, int] = {}


class _CompletionLine(BaseModel):
    step: int
    sample_id: str
    index: int
    question: str
    options: list[str]
    gold: str
    completion: str
    is_correct: bool
    has_answer: bool
    is_truncated: bool
    length: int
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float
    groups: dict[str, Any] = {}


SCHEMAS: dict[str, TypeAdapter[Any]] = {
    "status.json": TypeAdapter(_Status),
    "env.json": TypeAdapter(_Environment),
    "config.resolved.json": TypeAdapter(dict[str, Any]),
    "data.json": TypeAdapter(dict[str, _Data]),
    "judged.json": JUDGED,
    ATTACK: RESULT,
}
"""By the file's name."""
COMPLETION = TypeAdapter(_CompletionLine)
"""A line of samples/step_*.jsonl."""
