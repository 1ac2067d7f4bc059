"""The process reward: steps, verdicts and advantages, worked out by hand.

Run: pytest tests/rewards/test_process.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.load import rubrics_of
from medvqa_rl.rewards.judges.rubric import STEP, seeing
from medvqa_rl.rewards.process import process_score, step_advantages


class Steps:
    """Finds steps with "good" valid, fails at "broken"."""

    identity = JudgeIdentity("j", "w", "p", 0.0)

    def __init__(self) -> None:
        self.seen: list[JudgeRequest] = []

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.seen += requests
        return [
            Grade.failed("broken") if "broken" in request.step else Grade(float("good" in request.step))
            for request in requests
        ]


def group(*texts: str) -> Group:
    sample = Sample("q", "What?", "B", "choice", (), ("mass", "cyst"), description="A film.")
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    return Group(sample, prompt, [Completion((1, 2), text, False) for text in texts])


TEXTS = (
    "<think> One good. Two bad. good three.</think><answer>B</answer>",
    "<think>bad.</think><answer>B</answer>",
    "<think>good. broken.</think><answer>B</answer>",
    "<answer>A</answer>",
)


def test_every_step_is_judged_behind_those_before_it() -> None:
    judge = Steps()
    config = RewardsConfig(format=0, correctness=2, process=3, process_discount=0.5)
    rewards = Rewards(config, judges={"step": judge})
    scores = rewards.score([group(*TEXTS)], step=0)
    share = (1 + 0.25) / (1 + 0.5 + 0.25)
    np.testing.assert_allclose(scores.parts["process"], [[share, 0.0, math.nan, 0.0]])
    np.testing.assert_allclose(scores.total, [[2, 2, math.nan, 0]])  # without the process reward
    first, second = judge.seen[0], judge.seen[1]
    assert (first.reasoning, first.step) == ("One good.", "One good.")
    assert (second.reasoning, second.step) == ("One good. Two bad.", "Two bad.")
    assert second.description == "A film." and second.options == ("mass", "cyst")
    for text, steps in zip(TEXTS, scores.steps, strict=True):
        said = [text[step.start : step.end] for step in steps]
        assert all(part in text for part in said)
    assert [TEXTS[0][step.start : step.end] for step in scores.steps[0]] == ["One good.", "Two bad.", "good three."]
    assert [step.validity for step in scores.steps[0]] == [1, 0, 1] and not scores.steps[3]
    assert scores.columns["process_steps"] == [[1, 0, 1], [0], [1, None], []]
    assert scores.extras["rewards/process/steps"] == 6 / 4
    assert scores.extras["rewards/process/invalid"] == 2 / 4
    assert scores.extras["judge/step/asked"] == 6
    assert rubrics_of(RewardsConfig(process=0.1)) == [STEP]


def test_alone_it_is_a_reward_and_leaves_totals_equal() -> None:
    config = RewardsConfig(format=0, correctness=0, process=1)
    scores = Rewards(config, judges={"step": Steps()}).score([group(*TEXTS)], step=0)
    np.testing.assert_array_equal(scores.total, [[0, 0, math.nan, 0]])


def test_the_last_step_is_shown() -> None:
    request = JudgeRequest("Mass?", (), "The film is of a chest. No mass.", step="No mass.", description="A film.")
    text = STEP.render(request)
    assert text.endswith(
        "Question: Mass?\nReasoning: The film is of a chest. No mass.\nLast step: No mass.\n\n"
        "Is the last step valid? Answer with Yes or No only."
    )
    assert "Image: A film.\n" in seeing(STEP, "description").render(request) and "A film" not in text
    assert "You are shown the image." in seeing(STEP, "image").render(request)


@pytest.mark.parametrize(
    ("validities", "discount", "score"),
    [
        ([], 0.8, 0.0),
        ([1], 0.8, 1.0),
        ([0], 0.8, 0.0),
        ([0, 1], 0.5, 1 / 3),  # an early fault costs 2/3,
        ([1, 0], 0.5, 2 / 3),  # a late one 1/3
        ([1, 0, 1, 1], 1.0, 0.75),
        ([1, math.nan], 0.5, math.nan),
    ],
)
def test_the_weighted_share_by_hand(validities: list[float], discount: float, score: float) -> None:
    assert process_score(validities, discount) == pytest.approx(score, nan_ok=True)


def test_advantages_of_steps_by_hand() -> None:
    # Weights 1, 1/2, 1/4 and 1: of 2.75, those of valid steps have 1 + 1/4, so the mean is 5/11.
    found = step_advantages([[1, 0, 1], [0], []], 0.5)
    mean = 1.25 / 2.75
    assert found == [[pytest.approx(v) for v in (1 - mean, -mean / 2, (1 - mean) / 4)], [pytest.approx(-mean)], []]
    assert step_advantages([[1, 0], [math.nan, 1]], 0.5) == [[pytest.approx(1 / 3), pytest.approx(-1 / 3)], [0, 0]]
    for all_alike in ([[1, 1, 1], [1]], [[0, 0], [0, 0, 0]], [[], []], [[math.nan]]):
        assert step_advantages(all_alike, 0.7) == [[0.0] * len(own) for own in all_alike]


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), max_size=6), min_size=1, max_size=5),
    st.floats(0.05, 1.0),
)
def test_advantages_of_steps_are_bounded_and_sum_to_0(validities: list[list[float]], discount: float) -> None:
    found = step_advantages(validities, discount)
    flat = [(value, valid) for own, marks in zip(found, validities) for value, valid in zip(own, marks)]
    assert sum(value for value, _ in flat) == pytest.approx(0.0, abs=1e-12)
    assert all(0 <= value <= 1 if valid else -1 <= value <= 0 for value, valid in flat)
    for own, marks in zip(found, validities):
        losses = [abs(value) for value, valid in zip(own, marks) if not valid]
        assert losses == sorted(losses, reverse=True), "earlier invalid steps weigh more"
