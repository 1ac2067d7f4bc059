"""Metrics of answers as pure functions. Imports no torch.

All comparisons use :func:`medvqa_rl.core.text.normalise`, as rewards do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from math import comb
from statistics import mean

from medvqa_rl.core.text import normalise


def rouge_l(prediction: str | None, *golds: str) -> float:
    """ROUGE-L (Lin 2004) with beta = 1: F1 = 2 * L / (words of both) for a longest common subsequence of L words.

    Of several gold answers, the most similar counts. Uses this package's normalisation. Unlike in token F1, word order
    matters. Two texts without words are equal (1); only one without words, or no answer, gives 0.
    """
    if prediction is None:
        return 0.0
    words = normalise(prediction).split()
    return max(_rouge_l(words, normalise(gold).split()) for gold in golds)


def _rouge_l(words: list[str], gold_words: list[str]) -> float:
    if not words or not gold_words:
        return float(words == gold_words)
    longest = [0] * (len(gold_words) + 1)  # common subsequence with the first 0, 1, ... gold words
    for word in words:
        diagonal = 0
        for column, gold_word in enumerate(gold_words, start=1):
            above = longest[column]
            longest[column] = diagonal + 1 if word == gold_word else max(above, longest[column - 1])
            diagonal = above
    return 2 * longest[-1] / (len(words) + len(gold_words))


def exact_match(prediction: str | None, *golds: str) -> float:
    """1 if an answer equals a gold answer after normalisation, else 0; 0 for no answer."""
    return float(prediction is not None and normalise(prediction) in map(normalise, golds))


def average(values: Iterable[float | None]) -> float:
    """Mean of the values that are not None; NaN if there are none."""
    given = [value for value in values if value is not None]
    return mean(given) if given else math.nan


def rate(flags: Sequence[bool]) -> float:
    """Share of true flags; NaN if there are none."""
    return sum(flags) / len(flags) if flags else float("nan")


def majority_share(golds: Sequence[Collection[Hashable]]) -> float:
    """Accuracy of always giving the answer that is correct most often (an oracle baseline); NaN without questions.

    Args:
        golds: the correct answers of each question.
    """
    return max(Counter(chain.from_iterable(golds)).values()) / len(golds) if golds else float("nan")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate, from n sampled answers, of the probability that at least one of k answers is correct.

    1 - C(n - c, k) / C(n, k) for c correct ones (Chen et al. 2021, arXiv 2107.03374, equation 1): the share of subsets
    of size k that contain a correct answer.

    Args:
        num_samples: n.
        num_correct: c.
        k: at most n.
    """
    assert 0 <= num_correct <= num_samples and 1 <= k <= num_samples, "k answers out of those sampled"
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(votes: Mapping[str, int], correct: str | None, abstained: int, k: int) -> float:
    """Unbiased estimate, from n sampled answers, of the probability that a majority vote of k answers is correct.

    Averages over all subsets of size k (computed exactly): 1 if the correct answer alone has the most votes, 1 / m if
    m answers tie, else 0. For k = n this is the plain majority vote. Self-consistency (Wang et al. 2022,
    arXiv 2203.11171) with ties broken at random.

    Args:
        votes: answer -> its count among the n.
        correct: the correct one among these answers, if any.
        abstained: number of unparsable answers; they do not vote, but count towards n.
        k: at most n.
    """
    total = abstained + sum(votes.values())
    assert 1 <= k <= total, "k answers out of those sampled"
    if correct is None:
        return 0.0
    others = [count for answer, count in votes.items() if answer != correct]
    favourable = 0.0
    for right in range(1, min(votes[correct], k) + 1):
        # ways[(other answers drawn, answers tied)], with no other answer above the correct one's votes
        ways = {(0, 0): 1}
        for count in others:
            step: dict[tuple[int, int], int] = {}
            for (drawn, tied), number in ways.items():
                for more in range(min(count, right, k - right - drawn) + 1):
                    key = (drawn + more, tied + (more == right))
                    step[key] = step.get(key, 0) + number * comb(count, more)
            ways = step
        for (drawn, tied), number in ways.items():
            favourable += comb(votes[correct], right) * number * comb(abstained, k - right - drawn) / (1 + tied)
    return favourable / comb(total, k)
