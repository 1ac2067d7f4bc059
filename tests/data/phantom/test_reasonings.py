"""Labelled reasoning: what each damage does, and that labels are the oracle's.

Run: pytest tests/data/phantom/test_reasonings.py
"""

from __future__ import annotations

import pytest

from medvqa_rl.data.phantom.claims import is_coherent
from medvqa_rl.data.phantom.reasonings import DAMAGES, draw_reasoning


def test_texts_are_addressed() -> None:
    assert draw_reasoning(3, "a", 5) == draw_reasoning(3, "a", 5)
    texts = {draw_reasoning(seed, split, index).text for seed in (0, 1) for split in "ab" for index in range(50)}
    assert len(texts) > 150


@pytest.mark.parametrize(("mixture", "low", "high"), [("broad", 0.45, 0.6), ("damaged", 0.3, 0.48)])
def test_both_labels_are_frequent(mixture: str, low: float, high: float) -> None:
    drawn = [draw_reasoning(0, "balance", index, mixture) for index in range(600)]  # type: ignore[arg-type]
    assert low < sum(text.is_coherent for text in drawn) / len(drawn) < high
    assert {text.kind for text in drawn} == {"reference", "coherent", *DAMAGES}
    assert all(text.text.strip() == text.text and text.is_coherent == is_coherent(text.text) for text in drawn)


def test_most_damaged_texts_are_incoherent_and_most_edited_ones_coherent() -> None:
    by_kind: dict[str, list[bool]] = {}
    for index in range(1500):
        text = draw_reasoning(0, "kinds", index)
        by_kind.setdefault(text.kind, []).append(text.is_coherent)
    rates = {kind: sum(labels) / len(labels) for kind, labels in by_kind.items()}
    assert rates.pop("reference") > 0.8 and rates.pop("coherent") > 0.7
    assert rates.pop("shuffled") < 0.65, "some orders are as good"
    assert max(rates.values()) < 0.35, rates


@pytest.mark.parametrize("kind", ["repetition", "padding", "stray"])
def test_some_damages_always_make_a_text_incoherent(kind: str) -> None:
    drawn = [draw_reasoning(0, "always", index) for index in range(900)]
    harmed = [text for text in drawn if text.kind == kind]
    assert len(harmed) > 10 and not any(text.is_coherent for text in harmed if text.kind != "padding")
