"""Credit for open answers that are not word for word the gold answer.

Run: pytest tests/rewards/test_open_answers.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.config import RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.data.stored import StoredDataset
from medvqa_rl.evaluation.measures.similarity import TfidfSimilarity
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.load import notices, rubrics_of
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, REASONING
from medvqa_rl.rewards.open_answers import unrewardable
from medvqa_rl.rewards.scores import Scores


class Words:
    """Similarity 0.8 to the same number of words, 0.79 otherwise; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def compare(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        self.asked += zip(texts, references)
        return [0.8 if len(a.split()) == len(b.split()) else 0.79 for a, b in zip(texts, references)]


class Letters:
    """Grades by the first letter of the answer: d for 3, c, b, a; fails at others."""

    identity = JudgeIdentity("j", "w", CORRECTNESS.hash, 0.0)
    counters: Mapping[str, float] = {"asked": 2.0}

    def __init__(self) -> None:
        self.asked: list[JudgeRequest] = []

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.asked += requests
        scores = ["abcd".find(request.answer[0]) for request in requests]
        return [Grade(float(score), "So.") if score >= 0 else Grade.failed("what?") for score in scores]


def group(gold: str, *answers: str, kind: Any = "open", options: tuple[str, ...] = ()) -> Group:
    sample = Sample("q", "What is seen?", gold, kind, (), options)
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    return Group(sample, prompt, [Completion((1,), render_answer("x", answer), False) for answer in answers])


def scored(groups: Sequence[Group], more: dict[str, Any], **given: Any) -> Scores:
    return Rewards(RewardsConfig(format=0, **given), **more).score(groups, step=0)


ANSWERS = ("Pleural effusion.", "effusion", "no pleural effusion", "large pleural effusion", "mass")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, [1, 0, 0, 0, 0]),
        ("exact", [1, 0, 0, 0, 0]),
        ("token_f1", [1, 2 / 3, 0, 4 / 5, 0]),  # precision 1, recall 1/2; denied; precision 2/3, recall 1
        ("similarity", [1, 0, 0, 0, 0]),
    ],
)
def test_credit_by_hand(mode: str | None, expected: list[float]) -> None:
    scores = scored([group("pleural effusion", *ANSWERS)], {"similarity": Words().compare}, open_correctness=mode)
    np.testing.assert_allclose(scores.parts["correctness"], [expected])


def test_right_and_contradicting_answers_are_not_compared() -> None:
    words = Words()
    given = {"open_correctness": "similarity", "similarity_threshold": 0.8}
    answers = ("left lung", "right lung", "left kidney", "a kidney", "no left lung")
    scores = scored([group("left lung", *answers)], {"similarity": words.compare}, **given)
    assert words.asked == [("left kidney", "left lung"), ("a kidney", "left lung")]
    np.testing.assert_array_equal(scores.parts["correctness"], [[1, 0, 1, 1, 0]])
    assert scores.columns["correctness_guard"] == ["", "side: left against right", "", "", "negation: lung"]
    assert scores.columns["correctness_similarity"] == [None, None, 0.8, 0.8, None]
    assert scores.extras["rewards/correctness/exact"] == 0.2
    assert scores.extras["rewards/correctness/guarded"] == 0.4
    stricter = scored(
        [group("left lung", *answers)], {"similarity": Words().compare}, **{**given, "similarity_threshold": 0.81}
    )
    np.testing.assert_array_equal(stricter.parts["correctness"], [[1, 0, 0, 0, 0]])


@pytest.mark.parametrize(("mode", "credit"), [("token_f1", 0.8), ("similarity", 1.0)])
def test_the_closest_of_several_gold_answers_counts(mode: str, credit: float) -> None:
    base = group("mass", "large effusion", "no effusion", "left effusion")
    several = replace(base.sample, alternatives=("large pleural effusion", "big cyst"))
    words = Words()
    scores = scored([replace(base, sample=several)], {"similarity": words.compare}, open_correctness=mode)
    # "no effusion" contradicts the gold answers that it resembles.
    assert scores.parts["correctness"][0, 0] == pytest.approx(credit)
    guards = scores.columns["correctness_guard"]
    assert guards[0] == "" and guards[1] != "" and scores.parts["correctness"][0, 1] == 0
    if mode == "similarity":
        assert [gold for text, gold in words.asked if text == "large effusion"] == ["mass", *several.alternatives]


