"""What answers say, counted by hand.

Run: pytest tests/dev/test_said.py
"""

from __future__ import annotations

import math

import pytest

from dev.said import said
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
