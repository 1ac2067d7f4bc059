"""Statements of a reasoning: where they begin and end, and which are the same.

Run: pytest tests/rewards/test_statements.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.data.phantom.claims import claims, distinct_truths
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.rewards.statements import distinct, split_statements


@pytest.mark.parametrize(
    ("text", "statements", "number"),
    [
        ("", [], 0),
        (" ... 1. \n", [], 0),
        ("The lung is clear", ["The lung is clear"], 1),
        ("A mass of 2.5 cm. No effusion!", ["A mass of 2.5 cm.", "No effusion!"], 2),
        ('He said "no." Then yes.', ['He said "no."', "Then yes."], 2),
        ("1. A mass.\n2. A cyst.\n3) a mass", ["A mass.", "A cyst.", "a mass"], 2),
        ("Step 1: look.\nStep 2. See a mass.", ["look.", "See a mass."], 2),
        ("- A mass\n* **a mass**\n\u2022 The mass;", ["A mass", "**a mass**", "The mass;"], 1),
        ("The mass is left. Left is the mass.", ["The mass is left.", "Left is the mass."], 2),
        ("A mass. A ma\u200ess. A m\u2060ass.", ["A mass.", "A ma\u200ess.", "A m\u2060ass."], 1),
        ("A cyst, small. Small cyst.", ["A cyst, small.", "Small cyst."], 1),  # the order of words does not count
        (
            "\u9aa8\u6298\u3067\u3059\u3002\u6b63\u5e38\u3002",
            ["\u9aa8\u6298\u3067\u3059\u3002", "\u6b63\u5e38\u3002"],
            2,
        ),
    ],
)
def test_statements_by_hand(text: str, statements: list[str], number: int) -> None:
    found = split_statements(text)
    assert [statement.text for statement in found] == statements
    assert len(distinct(found)) == number


@given(st.text("ab1. )-\n!Step:\u3002", max_size=60))
def test_statements_are_ordered_parts_of_any_text(text: str) -> None:
    end = 0
    for statement in split_statements(text):
        assert statement.start >= end and text[statement.start : statement.end] == statement.text != ""
        end = statement.end


def test_distinct_statements_of_phantoms_are_their_distinct_claims() -> None:
    """Without remarks, conclusions and flaws, what counts as distinct is what the scene makes true."""
    for index in range(60):
        sample = draw_sample(seed=3, split="statements", index=index)
        image = sample.images[0]
        assert isinstance(image, PhantomImage)
        sentences = [statement.text for statement in split_statements(sample.reasoning)]
        told = " ".join(sentence for sentence in sentences if claims(sentence))
        assert len(distinct(split_statements(told))) == len(set(claims(told)))
        assert distinct_truths(f"{told} {told}", image.scene) == distinct_truths(told, image.scene) <= len(sentences)
