"""Rewards for reasoning: coherence and grades, what the judge is shown, the gate, and what is logged.

Run: pytest tests/rewards/test_judged.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medvqa_rl.config import RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.grpo import check_rewardable
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judged import gated, unseen
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.load import notices, overlap, rubrics_of
from medvqa_rl.rewards.judges.rubric import COHERENCE, REASONING

IDENTITY = JudgeIdentity("j", "w", "p", 0.0)


class Words:
    """Yes to what holds "sound", failed at "broken", No to the rest."""

    identity = IDENTITY

    def __init__(self) -> None:
        self.seen: list[JudgeRequest] = []

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.seen += requests
        return [
            Grade.failed("broken")
            if "broken" in request.reasoning
            else Grade(float("sound" in request.reasoning), margin=1.25)
            for request in requests
        ]


class Digits:
    """Gives the score that the reasoning names, fails where it names none."""

    identity = JudgeIdentity("j", "w", REASONING.hash, 0.0)

    def __init__(self) -> None:
        self.seen: list[JudgeRequest] = []

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.seen += requests
        return [
            Grade(float(request.reasoning), "As said.") if request.reasoning.isdigit() else Grade.failed("no digit")
            for request in requests
        ]


def group(*texts: str) -> Group:
    sample = Sample("q", "What?", "B", "choice", (), ("mass", "cyst"), description="A film.")
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), {}, "")
    return Group(sample, prompt, [Completion((1, 2), text, False) for text in texts])


TEXTS = (
    "<think>sound</think><answer>B</answer>",
    "<think>odd</think><answer>B</answer>",
    "sound <answer>B</answer>",
    "<think>broken</think><answer>A</answer>",
    "<think>sound<answer>B</answer>",
)


def test_verdicts_are_a_part_and_failures_are_unscored() -> None:
    judge = Words()
    rewards = Rewards(RewardsConfig(format=0, correctness=1, semantic=0.5), judges={"coherence": judge})
    assert rewards.names == ("correctness", "semantic")
    scores = rewards.score([group(*TEXTS)], step=0)
    np.testing.assert_array_equal(scores.parts["semantic"], [[1, 0, 0, np.nan, 0]])
    np.testing.assert_array_equal(scores.total, [[1.5, 1, 1, np.nan, 1]])
    assert [request.reasoning for request in judge.seen] == ["sound", "odd", "", "broken", ""]
    assert {(request.question, request.options) for request in judge.seen} == {("What?", ("mass", "cyst"))}
    assert scores.columns["judge"] == [str(IDENTITY)] * 5
    assert scores.columns["judge_margin"] == [1.25, 1.25, 1.25, None, 1.25]
    assert scores.columns["judge_failure"] == ["", "", "", "broken", ""]
    assert scores.extras == {"judge/asked": 5.0}
    advantages = group_advantages(torch.from_numpy(scores.total), scale="none")
    expected = [[0.375, -0.125, -0.125, 0.0, -0.125]]  # the mean of the four scored ones is 1.125
    np.testing.assert_allclose(advantages.numpy(), expected)


def test_the_composite_length_asks_the_judge_once_for_all_parts() -> None:
    judge = Words()
    texts = [
        said("sound one. Two. Three.", "B"),  # 4 words of 4, 3 statements of 3
        said("sound. Sound.", "B"),  # 1 of 4 words, 1 of 3 statements, half of them repeat
        said("One. Two. Three. Four.", "B"),
        said("sound one. Two. Three.", "A"),
        said("broken", "A"),
        "sound <answer>B</answer>",
    ]
    config = RewardsConfig(format=0, correctness=0, semantic=0.5, composite=2, length_target=4, statements_target=3)
    rewards = Rewards(config, judges={"coherence": judge})
    scores = rewards.score([group(*texts)], step=0, count_tokens=lambda text: len(text.split()))
    np.testing.assert_allclose(scores.parts["composite"], [[1, 1 / 8, 0, 0, math.nan, 0]])
    np.testing.assert_allclose(scores.total, [[2.5, 0.5 + 1 / 4, 0, 0.5, math.nan, 0]])
    assert len(judge.seen) == len(texts) and scores.extras == {"judge/asked": 6.0}
    assert rubrics_of(RewardsConfig(composite=0.1)) == [COHERENCE]


def test_without_a_weight_no_judge_is_asked() -> None:
    judge = Words()
    assert Rewards(RewardsConfig(), judges={"coherence": judge}).names == ("format", "correctness")
    Rewards(RewardsConfig(), judges={"coherence": judge}).score([group(*TEXTS)], step=0)
    assert not judge.seen


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
def test_the_gate_never_raises_rewards_or_lowers_those_of_right_answers(
    value: float, correctness: float, gate: float
) -> None:
    assert 0 <= gated(value, correctness, gate) <= value and gated(value, 1.0, gate) == value
    assert gated(value, 0.0, gate) <= gate
    assert gated(value, correctness, gate) >= gated(value, 0.0, gate)


def test_grades_are_a_part_that_the_gate_limits() -> None:
    texts = [said(3, "B"), said(1, "B"), said(3, "A"), said(1, "A"), said("odd", "B"), said(2, "?")]
    grader = Digits()
    config = RewardsConfig(format=0, correctness=1, reasoning=0.6, reasoning_gate=0.5)
    rewards = Rewards(config, judges={"reasoning": grader})
    scores = rewards.score([group(*texts)], step=0)
    expected = [[1, 1 / 3, 0.5, 1 / 3, math.nan, 0.5]]
    np.testing.assert_allclose(scores.parts["reasoning"], expected)
    np.testing.assert_allclose(scores.total, np.array([[1, 1, 0, 0, 1, 0]]) + 0.6 * np.array(expected))
    assert scores.columns["reasoning_score"] == [3, 1, 3, 1, None, 2]
    assert scores.columns["reasoning_reason"] == ["As said."] * 4 + ["no digit", "As said."]
    assert scores.columns["reasoning_judge"] == [str(grader.identity)] * 6
    assert scores.extras["rewards/reasoning/ungated"] == pytest.approx((3 + 1 + 3 + 1 + 2) / 3 / 5)
    assert scores.extras["rewards/reasoning/ungated_wrong"] == pytest.approx((3 + 1 + 2) / 3 / 3)
    assert scores.extras["judge/reasoning/asked"] == 6
    first = grader.seen[0]
    assert first == JudgeRequest("What?", ("mass", "cyst"), "3", answer="B", gold="B: cyst", description="A film.")
    assert grader.seen[2].answer == "A"


def test_unparsable_completions_are_shown_as_empty() -> None:
    grader = Digits()
    rewards = Rewards(RewardsConfig(format=0, correctness=0, reasoning=1), judges={"reasoning": grader})
    assert rewards.names == ("reasoning",)
    rewards.score([group("3 <answer>B</answer>", "<think>3</think>B")], step=0)
    assert [(request.reasoning, request.answer) for request in grader.seen] == [("", "B"), ("3", "")]


def test_sections_that_were_not_prompted_are_neither_graded_nor_penalised() -> None:
    """Answers alone, to a prompt that asks for them alone, beside a group that reasons."""
    texts = [[said(3, "B"), said(1, "B"), said(0, "A")], [f"<answer>{answer}</answer>" for answer in "BAB"]]
    reasoned, short = (group(*some) for some in texts)
    short.prompt = replace(short.prompt, template="short")
    grader = Digits()
    config = RewardsConfig(reasoning=1, reasoning_gate=0.0)
    scores = Rewards(config, judges={"reasoning": grader}).score([reasoned, short], step=0)
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


def test_without_a_weight_no_judge_grades() -> None:
    assert rubrics_of(RewardsConfig()) == [] and rubrics_of(RewardsConfig(reasoning=0.1)) == [REASONING]
    Rewards(RewardsConfig(), judges={"reasoning": (grader := Digits())}).score([group(said(3, "B"))], step=0)
    assert not grader.seen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {"semantic": "much"}}, "rewards.semantic is the text 'much', but must be a number"),
        ({"rewards": {"semantic": -1.0}}, "a number of at least 0"),
        ({"rewards": {"semantic": 1.0}, "prompt": {"template": "direct"}}, "asks for no reasoning"),
        ({"rewards": {"reasoning_gate": 1.5}}, "rewards.reasoning_gate is 1.5, but must be a number from 0 to 1"),
        ({"rewards": {"reasoning": 1.0}, "prompt": {"template": "direct"}}, "set rewards.reasoning=0 or prompt"),
        (
            {"rewards": {"process": 1.0}, "prompt": {"template": "direct"}},
            "rewards.process is 1, but prompt.template=direct asks for no steps to judge: set rewards.process=0",
        ),
        (
            {"rewards": {"process": 1.0}, "loss": {"type": "dpo"}},
            "rewards.process is 1, but loss.type is dpo, which prefers whole completions",
        ),
        (
            {"rewards": {"looking": 1.0, "looking_threshold": 20.0}},
            "rewards.looking_cap is 20 and rewards.looking_threshold 20, but the reward rises from the threshold",
        ),
        ({"rewards": {"process_discount": 0.0}}, "rewards.process_discount is 0.0, but must be a number above 0"),
        ({"rewards": {"composite": 1.0}, "prompt": {"template": "direct"}}, "it counts the tokens of the reasoning"),
        (
            {"rewards": {"composite": 2.0}, "eval": {"perplexity_model": "phantom:judge"}},
            "but that is the judge that rewards (rewards.composite is 2)",
        ),
        ({"judge": {"model": "phantom:jury"}}, "the embedded judges are phantom:judge, phantom:judge_eval and"),
        ({"judge": {"sees": "sound"}}, "judge.sees is the text 'sound', but must be text, description or image"),
        ({"judge": {"sees": "image"}}, "phantom:judge only reads the reasoning: set judge.sees=text, or judge.model"),
        ({"judge": {"sees": "description"}}, "judge.sees is description, but phantom:judge only reads"),
        (
            {"judge": {"model": "phantom:judge_sees"}},
            "but judge.sees is text: set judge.sees to image or description",
        ),
        (
            {"judge": {"model": "a/b", "sees": "image", "template": "biogpt"}},
            "judge.sees is image, but judge.template is biogpt, which has no place for an image",
        ),
        (
            {"eval_judge": {"model": "a/b", "sees": "image"}},
            "eval_judge.sees is image, but evaluations have the stored answers judged, without images",
        ),
        ({"judge": {"model": " "}}, "judge.model is empty"),
        ({"judge": {"device": "gpu"}}, "judge.device is 'gpu', but must be auto, cpu, cuda or such as cuda:1"),
        ({"judge": {"template": "chat"}}, "the embedded judges only read the reasoning"),
        (
            {"rewards": {"semantic": 1.0}, "eval": {"perplexity_model": "phantom:judge"}},
            "eval.perplexity_model is phantom:judge, but that is the judge that rewards (rewards.semantic is 1)",
        ),
        (
            {"rewards": {"semantic": 1.0}, "judge": {"model": "a/b"}, "eval": {"perplexity_model": "a/b"}},
            "name a fixed language model that does not reward",
        ),
        ({"eval": {"perplexity_model": "phantom:judge"}}, "the embedded language model is phantom:lm"),
        ({"judge": {"api_key_env": "KEY"}}, "judge.api_key_env is set, but judge.endpoint is not"),
        ({"judge": {"model": "m", "endpoint": "localhost:80"}}, "must be the address of a server"),
        ({"judge": {"model": "m", "endpoint": "http://me:key@host/v1"}}, "holds a user, a password or a query"),
        ({"judge": {"endpoint": "http://host/v1"}}, "give the name of the server's model"),
        ({"judge": {"model": "m", "endpoint": "http://host/v1", "strictness": 1.0}}, "without probabilities"),
        ({"judge": {"model": "m", "endpoint": "http://h/v1", "api_key_env": "sk-12"}}, "never the key itself"),
    ],
)
def test_invalid_settings_are_reported(given: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_config(given, purpose="train")
    assert message in str(caught.value)
    assert "sk-12" not in str(caught.value) and "me:key" not in str(caught.value)


def test_a_judge_is_also_identified_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "judge")
    given: dict[str, dict[str, object]] = {
        "judge": {"model": str(tmp_path / "judge")},
        "eval": {"perplexity_model": str(tmp_path / "link")},
    }
    build_config(given)  # it rewards nothing
    with pytest.raises(ValueError, match="but that is the judge that rewards"):
        build_config(given | {"rewards": {"semantic": 0.5}})
    build_config(given | {"rewards": {"semantic": 0.5}, "judge": {"model": "m", "endpoint": "http://host/v1"}})


def test_a_reward_of_reasoning_alone_is_a_reward() -> None:
    config = build_config({"rewards": {"format": 0, "correctness": 0, "reasoning": 1}}, purpose="train")
    assert {name for name, weight in config.rewards.weights.items() if weight} == {"reasoning"}


def test_sending_gold_answers_to_another_machine_is_reported() -> None:
    endpoint = {"model": "m", "endpoint": "https://judge.example/v1"}
    (line,) = notices(build_config({"rewards": {"reasoning": 1.0}, "judge": endpoint}))
    assert line.startswith(
        "Notice: questions, options, answers, reference answers, reasoning and descriptions of images are"
    )
    both = build_config({"rewards": {"reasoning": 1.0}, "eval_judge": {"model": "phantom:judge"}})
    assert [line.partition(":")[0] for line in notices(both)] == ["Warning"]


def test_the_destination_of_texts_is_reported() -> None:
    endpoint = {"model": "m", "endpoint": "https://judge.example:8443/v1"}
    config = build_config({"rewards": {"semantic": 1.0}, "judge": endpoint})
    (line,) = notices(config)
    assert "sent to judge.example:8443" in line and "images are not" in line
    assert not notices(build_config({"judge": endpoint})), "a judge that is not used is sent nothing"
    assert not notices(config, rewards=False), "supervision and evaluation do not reward"
    assert not notices(build_config({"rewards": {"semantic": 1.0}}))


@pytest.mark.parametrize(
    ("sees", "part", "sent"),
    [
        ("image", "semantic", "questions, options and reasoning are sent to h (judge.endpoint), and the images with"),
        ("description", "semantic", "questions, options, reasoning and descriptions of images are sent to h"),
        ("image", "reasoning", "reasoning and descriptions of images are sent to h (judge.endpoint), and the images"),
    ],
)
def test_sending_images_is_reported(sees: str, part: str, sent: str) -> None:
    judge = {"model": "m", "endpoint": "http://h/v1", "sees": sees}
    (line,) = notices(build_config({"rewards": {part: 1.0}, "judge": judge}))
    assert sent in line


def test_questions_without_what_the_judge_should_see_are_reported() -> None:
    blind = Sample("q", "What?", "B", "choice", (), ("mass", "cyst"))
    described = replace(blind, description="A film.")
    semantic = RewardsConfig(semantic=1.0)
    assert unseen(semantic, "description", [blind, blind])[0] == (
        "judge.sees is description, but no training question has one: set judge.sees=text or image, or name its "
        "column with data.columns.description."
    )
    assert unseen(semantic, "image", [described]) == (
        "judge.sees is image, but no training question has one: set judge.sees=text.",
        None,
    )
    assert unseen(semantic, "description", [blind, described, described, described]) == (
        None,
        "Warning: 25% of the training questions have no description of the image for the judge.",
    )
    for config, sees in ((semantic, "text"), (RewardsConfig(), "image")):
        assert unseen(config, sees, [blind]) == (None, None)  # type: ignore[arg-type]


def test_a_data_set_without_what_the_judge_should_see_is_refused() -> None:
    blind = [Sample(str(index), "What?", "B", "choice", (), ("mass", "cyst")) for index in range(3)]
    judge = {"model": "a/b", "sees": "image"}
    config = build_config({"rewards": {"semantic": 1.0}, "judge": judge}, purpose="train")
    dataset = Listed(blind)
    with pytest.raises(ValueError, match=r"judge\.sees is image, but no training question has one"):
        check_rewardable(config, dataset)
    assert check_rewardable(build_config({"rewards": {"semantic": 1.0}}), dataset) == []
    with pytest.raises(ValueError, match=r"rewards\.looking is 1, but no training question has an image"):
        check_rewardable(build_config({"rewards": {"looking": 1.0}}), dataset)


class Listed(list[Sample]):
    name, fingerprint, is_endless = "listed", "f", False
    notes: Mapping[str, int] = {}


def test_a_judge_that_sees_gets_images_that_are_decoded_once() -> None:
    class Picture:
        key, loads = "p", 0

        def load(self) -> Image.Image:
            Picture.loads += 1
            return Image.new("RGB", (2, 2))

        def header_pixels(self) -> None:
            return None

    class Looking(Words):
        def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
            assert all(image.digest for request in requests for image in request.images)
            assert all(len(request.images) == 1 for request in requests)
            return super().grade(requests)

    own = group(*TEXTS)
    own.sample = replace(own.sample, images=(Picture(),))
    for weights in ({"semantic": 1.0}, {"semantic": 1.0, "composite": 1.0}):
        Picture.loads = 0
        config = RewardsConfig(**weights)  # type: ignore[arg-type]
        Rewards(config, judges={"coherence": Looking()}).score([own], step=0, count_tokens=len)
        assert Picture.loads == 1


def test_the_same_judge_for_reward_and_evaluation_triggers_a_warning() -> None:
    both = {"rewards": {"semantic": 1.0}, "eval_judge": {"model": "phantom:judge"}}
    (line,) = notices(build_config(both))
    assert line.startswith("Warning: the judge phantom:judge both rewards and evaluates")
    assert not notices(build_config({"rewards": {"semantic": 1.0}, "eval_judge": {"model": "phantom:judge_eval"}}))
    assert overlap(IDENTITY, JudgeIdentity("another name", "w", "q", 0.0)) is not None
    assert overlap(IDENTITY, JudgeIdentity("j", "other weights", "p", 0.0)) is None
