"""Metrics of answers against hand-computed numbers.

Run: pytest tests/evaluation/measures/test_metrics.py
"""

import math
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.core.answers import token_f1
from medvqa_rl.evaluation.measures.metrics import exact_match, majority_at_k, majority_share, pass_at_k, rate, rouge_l


@pytest.mark.parametrize(
    ("prediction", "gold", "f1"),
    [
        ("left lung", "left lung", 1.0),
        ("The left lung.", "left lung", 1.0),
        ("lung", "left lung", 2 / 3),  # precision 1, recall 1/2
        ("left upper lung base", "left lung", 2 / 3),  # precision 1/2, recall 1
        ("right kidney", "left lung", 0.0),
        ("lung lung", "left lung", 0.5),  # the second "lung" matches nothing: 1/2 and 1/2
        ("lung lung left", "left lung lung", 1.0),
        ("two cysts", "2 cysts", 1.0),
        ("abnormal", "normal", 0.0),
        ("", "left", 0.0),
        ("...", "?", 1.0),
        (None, "left", 0.0),
    ],
)
def test_token_f1(prediction: str | None, gold: str, f1: float) -> None:
    assert token_f1(prediction, gold) == pytest.approx(f1, abs=1e-12)


@given(st.text("abc .", max_size=12), st.text("abc .", max_size=12))
def test_token_f1_is_symmetric_bounded_and_1_for_exact_matches(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1
    if exact_match(one, other):
        assert token_f1(one, other) == 1


def test_exact_match() -> None:
    assert exact_match("No.", "no") == 1
    assert exact_match("abnormal", "no") == 0
    assert exact_match(None, "no") == 0


def test_rates() -> None:
    assert rate([True, False, False, False]) == 0.25
    assert math.isnan(rate([]))
    assert majority_share(["A", "B", "B", "C"]) == 0.5
    assert math.isnan(majority_share([]))


@pytest.mark.parametrize(
    ("prediction", "gold", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004: 3 of 4 and 4 words
        ("left upper lobe", "upper left lobe", 2 / 3),  # two words in order, of three and three
        ("lobe upper left", "left upper lobe", 1 / 3),
        ("mass in left lung base", "left lung", 4 / 7),  # 2 in common, 5 and 2 words
        ("left lung", "left lung", 1.0),
        ("lung lung", "lung", 2 / 3),
        ("abnormal", "normal", 0.0),
        ("", "left", 0.0),
        ("...", "?", 1.0),
        (None, "left", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str | None, gold: str, score: float) -> None:
    assert rouge_l(prediction, gold) == pytest.approx(score, abs=1e-12)


@given(st.lists(st.sampled_from("bcd"), max_size=7), st.lists(st.sampled_from("bcd"), max_size=7))
def test_rouge_l_equals_the_longest_of_all_subsequences(one: list[str], other: list[str]) -> None:
    def subsequences(words: list[str]) -> set[tuple[str, ...]]:
        return {choice for size in range(len(words) + 1) for choice in combinations(words, size)}

    longest = max(map(len, subsequences(one) & subsequences(other)))
    score = rouge_l(" ".join(one), " ".join(other))
    assert score == pytest.approx(2 * longest / (len(one) + len(other)) if one or other else 1.0)
    assert score <= token_f1(" ".join(one), " ".join(other)) + 1e-12


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = [any(choice) for choice in combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(5, 0, 5) == 0.0 and pass_at_k(5, 1, 5) == 1.0


@given(st.lists(st.sampled_from(["B", "C", "D", None]), min_size=1, max_size=8), st.data())
def test_majority_at_k_is_the_mean_over_all_subsets(answers: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))

    def vote(choice: tuple[str | None, ...]) -> float:
        counts = Counter(answer for answer in choice if answer is not None)
        best = [answer for answer, count in counts.items() if count == max(counts.values())]
        return "B" in best and 1 / len(best)

    subsets = [vote(choice) for choice in combinations(answers, k)]
    votes = Counter(answer for answer in answers if answer is not None)
    found = majority_at_k(votes, "B" if "B" in votes else None, answers.count(None), k)
    assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_majority_at_1_is_the_mean_and_many_different_answers_take_no_time() -> None:
    votes = {f"answer {index}": 1 for index in range(28)} | {"right": 4}
    assert majority_at_k(votes, "right", 0, 1) == pytest.approx(4 / 32)
    assert majority_at_k(votes, "right", 0, 32) == 1.0
    assert 4 / 32 < majority_at_k(votes, "right", 0, 16) < 1
