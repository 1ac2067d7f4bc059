"""Rewards of length and repetition against tables worked out by hand, against TRL's, and in the sum.

Run: pytest tests/rewards/test_length.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import ConfigError, RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.length import (
    calibration,
    composite_length,
    correctness_weighted_length,
    cosine_length,
    extended_chain,
    looking,
    repetition_penalty,
    soft_overlong,
)


@pytest.mark.parametrize(
    ("num_tokens", "target", "reward"),
    [(0, 100, 0.0), (1, 100, 0.01), (50, 100, 0.5), (99, 100, 0.99), (100, 100, 1.0), (101, 100, 1.0), (3, 1, 1.0)],
)
def test_ecr_and_cwr_by_hand(num_tokens: int, target: int, reward: float) -> None:
    assert extended_chain(num_tokens, target) == pytest.approx(reward)
    assert correctness_weighted_length(num_tokens, target, is_correct=True) == pytest.approx(reward)
    assert correctness_weighted_length(num_tokens, target, is_correct=False) == 0.0


@pytest.mark.parametrize(
    ("counts", "is_correct", "coherence", "reward"),
    [
        ((100, 5, 5), True, 1.0, 1.0),  # both targets
        ((900, 50, 50), True, 1.0, 1.0),  # beyond both
        ((50, 5, 5), True, 1.0, 0.5),  # half the length
        ((100, 2, 2), True, 1.0, 0.4),  # as long, but two of five statements
        ((30, 2, 2), True, 1.0, 0.3),  # the smaller of 0.3 and 0.4
        ((100, 10, 5), True, 1.0, 0.5),  # everything is said twice
        ((100, 4, 1), True, 1.0, 0.05),  # one of five statements, four times
        ((100, 5, 5), False, 1.0, 0.0),
        ((100, 5, 5), True, 0.0, 0.0),
        ((0, 0, 0), True, 1.0, 0.0),
        ((100, 5, 5), True, math.nan, math.nan),
        ((100, 5, 5), False, math.nan, math.nan),  # unscored, not wrong
    ],
)
def test_the_composite_length_by_hand(
    counts: tuple[int, int, int], is_correct: bool, coherence: float, reward: float
) -> None:
    found = composite_length(
        *counts, length_target=100, statements_target=5, is_correct=is_correct, coherence=coherence
    )
    assert found == pytest.approx(reward, nan_ok=True)


STATEMENTS = ("A mass.", "No effusion is seen in the left lung.", "So it is B.", "The heart is large.", "Fine.")


@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 4), st.integers(1, 40), st.integers(1, 8))
def test_the_composite_length_is_bounded_and_never_pays_a_repetition(
    said: list[int], more: int, length_target: int, statements_target: int
) -> None:
    def value(numbers: list[int]) -> float:
        text = " ".join(STATEMENTS[number] for number in numbers)
        sample = Sample("q", "What?", "B", "choice", options=("mass", "cyst"))
        completion = Completion((0,), f"<think>{text}</think><answer>B</answer>", False)
        config = RewardsConfig(
            format=0,
            correctness=0,
            composite=1,
            length_target=length_target,
            statements_target=statements_target,
        )
        scores = Rewards(config, judges={"coherence": AlwaysYes()}).score(
            [Group(sample, EncodedPrompt(np.zeros(1, dtype=np.int64), {}, ""), [completion])],
            step=0,
            count_tokens=words,
        )
        return float(scores.total[0, 0])

    reward, after = value(said), value([*said, more])
    assert 0.0 <= reward <= 1.0
    if more in said:
        assert after < reward
    else:
        assert after >= reward


class AlwaysYes:
    identity = JudgeIdentity("yes", "w", "p", 0.0)
    counters: Mapping[str, float] = {}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        return [Grade(1.0)] * len(requests)


@pytest.mark.parametrize(
    ("gain", "is_correct", "reward"),
    [
        (1.0, True, 0.0),  # at the threshold
        (-3.0, True, 0.0),
        (3.0, True, 0.5),
        (2.0, True, 0.25),
        (5.0, True, 1.0),  # at the cap
        (99.0, True, 1.0),
        (99.0, False, 0.0),
        (math.nan, True, math.nan),
        (math.nan, False, math.nan),
    ],
)
def test_looking_by_hand(gain: float, is_correct: bool, reward: float) -> None:
    assert looking(gain, threshold=1.0, cap=5.0, is_correct=is_correct) == pytest.approx(reward, nan_ok=True)


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("length", "is_correct", "is_truncated", "reward"),
    [
        (0, True, False, 2.0),  # r_0 of right answers
        (100, True, False, 1.0),  # r_L
        (50, True, False, 1.5),  # cos(pi / 2) = 0: halfway
        (25, True, False, 1.0 + 0.5 * (1 + HALF)),  # cos(pi / 4)
        (75, True, False, 1.0 + 0.5 * (1 - HALF)),
        (0, False, False, -10.0),  # r_0 of wrong answers
        (100, False, False, 0.0),
        (50, False, False, -5.0),
        (25, False, False, -5.0 * (1 + HALF)),
        (100, True, True, -3.0),  # cut off, whatever the answer
        (100, False, True, -3.0),
    ],
)
def test_the_cosine_by_hand(length: int, is_correct: bool, is_truncated: bool, reward: float) -> None:
    found = cosine_length(
        length,
        100,
        is_correct=is_correct,
        is_truncated=is_truncated,
        correct=(2.0, 1.0),
        wrong=(-10.0, 0.0),
        exceeded=-3.0,
    )
    assert found == pytest.approx(reward)


@pytest.mark.parametrize(
    ("length", "limit", "buffer", "reward"),
    [
        (0, 100, 20, 0.0),
        (80, 100, 20, 0.0),
        (81, 100, 20, -0.05),
        (90, 100, 20, -0.5),
        (100, 100, 20, -1.0),
        (120, 100, 20, -1.0),
        (1, 100, 100, -0.01),  # a buffer as long as the limit: from the first token on
        (13, 16, 3.2, -0.0625),
    ],
)
def test_the_overlong_penalty_by_hand(length: int, limit: int, buffer: float, reward: float) -> None:
    assert soft_overlong(length, limit, buffer) == pytest.approx(reward)


@pytest.mark.parametrize(
    ("text", "size", "penalty"),
    [
        ("", 1, 0.0),
        ("one two", 3, 0.0),  # too short for any
        ("one two three", 3, 0.0),
        ("a b a b a", 2, -0.5),  # ab ba ab ba: 2 of 4 are new
        ("A b a B a", 2, -0.5),
        ("yes yes yes yes", 1, -0.75),
        ("yes yes yes yes", 2, -2 / 3),
        ("no mass. no mass. no cyst.", 2, -2 / 5),  # of five pairs "no mass." and "mass. no" come twice
        ("a\nb\ta  b", 2, -1 / 3),
        ("y\u200bes \u202dyes\u202c yes\u200f ye\u00ads", 1, -0.75),  # invisible characters make no word new
    ],
)
def test_the_repetition_penalty_by_hand(text: str, size: int, penalty: float) -> None:
    assert repetition_penalty(text, size) == pytest.approx(penalty)


def test_trl_agrees() -> None:
    rewards: Any = pytest.importorskip("trl.rewards")
    overlong = rewards.get_soft_overlong_punishment(100, 20)
    lengths = list(range(0, 131, 3))
    expected = overlong(completion_ids=[[0] * length for length in lengths])
    assert [soft_overlong(length, 100, 20) for length in lengths] == pytest.approx(expected)
    texts = ["no mass. no mass. no cyst.", "a b a b a b", "the left part is clear the right part is clear", "x", ""]
    ids = {word: index for index, word in enumerate(sorted({word for text in texts for word in text.split()}))}
    for size in (1, 2, 3):
        penalty = rewards.get_repetition_penalty_reward(ngram_size=size, max_penalty=-1.0)
        expected = penalty(completion_ids=[[ids[word] for word in text.split()] for text in texts])
        assert [repetition_penalty(text, size) for text in texts] == pytest.approx(expected)


RIGHT, WRONG = "<think>a b a b a</think><answer>B</answer>", "<think>a b c d e f</think><answer>A</answer>"
UNCLOSED, TWICE = "<think>a b c d", "<think>a b</think><think>c</think><answer>B</answer>"


def group() -> Group:
    sample = Sample("q", "What?", "B", "choice", options=("mass", "cyst"))
    completions = [
        Completion((0,) * 10, RIGHT, False),
        Completion((0,) * 18, WRONG, False),
        Completion((0,) * 20, UNCLOSED, True),
        Completion((0,) * 5, TWICE, False),
    ]
    return Group(sample, EncodedPrompt(np.zeros(1, dtype=np.int64), {}, ""), completions)


def words(text: str) -> int:
    return len(text.split())


def test_parts_in_the_sum_by_hand() -> None:
    config = RewardsConfig(
        format=0,
        correctness=0,
        ecr=1,
        cwr=2,
        cosine=1,
        overlong=1,
        repetition=0.5,
        length_target=5,
        repetition_ngram=2,
    )
    scores = Rewards(config, max_completion_length=20).score([group()], step=0, count_tokens=words)
    ecr, cwr = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]  # reasoning that is not closed, or twice, has no tokens
    # half of 20; 18 of 20 and wrong; cut off; 5 of 20 (the right answer is read although the form is not kept)
    cosine = [0.75, -0.5 - 0.25 * (1 + math.cos(0.9 * math.pi)), -1.0, 0.5 + 0.25 * (1 + HALF)]
    overlong = [0.0, -0.5, -1.0, 0.0]  # the last fifth of 20: from 16 on
    repetition = [-3 / 5, 0.0, 0.0, 0.0]  # "a b a b a B": of five pairs two are new, for case does not count
    for name, expected in {
        "ecr": ecr,
        "cwr": cwr,
        "cosine": cosine,
        "overlong": overlong,
        "repetition": repetition,
    }.items():
        np.testing.assert_allclose(scores.parts[name], [expected], err_msg=name)
    total = np.array(ecr) + 2 * np.array(cwr) + np.array(cosine) + np.array(overlong) + 0.5 * np.array(repetition)
    np.testing.assert_allclose(scores.total, [total])


def test_length_parts_are_off_by_default_and_can_be_combined() -> None:
    assert Rewards(RewardsConfig()).names == ("format", "correctness")
    assert Rewards(RewardsConfig(format=0, cwr=1, repetition=1)).names == ("correctness", "cwr", "repetition")
    assert Rewards(RewardsConfig(format=0, correctness=0, overlong=1)).names == ("overlong",)


def test_length_is_counted_with_the_policy_tokenizer(tiny_policy: Any) -> None:
    processor = tiny_policy().processor
    text = "the left lung is clear"
    assert processor.count_tokens(text) == len(processor.tokenizer.encode(text, add_special_tokens=False)) > 5
    scores = Rewards(RewardsConfig(ecr=1, length_target=1000)).score(
        [group()], step=0, count_tokens=processor.count_tokens
    )
    assert scores.parts["ecr"][0, 0] == len(processor.tokenizer.encode("a b a b a", add_special_tokens=False)) / 1000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {"ecr": "high"}}, "rewards.ecr is the text 'high', but must be a number of at least 0."),
        ({"rewards": {"cwr": None}}, "rewards.cwr is null, but must be a number of at least 0."),
        ({"rewards": {"cosine": -1}}, "rewards.cosine is -1, but must be a number of at least 0."),
        ({"rewards": {"erc": 1.0}}, "rewards.erc (given as 1.0) is not a setting: did you mean rewards.ecr?"),
        ({"rewards": {"length_target": 0}}, "rewards.length_target is 0, but must be a whole number of at least 1."),
        (
            {"rewards": {"overlong_buffer": 0}},
            "rewards.overlong_buffer is 0, but must be a number above 0 and at most 1.",
        ),
        (
            {"rewards": {"ecr": 1}, "prompt": {"template": "direct"}},
            "rewards.ecr is 1, but it counts the tokens of the reasoning, and prompt.template=direct asks for none: "
            "set rewards.ecr=0 or prompt.template=think_answer.",
        ),
    ],
)
def test_invalid_settings_are_reported_in_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(given, purpose="train")
    assert caught.value.problems == (message,)


def test_an_unknown_reward_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"rewards\.novelty .* is not a setting: rewards has format, correctness, semantic"
    ):
        build_config({"rewards": {"novelty": 1.0}}, purpose="train")
    build_config({"rewards": {"format": 0, "correctness": 0, "overlong": 1.0}}, purpose="train")


@pytest.mark.parametrize(
    ("confidence", "is_correct", "reward"),
    [
        (1.0, True, 1.0),
        (1.0, False, 0.0),
        (0.0, False, 1.0),
        (0.0, True, 0.0),
        (0.75, True, 0.9375),
        (0.5, False, 0.75),
    ],
)
def test_calibration_by_hand(confidence: float, is_correct: bool, reward: float) -> None:
    assert calibration(confidence, is_correct=is_correct) == reward


def test_calibration_is_highest_at_the_share_of_correct_answers() -> None:
    for share in (0.0, 0.3, 0.8, 1.0):
        grid = np.linspace(0.0, 1.0, 101)
        rewards = [
            share * calibration(value, is_correct=True) + (1 - share) * calibration(value, is_correct=False)
            for value in grid.tolist()
        ]
        assert grid[int(np.argmax(rewards))] == pytest.approx(share)
    assert math.isnan(calibration(math.nan, is_correct=True))
