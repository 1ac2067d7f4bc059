"""Metrics of answers as pure functions of texts and numbers. Imports no torch.

All comparisons go through :func:`medvqa_rl.core.text.normalise`, so that a metric and a reward cannot disagree on
what equal means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import comb
from statistics import mean

from medvqa_rl.core.text import normalise


def rouge_l(prediction: str | None, gold: str) -> float:
    """Longest common subsequence of the words of two answers, as F1 = 2 * L / (words of both).

    ROUGE-L of Lin (2004) with beta = 1 and this package's normalisation; in contrast to token F1 the order of the
    words counts. Two texts without words are equal (1); one without words, or no answer at all, gets 0.
    """
    if prediction is None:
        return 0.0
    words, gold_words = normalise(prediction).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    longest = [0] * (len(gold_words) + 1)  # of the words so far against the first 0, 1, ... gold words
    for word in words:
        diagonal = 0
        for place, gold_word in enumerate(gold_words, start=1):
            above = longest[place]
            longest[place] = diagonal + 1 if word == gold_word else max(above, longest[place - 1])
            diagonal = above
    return 2 * longest[-1] / (len(words) + len(gold_words))


def exact_match(prediction: str | None, gold: str) -> float:
    """1 if both answers are equal after normalisation, else 0; no answer gets 0."""
    return float(prediction is not None and normalise(prediction) == normalise(gold))


def average(values: Iterable[float | None]) -> float:
    """Mean of what is not None; NaN of nothing."""
    given = [value for value in values if value is not None]
    return mean(given) if given else math.nan


def rate(flags: Sequence[bool]) -> float:
    """Share of the flags that are true; NaN of none."""
    return sum(flags) / len(flags) if flags else float("nan")


def majority_share(answers: Sequence[Hashable]) -> float:
    """Accuracy of always giving the most frequent gold answer, chosen with hindsight; NaN of none."""
    return max(Counter(answers).values()) / len(answers) if answers else float("nan")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that at least one of k answers is right, estimated without bias from n sampled answers.

    1 - C(n - c, k) / C(n, k) for c right ones (Chen et al. 2021, arXiv 2107.03374, equation 1): the share of the
    subsets of size k that hold a right answer.

    Args:
        num_samples: n.
        num_correct: c.
        k: at most n.
    """
    assert 0 <= num_correct <= num_samples and 1 <= k <= num_samples, "k answers out of those sampled"
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Mapping[str, int], correct: str | None, abstained: int, k: int) -> float:
    """Probability that the commonest of k answers is right, estimated without bias from n sampled answers.

    The mean over all subsets of size k of the n answers (counted, not drawn) of: 1 where the right answer alone is
    the commonest, 1 / m where m answers tie for it, else 0. For k = n that is the plain majority vote.
    Self-consistency (Wang et al. 2022, arXiv 2203.11171) with ties broken by a fair lot.

    Args:
        votes: answer -> how many of the n gave it.
        correct: the answer among them that is right; None where none is.
        abstained: how many of the n gave no answer that could be read; they have no vote but are among the n.
        k: at most n.
    """
    total = abstained + sum(votes.values())
    assert 1 <= k <= total, "k answers out of those sampled"
    if correct is None:
        return 0.0
    others = [count for answer, count in votes.items() if answer != correct]
    favourable = 0.0
    for right in range(1, min(votes[correct], k) + 1):
        # ways[(others drawn, of which tied)]: the others stay at or below the right answer's votes
        ways = {(0, 0): 1}
        for count in others:
            step: dict[tuple[int, int], int] = {}
            for (drawn, tied), number in ways.items():
                for more in range(min(count, right, k - right - drawn) + 1):
                    place = (drawn + more, tied + (more == right))
                    step[place] = step.get(place, 0) + number * comb(count, more)
            ways = step
        for (drawn, tied), number in ways.items():
            favourable += comb(votes[correct], right) * number * comb(abstained, k - right - drawn) / (1 + tied)
    return favourable / comb(total, k)
