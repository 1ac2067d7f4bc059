"""A record of an evaluation for tests that care about a few of its fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from medvqa_rl.evaluation.records import EvalRecord

_BASE = EvalRecord(
    sample_id="q",
    image_key="image",
    question="Which organ?",
    options=(),
    gold="yes",
    output="",
    think=None,
    answer=None,
    is_correct=False,
    is_well_formed=True,
    has_answer=True,
    is_truncated=False,
    num_tokens=3,
    token_f1=None,
    answer_type="closed",
)


def make_record(**changes: Any) -> EvalRecord:
    """Return a well-formed, wrong answer to a closed question, with fields changed. Options make it a choice."""
    return replace(_BASE, **{"answer_type": "choice" if changes.get("options") else "closed", **changes})
