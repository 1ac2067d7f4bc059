"""What answers say, counted by hand.

Run: pytest tests/dev/test_said.py
"""

from __future__ import annotations

import math

import pytest

from dev.said import said, speed
from tests.records import make_record

RIGHT = "The modality is MRI. There is a cyst: count one, size small, lower left. So the answer is cyst A."
TWICE = "The modality is CT. The modality is CT. So the answer is CT B."
BOTH = "The modality is CT. The modality is MRI. There is a cyst: count,,, size small. So the answer is CT B."


def test_what_answers_say() -> None:
    texts = [(RIGHT, True, 2), (TWICE, False, 1), (BOTH, False, 1), (None, True, None)]
    records = [
        make_record(output=think or "", think=think, is_correct=is_correct, distinct_truths=truths)
        for think, is_correct, truths in texts
    ]
    found = said(records)
    assert found == pytest.approx(
        {
            "claims per reasoning": (2 + 2 + 2 + 0) / 4,
            "different true claims": 1.0,
            "coherent": 25,
            "repetition": 25,
            "contradiction": 25,
            "names modality": 75,
            "names organ": 0,
            "names finding": 25,
            "names absent": 0,
            "names clear": 0,
            "imitates finding": 25,
            # 14 words have 11 sequences, of which "the modality is ct." occurs twice; the other text repeats none.
            "repeated 4-grams in wrong answers": 100 * (1 / 11 + 0) / 2,
        }
    )
    assert math.isnan(said(records[:1])["repeated 4-grams in wrong answers"])


def test_how_fast_training_changed_the_completions() -> None:
    # Ten steps at 0, ten at 0.2 and twenty at 1: the middle, 0.5, is passed by the mean of ten steps that has four of
    # 1 and six of 0.2 (0.52), which ends at step 24. Tokens double from 30 when five of ten steps have 90: step 35.
    values = [0.0] * 10 + [0.2] * 10 + [1.0] * 20
    rows = [
        {"rewards/format/mean": 1.0, "rewards/ecr/mean": value, "completions/mean_length": 90.0 if step > 30 else 30.0}
        for step, value in enumerate(values, start=1)
    ]
    assert list(speed(rows).values()) == pytest.approx([0, 1, 24, 35])
    falling = [{**row, "rewards/ecr/mean": 1 - row["rewards/ecr/mean"]} for row in rows]
    assert list(speed(falling).values()) == pytest.approx([1, 0, 24, 35])
    two = [{**row, "rewards/cosine/mean": 1.0, "completions/mean_length": 30.0} for row in rows]
    assert all(math.isnan(value) for value in [*speed(two).values(), *speed([]).values()])
