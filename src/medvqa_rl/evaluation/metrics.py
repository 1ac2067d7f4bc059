"""Metrics of answers as pure functions of texts and numbers. Imports no torch.

All comparisons go through :func:`medvqa_rl.prompts.normalise`, so that a metric and a reward cannot disagree on
what equal means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from medvqa_rl.prompts import normalise


def token_f1(prediction: str | None, gold: str) -> float:
    """Overlap of the words of two answers: F1 = 2 * precision * recall / (precision + recall).

    Words are those of the normalised texts, counted with multiplicity (SQuAD, Rajpurkar et al. 2016, with this
    package's normalisation). Two texts without words are equal (1); one without words, or no answer at all, gets 0.
    """
    if prediction is None:
        return 0.0
    words, gold_words = normalise(prediction).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words))


def exact_match(prediction: str | None, gold: str) -> float:
    """1 if both answers are equal after normalisation, else 0; no answer gets 0."""
    return float(prediction is not None and normalise(prediction) == normalise(gold))


def rate(flags: Sequence[bool]) -> float:
    """Share of the flags that are true; NaN of none."""
    return sum(flags) / len(flags) if flags else float("nan")


def majority_share(answers: Sequence[Hashable]) -> float:
    """Accuracy of always giving the most frequent gold answer, chosen with hindsight; NaN of none."""
    return max(Counter(answers).values()) / len(answers) if answers else float("nan")