def test_a_gold_answer_that_is_contradicted_gives_no_credit() -> None:
    base = group("effusion", "no effusion", "left effusion")
    several = replace(base.sample, alternatives=("no mass",))
    scores = scored([replace(base, sample=several)], {}, open_correctness="token_f1")
    # 1/2 with "no mass", not 2/3 with "effusion"; "left effusion" has one word of two.
    np.testing.assert_allclose(scores.parts["correctness"], [[0.5, 2 / 3]])


def test_offline_similarity_does_not_depend_on_the_rest_of_the_step() -> None:
    given = {"open_correctness": "similarity", "similarity_threshold": 0.7}
    one = group("pleural effusion", "effusion", "mass")  # cosine 1/sqrt(2), and 0
    more = [one, group("large mass", "mass of the lung", "effusion")]
    alone = scored([one], {"similarity": TfidfSimilarity().compare}, **given)
    together = scored(more, {"similarity": TfidfSimilarity().compare}, **given)
    assert alone.columns["correctness_similarity"] == [pytest.approx(math.sqrt(0.5), abs=1e-6), 0]
    assert together.columns["correctness_similarity"][:2] == alone.columns["correctness_similarity"]
    np.testing.assert_array_equal(together.parts["correctness"][0], [1, 0])


def test_a_judge_grades_what_is_in_between_and_its_failure_is_unscored() -> None:
    grader = Letters()
    answers = ("pleural effusion", "no effusion", "d", "b", "?", "a")
    config = {"open_correctness": "judge", "reasoning": 0.0}
    scores = scored([group("pleural effusion", *answers)], {"judges": {"correctness": grader}}, **config)
    np.testing.assert_allclose(scores.parts["correctness"], [[1, 0, 1, 1 / 3, math.nan, 0]])
    assert [request.answer for request in grader.asked] == ["d", "b", "?", "a"]
    assert grader.asked[0] == JudgeRequest("What is seen?", (), "x", "d", "pleural effusion")
    assert scores.columns["correctness_score"] == [None, None, 3, 1, None, 0]
    assert scores.columns["correctness_reason"] == [None, None, "So.", "So.", "what?", "So."]
    assert scores.extras["judge/correctness/asked"] == 2


def test_other_questions_stay_right_or_wrong() -> None:
    groups = [
        group("B", "B", "cyst of the liver", kind="choice", options=("mass", "cyst")),
        group("yes", "Yes.", "yes, certainly", kind="closed"),
    ]
    words = Words()
    for mode in ("token_f1", "similarity"):
        scores = scored(groups, {"similarity": words.compare}, open_correctness=mode)
        np.testing.assert_array_equal(scores.parts["correctness"], [[1, 0], [1, 0]])
    assert not words.asked and "rewards/correctness/guarded" not in scores.extras


def test_a_choice_question_that_hides_its_options_is_an_open_one() -> None:
    """Compared by the text of the right option; with its options shown it stays right or wrong."""
    grader = Letters()
    shown = group("B", "cyst", "small cyst", "b", kind="choice", options=("small mass", "large cyst"))
    hidden = replace(shown, prompt=replace(shown.prompt, template="open_ended"))
    for asked, expected in ((shown, [0, 0, 1]), (hidden, [2 / 3, 0, 0])):
        scores = scored([asked], {}, open_correctness="token_f1")
        np.testing.assert_allclose(scores.parts["correctness"], [expected])
    scored([hidden], {"judges": {"correctness": grader}}, open_correctness="judge")
    assert grader.asked[0] == JudgeRequest("What is seen?", (), "x", "cyst", "large cyst")


def test_no_answer_gets_nothing() -> None:
    sample = group("effusion").sample
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    silent = Group(sample, prompt, [Completion((1,), "effusion", False), Completion((1,), "<answer></answer>", False)])
    scores = scored([silent], {}, open_correctness="token_f1")
    np.testing.assert_array_equal(scores.parts["correctness"], [[0, 0]])


@given(st.text(max_size=30).filter(str.strip), st.sampled_from(["exact", "token_f1", "similarity", "judge"]))
def test_the_gold_answer_gets_1_in_every_way(gold: str, mode: str) -> None:
    more = {"similarity": Words().compare, "judges": {"correctness": Letters()}}
    scores = scored([group(gold, gold)], more, open_correctness=mode)
    assert scores.parts["correctness"].tolist() == [[1.0]]


