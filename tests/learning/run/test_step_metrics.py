"""Metrics of a step, against values computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from medvqa_rl.config import RewardsConfig
from medvqa_rl.core.answers import read_group
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.run.step_metrics import mean_over_ranks, record_completions, rollout_metrics, to_json
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.scores import Scores

NAN = float("nan")
PROMPT = EncodedPrompt(np.arange(7), {}, "prompt")
SAMPLE = Sample("s", "Which?", "B", "choice", options=("left", "right"))


def completion(text: str, length: int, is_truncated: bool = False) -> Completion:
    return Completion((1,) * length, text, is_truncated)


def everywhere(parts):
    """For each part, that it applies to all completions."""
    return {name: np.ones(values.shape, dtype=bool) for name, values in parts.items()}


def records():
    first = [completion("<think>x</think><answer>B</answer>", 4), completion("<answer>A</answer>", 6)]
    second = [completion("no tags", 8, True), completion("<answer>left</answer>", 2)]
    groups = [Group(SAMPLE, PROMPT, first), Group(SAMPLE, PROMPT, second)]
    parts = {"correctness": np.array([[1.0, 0.0], [0.0, NAN]]), "other": np.array([[0.5, 0.5], [0.5, 0.5]])}
    total = parts["correctness"] + parts["other"]
    reads = [*read_group(groups[0]), *read_group(groups[1])]
    scores = Scores(total, parts, everywhere(parts), columns={"note": list("abcd")}, reads=reads)
    return record_completions(groups, scores, np.array([[1.0, -1.0], [0.0, 0.0]]))


def test_records():
    found = records()
    assert [(r.index, r.is_correct, r.has_answer, r.length, r.extra["note"]) for r in found] == [
        (0, True, True, 4, "a"),
        (1, False, True, 6, "b"),
        (0, False, False, 8, "c"),
        (1, False, True, 2, "d"),
    ]
    line = json.loads(json.dumps(found[3].to_json(), allow_nan=False))
    assert line["reward"] is None and line["rewards"] == {"correctness": None, "other": 0.5}
    assert (line["gold"], line["advantage"], line["prompt_length"]) == ("B", 0.0, 7)


def test_records_count_answers_to_hidden_options_as_the_rewards_do():
    prompt = replace(PROMPT, template="open_ended")
    texts = ["<think>x</think><answer>right</answer>", "<think>x</think><answer>B</answer>"]
    group = Group(SAMPLE, prompt, [completion(text, 3) for text in texts])
    scores = Rewards(RewardsConfig(), max_completion_length=8).score([group], step=0)
    found = record_completions([group], scores, np.zeros((1, 2)))
    assert [r.is_correct for r in found] == [r.rewards["correctness"] == 1.0 for r in found] == [True, False]


def test_rollout_metrics():
    metrics = rollout_metrics(records(), 2)
    assert metrics["reward"] == pytest.approx((1.5 + 0.5 + 0.5) / 3)  # without the unscored one
    assert metrics["reward_std"] == pytest.approx(np.std([1.5, 0.5, 0.5], ddof=1))
    assert metrics["frac_reward_zero_std"] == 0.5  # a single scored completion has none
    assert metrics["unscored_rate"] == 0.25
    assert metrics["rewards/correctness/mean"] == pytest.approx(1 / 3)
    assert metrics["rewards/other/std"] == 0.0
    assert metrics["completions/mean_length"] == 5.0
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (2.0, 8.0)
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/mean_terminated_length"] == 4.0
    assert metrics["completions/mean_length_correct"] == 4.0
    assert metrics["completions/mean_length_wrong"] == pytest.approx(16 / 3)
    assert metrics["no_answer_rate"] == 0.25


def test_a_part_counts_where_it_applies():
    group = Group(SAMPLE, PROMPT, [completion("<answer>B</answer>", 3) for _ in range(4)])
    parts = {"mine": np.array([[1.0, 0.5, NAN, NAN]]), "never": np.full((1, 4), NAN)}
    applies = {"mine": np.array([[True, True, True, False]]), "never": np.zeros((1, 4), dtype=bool)}
    found = record_completions(
        [group], Scores(parts["mine"], parts, applies, reads=read_group(group)), np.zeros((1, 4))
    )
    assert [record.to_json()["rewards"] for record in found] == [{"mine": 1.0}, {"mine": 0.5}, {"mine": None}, {}]
    metrics = rollout_metrics(found, 4)
    assert metrics["rewards/mine/mean"] == 0.75
    assert metrics["rewards/mine/std"] == pytest.approx(np.std([1.0, 0.5], ddof=1))
    assert math.isnan(metrics["rewards/never/mean"]) and metrics["unscored_rate"] == 0.5


def test_non_finite_metrics_are_null():
    assert to_json({"a": NAN, "b": math.inf, "c": 1.0}) == {"a": None, "b": None, "c": 1.0}


def test_mean_over_ranks():
    assert mean_over_ranks([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 2.0}


def test_the_correlation_of_a_part_with_right_answers():
    texts = ["<answer>B</answer>", "<answer>A</answer>", "<answer>B</answer>", "<answer>A</answer>"]
    group = Group(SAMPLE, PROMPT, [completion(text, 3) for text in texts])
    parts = {
        "correctness": np.array([[1.0, 0.0, 1.0, 0.0]]),
        "length": np.array([[1.0, 0.5, 0.5, 0.25]]),
        "against": np.array([[0.0, 1.0, NAN, 1.0]]),
        "constant": np.full((1, 4), 0.1) + np.array([[0, 1e-16, 0, 0]]),
    }
    scores = Scores(sum(parts.values()), parts, everywhere(parts), reads=read_group(group))
    found = record_completions([group], scores, np.zeros((1, 4)))
    metrics = rollout_metrics(found, 4)
    expected = np.corrcoef([1.0, 0.5, 0.5, 0.25], [1, 0, 1, 0])[0, 1]
    assert metrics["rewards/length/corr_correctness"] == pytest.approx(expected) and 0.6 < expected < 0.8
    assert metrics["rewards/against/corr_correctness"] == pytest.approx(-1.0)  # without the unscored one
    assert math.isnan(metrics["rewards/constant/corr_correctness"])
    assert "rewards/correctness/corr_correctness" not in metrics
