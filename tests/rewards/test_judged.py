"""The medical semantic reward: what the judge is shown, and what becomes of its verdicts.

Run: pytest tests/rewards/test_semantic.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from medvqa_rl.config import RewardsConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.run.run_dir import RunDir
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judges import JudgeIdentity, JudgeRequest, Verdict
from medvqa_rl.rewards.judges.load import notices, overlap

IDENTITY = JudgeIdentity("j", "w", "p", 0.0)


class Words:
    """Yes to what holds "sound", failed at "broken", No to the rest."""

    identity = IDENTITY

    def __init__(self) -> None:
        self.seen: list[JudgeRequest] = []

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.seen += requests
        return [
            Verdict.failed("broken")
            if "broken" in request.reasoning
            else Verdict(float("sound" in request.reasoning), 1.25)
            for request in requests
        ]


def group(*texts: str) -> Group:
    sample = Sample("q", "What?", "B", "choice", (), ("mass", "cyst"))
    prompt = EncodedPrompt(np.zeros(1, dtype=np.int64), None, None, "")
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
    rewards = Rewards(RewardsConfig(format=0, correctness=1, semantic=0.5), judge=judge)
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


def test_without_a_weight_no_judge_is_asked() -> None:
    judge = Words()
    assert Rewards(RewardsConfig(), judge=judge).names == ("format", "correctness")
    Rewards(RewardsConfig(), judge=judge).score([group(*TEXTS)], step=0)
    assert not judge.seen


def test_the_gold_answer_and_the_image_are_not_shown() -> None:
    assert set(JudgeRequest.__dataclass_fields__) == {"question", "options", "reasoning"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": {"semantic": "much"}}, "rewards.semantic is the text 'much', but must be a number"),
        ({"rewards": {"semantic": -1.0}}, "a number of at least 0"),
        ({"rewards": {"semantic": 1.0}, "prompt": {"template": "direct"}}, "asks for no reasoning"),
        ({"judge": {"model": "phantom:jury"}}, "the embedded judges are phantom:judge and phantom:judge_eval"),
        ({"judge": {"model": " "}}, "judge.model is empty"),
        ({"judge": {"device": "gpu"}}, "judge.device is 'gpu', but must be auto, cpu, cuda or such as cuda:1"),
        ({"judge": {"template": "chat"}}, "the embedded judges read the reasoning alone"),
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
def test_bad_settings_are_told_in_a_sentence(given: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_config(given, purpose="train")
    assert message in str(caught.value)
    assert "sk-12" not in str(caught.value) and "me:key" not in str(caught.value)


def test_a_judge_is_known_by_its_folder_too(tmp_path: Path) -> None:
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


def test_where_texts_go_is_said() -> None:
    endpoint = {"model": "m", "endpoint": "https://judge.example:8443/v1"}
    config = build_config({"rewards": {"semantic": 1.0}, "judge": endpoint})
    (line,) = notices(config)
    assert "sent to judge.example:8443" in line and "images are not" in line
    assert not notices(build_config({"judge": endpoint})), "a judge that is not used is sent nothing"
    assert not notices(config, rewards=False), "supervision and evaluation do not reward"
    assert not notices(build_config({"rewards": {"semantic": 1.0}}))


def test_the_same_judge_in_both_places_is_warned_of() -> None:
    both = {"rewards": {"semantic": 1.0}, "eval_judge": {"model": "phantom:judge"}}
    (line,) = notices(build_config(both))
    assert line.startswith("Warning: the judge phantom:judge both rewards and evaluates")
    assert not notices(build_config({"rewards": {"semantic": 1.0}, "eval_judge": {"model": "phantom:judge_eval"}}))
    assert overlap(IDENTITY, JudgeIdentity("another name", "w", "q", 0.0)) is not None
    assert overlap(IDENTITY, JudgeIdentity("j", "other weights", "p", 0.0)) is None


def test_a_run_is_resumed_with_its_judge_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.check_judges({"reward": IDENTITY}, resume=False)
    written = json.loads((tmp_path / "judge.json").read_text())
    assert written == {"reward": {"name": "j", "fingerprint": "w", "prompt_hash": "p", "strictness": 0.0}}
    run.check_judges({"reward": IDENTITY}, resume=True)
    with pytest.raises(ValueError, match="judge has changed since this run was started"):
        run.check_judges({"reward": JudgeIdentity("j", "w2", "p", 0.0)}, resume=True)


def test_a_run_without_a_judge_says_nothing_of_one(tmp_path: Path) -> None:
    RunDir(tmp_path).check_judges({}, resume=False)
    assert not (tmp_path / "judge.json").exists()
    assert math.isnan(Verdict.failed("x").value)