def test_the_gate_lets_through_by_partial_credit() -> None:
    class Three(Letters):
        def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
            return [Grade(3.0, "So.")] * len(requests)

    more = {"judges": {"reasoning": Three()}}
    config = {"reasoning": 1.0, "reasoning_gate": 0.1, "correctness": 0.0, "open_correctness": "token_f1"}
    scores = scored([group("pleural effusion", *ANSWERS)], more, **config)
    np.testing.assert_allclose(scores.parts["reasoning"], [[1, 0.1 + 0.9 * 2 / 3, 0.1, 0.1 + 0.9 * 0.8, 0.1]])
    assert set(scores.parts) == {"reasoning"}


@pytest.mark.parametrize(
    ("kinds", "mode", "correctness", "error", "warning"),
    [
        (["open"] * 4, None, 1.0, "All training questions are open", None),
        (["open"] * 4, "exact", 1.0, None, None),
        (["open"] * 4, "token_f1", 1.0, None, None),
        (["open"] * 4, None, 0.0, None, None),
        (["open", "open", "choice", "closed"], None, 1.0, None, "Warning: 50% of the training questions are open"),
        (["open", "choice", "closed"], None, 1.0, None, None),
        ([], None, 1.0, None, None),
    ],
)
def test_exact_words_alone_cannot_teach_open_questions(
    kinds: list[Any], mode: Any, correctness: float, error: str | None, warning: str | None
) -> None:
    config = RewardsConfig(open_correctness=mode, correctness=correctness)
    for found, expected in zip(unrewardable(config, kinds), (error, warning)):
        assert (found is None) == (expected is None) and (found or "").startswith(expected or "")
        assert found is None or "set rewards.open_correctness to token_f1" in found


def test_training_checks_the_questions_first() -> None:
    from medvqa_rl.learning.grpo import check_rewardable, train

    image = MemoryImage("image", Image.new("RGB", (2, 2)))
    samples = tuple(Sample(str(n), "What?", "mass", "open", (image,)) for n in range(3000))
    config = build_config({})
    with pytest.raises(ValueError, match="All training questions are open, and only exact words would be rewarded"):
        train(config, train_set=StoredDataset("own", samples))
    mixed = (*samples[:1500], *[Sample(f"c{n}", "Is it?", "yes", "closed", (image,)) for n in range(1500)])
    (line,) = check_rewardable(config, StoredDataset("own", mixed))
    assert line.startswith("Warning: 50%")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {"open_correctness": "f1"}}, "exact, token_f1, similarity or judge, or null"),
        ({"rewards": {"open_correctness": "judge"}}, "judge.model is phantom:judge, which only reads reasoning"),
        ({"data": {"answer_types": ["open"]}}, "data.answer_types keeps only open questions"),
        ({"rewards": {"similarity_threshold": 0}}, "a number above 0 and at most 1"),
        ({"rewards": {"similarity_model": ""}}, "text that is not empty"),
    ],
)
def test_invalid_settings_are_reported(given: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_config(given, purpose="train")
    assert message in str(caught.value)


def test_open_questions_alone_are_fine_for_evaluations_and_where_exact_is_meant() -> None:
    only_open = {"data": {"answer_types": ["open"]}}
    assert build_config(only_open, purpose="eval").rewards.open_correctness is None
    exact = only_open | {"rewards": {"open_correctness": "exact"}}
    assert build_config(exact, purpose="train").rewards.open_correctness == "exact"


def test_the_judge_is_asked_for_what_the_settings_need() -> None:
    assert rubrics_of(RewardsConfig(open_correctness="judge")) == [CORRECTNESS]
    assert rubrics_of(RewardsConfig(open_correctness="judge", reasoning=1)) == [REASONING, CORRECTNESS]
    assert rubrics_of(RewardsConfig(open_correctness="judge", correctness=0)) == []
    endpoint = {"model": "m", "endpoint": "https://judge.example/v1"}
    (line,) = notices(build_config({"rewards": {"open_correctness": "judge"}, "judge": endpoint}))
    assert "reference answers" in line and "judge.example" in line
