"""The reasoning-aware reward: what the grader is shown, what the gate lets through, and what is logged.

Run: pytest tests/rewards/test_reasoning.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judged import gated
from medvqa_rl.rewards.judges import Grade, GradeRequest, JudgeIdentity
from medvqa_rl.rewards.judges.load import notices, rubrics_of
from medvqa_rl.rewards.judges.rubric import REASONING

IDENTITY = JudgeIdentity("j", "w", REASONING.hash, 0.0)


class Digits:
    """Gives the score that the reasoning names, fails where it names none."""

    identity = IDENTITY

    def __init__(self) -> None:
        self.seen: list[GradeRequest] = []

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        self.seen += requests
        return [
            Grade(float(request.reasoning), "As said.") if request.reasoning.isdigit() else Grade.failed("no digit")
            for request in requests
        ]


def group(*texts: str, gold: str = "B") -> Group:
    sample = Sample("q", "What?", gold, "choice", (), ("mass", "cyst"), description="A film.")
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), None, None, "")
    return Group(sample, prompt, [Completion((1, 2), text, False) for text in texts])


def said(think: object, answer: str) -> str:
    return f"<think>{think}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("value", "correctness", "gate", "expected"),
    [
        (1.0, 1.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 0.0),
        (1.0, 0.0, 0.5, 0.5),
        (1 / 3, 0.0, 0.5, 1 / 3),
        (2 / 3, 0.0, 0.5, 0.5),
        (1.0, 0.0, 1.0, 1.0),
        (1.0, 0.5, 0.0, 0.5),
        (1.0, 0.5, 0.5, 0.75),
        (0.25, 0.5, 0.0, 0.25),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 1.0, 0.0),
        (math.nan, 1.0, 0.5, math.nan),
        (0.5, math.nan, 0.5, math.nan),
        (0.5, math.nan, 1.0, 0.5),
    ],
)
def test_the_gate(value: float, correctness: float, gate: float, expected: float) -> None:
    assert gated(value, correctness, gate) == pytest.approx(expected, nan_ok=True)


@given(*[st.floats(0, 1)] * 3)
def test_the_gate_only_takes_and_never_from_right_answers(value: float, correctness: float, gate: float) -> None:
    assert 0 <= gated(value, correctness, gate) <= value and gated(value, 1.0, gate) == value
    assert gated(value, 0.0, gate) <= gate
    assert gated(value, correctness, gate) >= gated(value, 0.0, gate)


def test_grades_are_a_part_that_the_gate_limits() -> None:
    texts = [said(3, "B"), said(1, "B"), said(3, "A"), said(1, "A"), said("odd", "B"), said(2, "?")]
    grader = Digits()
    config = RewardsConfig(format=0, correctness=1, reasoning=0.6, reasoning_gate=0.5)
    rewards = Rewards(config, graders={"reasoning": grader})
    scores = rewards.score([group(*texts)], step=0)
    expected = [[1, 1 / 3, 0.5, 1 / 3, math.nan, 0.5]]
    np.testing.assert_allclose(scores.parts["reasoning"], expected)
    np.testing.assert_allclose(scores.total, np.array([[1, 1, 0, 0, 1, 0]]) + 0.6 * np.array(expected))
    assert scores.columns["reasoning_score"] == [3, 1, 3, 1, None, 2]
    assert scores.columns["reasoning_reason"] == ["As said."] * 4 + ["no digit", "As said."]
    assert scores.columns["reasoning_judge"] == [str(IDENTITY)] * 6
    assert scores.extras["rewards/reasoning/ungated"] == pytest.approx((3 + 1 + 3 + 1 + 2) / 3 / 5)
    assert scores.extras["rewards/reasoning/ungated_wrong"] == pytest.approx((3 + 1 + 2) / 3 / 3)
    assert scores.extras["judge/reasoning/asked"] == 6
    first = grader.seen[0]
    assert first == GradeRequest("What?", ("mass", "cyst"), "B: cyst", "B", "3", "A film.")
    assert grader.seen[2].answer == "A"


def test_what_cannot_be_read_is_shown_as_nothing() -> None:
    grader = Digits()
    rewards = Rewards(RewardsConfig(format=0, correctness=0, reasoning=1), graders={"reasoning": grader})
    assert rewards.names == ("reasoning",)
    rewards.score([group("3 <answer>B</answer>", "<think>3</think>B")], step=0)
    assert [(request.reasoning, request.answer) for request in grader.seen] == [("", "B"), ("3", "")]


def test_what_was_not_asked_is_neither_graded_nor_punished() -> None:
    """Answers alone, to a prompt that asks for them alone, beside a group that reasons."""
    texts = [[said(3, "B"), said(1, "B"), said(0, "A")], [f"<answer>{answer}</answer>" for answer in "BAB"]]
    reasoned, short = (group(*some) for some in texts)
    short.prompt = replace(short.prompt, template="short")
    grader = Digits()
    config = RewardsConfig(reasoning=1, reasoning_gate=0.0)
    scores = Rewards(config, graders={"reasoning": grader}).score([reasoned, short], step=0)
    np.testing.assert_allclose(scores.parts["reasoning"], [[1, 1 / 3, 0], [0, 0, 0]])
    assert len(grader.seen) == 3 and scores.columns["reasoning_score"] == [3, 1, 0, None, None, None]
    assert scores.extras["rewards/reasoning/ungated"] == pytest.approx((3 + 1 + 0) / 3 / 3)
    plain = Rewards(RewardsConfig()).score([short], step=0)
    np.testing.assert_allclose(plain.total, [[2, 1, 2]])  # the form is asked for, and right
    for scale in ("group", "none"):
        learned, expected = (
            group_advantages(torch.tensor(total[-1:]), scale=scale) for total in (scores.total, plain.total)
        )
        torch.testing.assert_close(learned, expected)


def test_without_a_weight_nobody_grades() -> None:
    assert rubrics_of(RewardsConfig()) == [] and rubrics_of(RewardsConfig(reasoning=0.1)) == [REASONING]
    Rewards(RewardsConfig(), graders={"reasoning": (grader := Digits())}).score([group(said(3, "B"))], step=0)
    assert not grader.seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {"reasoning_gate": 1.5}}, "rewards.reasoning_gate is 1.5, but must be a number from 0 to 1"),
        ({"rewards": {"reasoning": 1.0}, "prompt": {"template": "direct"}}, "set rewards.reasoning=0 or prompt"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(given: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_config(given, purpose="train")
    assert message in str(caught.value)


def test_a_reward_of_reasoning_alone_is_a_reward() -> None:
    build_config({"rewards": {"format": 0, "correctness": 0, "reasoning": 1}}, purpose="train")


def test_it_is_said_that_gold_answers_leave_the_machine() -> None:
    endpoint = {"model": "m", "endpoint": "https://judge.example/v1"}
    (line,) = notices(build_config({"rewards": {"reasoning": 1.0}, "judge": endpoint}))
    assert line.startswith(
        "Notice: questions, options, answers, reference answers, reasoning and descriptions of images are"
    )
    both = build_config({"rewards": {"reasoning": 1.0}, "eval_judge": {"model": "phantom:judge"}})
    assert [line.partition(":")[0] for line in notices(both)] == ["Warning"]
