"""Dynamic sampling: which groups are replaced, and that a resumed run repeats it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy import ToyData, read_metrics, toy_config

from medvqa_rl.core.answers import Read
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning import collector
from medvqa_rl.learning.batching.resampling import groups_without_signal, resample, resampled_occurrence
from medvqa_rl.learning.batching.sampler import step_indices
from medvqa_rl.learning.grpo import train
from medvqa_rl.rewards.process import Step
from medvqa_rl.rewards.scores import Scores

NAN = float("nan")
SAMPLE = Sample("s", "Which?", "B", "choice", options=("left", "right"))
PROMPT = EncodedPrompt(np.arange(3), {}, "prompt")


def group(name: str) -> Group:
    return Group(replace(SAMPLE, id=name), PROMPT, [Completion((1,), name, False)] * 2)


def scores(*rewards: tuple[float, float], note: str = "") -> Scores:
    total = np.array(rewards)
    columns = {"note": [f"{note}{index}" for index in range(total.size)]} if note else {}
    reads = [Read(SAMPLE, "direct", Completion((1,), f"{note}{index}", False)) for index in range(total.size)]
    steps = [[Step(0, 1, 1.0)] * len(read.completion.text) for read in reads]
    return Scores(total, {"half": total / 2}, {"half": total < 2}, {"metric": 1.0}, columns, reads, steps)


def test_groups_with_equal_rewards_have_no_signal_unless_unscored():
    assert groups_without_signal(np.array([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN], [0.0, 0.0]])) == [0, 4]


def test_groups_without_signal_are_replaced():
    calls: list[tuple[int, list[int]]] = []
    found = {1: scores((2.0, 2.0), (1.0, 0.0), note="x"), 2: scores((0.0, 3.0))}

    def roll_out(attempt: int, numbers: list[int]) -> list[Group]:
        calls.append((attempt, numbers))
        return [group(f"{attempt}/{number}") for number in numbers]

    groups, merged = resample(
        [group("a"), group("b"), group("c")],
        scores((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), note="own"),
        max_attempts=5,
        roll_out=roll_out,
        score=lambda fresh: found[int(fresh[0].sample.id[0])],
    )
    assert calls == [(1, [0, 1]), (2, [0])]  # only as many prompts and attempts as needed
    assert [g.sample.id for g in groups] == ["2/0", "b", "1/1"]
    assert merged.total.tolist() == [[0.0, 3.0], [0.0, 1.0], [1.0, 0.0]]
    assert merged.parts["half"].tolist() == [[0.0, 1.5], [0.0, 0.5], [0.5, 0.0]]
    assert merged.columns["note"] == [None, None, "own2", "own3", "x2", "x3"]
    assert [r.completion.text for r in merged.reads] == ["0", "1", "own2", "own3", "x2", "x3"]
    assert [len(steps) for steps in merged.steps] == [len(r.completion.text) for r in merged.reads]
    assert merged.extras == {"metric": 1.0, "frac_groups_resampled": pytest.approx(2 / 3)}


def test_groups_without_signal_stay_after_the_last_attempt():
    own, equal = scores((1.0, 1.0), (0.0, 0.0)), scores((0.0, 0.0), (2.0, 2.0))
    attempts: list[int] = []

    def roll_out(attempt: int, numbers: list[int]) -> list[Group]:
        attempts.append(attempt)
        return [group("other")] * len(numbers)

    groups, merged = resample(
        [group("a"), group("b")],
        own,
        max_attempts=3,
        roll_out=roll_out,
        score=lambda _: equal,
    )
    assert attempts == [1, 2, 3] and [g.sample.id for g in groups] == ["a", "b"]
    assert merged.total is own.total and merged.extras["frac_groups_resampled"] == 0.0


@pytest.mark.parametrize("length", [None, 7])
def test_attempts_draw_different_prompts_deterministically(length):
    def drawn(step: int, attempt: int) -> list[tuple[int, int]]:
        return step_indices(step, num_prompts=4, length=length, seed=1, attempt=attempt)

    assert drawn(3, 2) == drawn(3, 2)
    assert len({tuple(drawn(step, attempt)) for step in range(2) for attempt in range(4)}) == 8
    if length is None:
        assert not set(drawn(0, 1)) & {place for step in range(100) for place in drawn(step, 0)}
    else:
        epoch = [index for step in range(7) for index, number in drawn(step, 1) if number == 0]
        assert sorted(epoch) == list(range(7))
    assert len({resampled_occurrence(attempt, epoch) for attempt in range(4) for epoch in range(9)}) == 36


def test_a_rank_without_groups_to_replace_still_takes_part():
    asked: list[list[int]] = []

    def number(places: list[int]) -> list[int] | None:
        asked.append(places)
        return [1, 3][: len(places)] if len(asked) < 3 else None

    def roll_out(attempt: int, numbers: list[int]) -> list[Group]:
        assert (attempt, numbers) == (1, [1])
        return [group("other")]

    groups, _ = resample(
        [group("a"), group("b")],
        scores((1.0, 1.0), (0.0, 1.0)),
        max_attempts=9,
        roll_out=roll_out,
        score=lambda _: scores((0.0, 3.0)),
        global_indices=number,
    )
    assert asked == [[0], [], []] and [g.sample.id for g in groups] == ["other", "b"]


def test_a_resumed_run_repeats_the_resampling(tiny_folder, tmp_path, monkeypatch):
    """Stopped after two of four steps and resumed: the same attempts and identical metrics."""
    rewards = {"format": 0.0, "correctness": 0.0, "functions": {"toy.odd_vowels": 1.0}}

    def config(name: str, steps: int = 4, times: int = 20):
        return toy_config(
            tiny_folder("qwen2_vl"),
            tmp_path / name,
            train={"steps": steps, "prompts_per_step": 4, "save_steps": 2},
            rewards=rewards,
            rollout={"max_resample_times": times},
        )

    seen: list[list[int]] = []
    roll_out = collector.roll_out

    def watched(config, setup, step, prompts):
        seen.append([prepared.occurrence for prepared in prompts])
        return roll_out(config, setup, step, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(collector, "roll_out", watched)
        whole = read_metrics(train(config("whole"), train_set=ToyData(50)))
    plain = read_metrics(train(config("plain", times=0), train_set=ToyData(50)))
    assert sum(row["frac_reward_zero_std"] for row in plain) >= 1.0
    assert all(row["frac_reward_zero_std"] == 0.0 for row in whole)
    assert sum(row["frac_groups_resampled"] for row in whole) > 0 and "frac_groups_resampled" not in plain[0]
    assert {epoch // 2**32 for epochs in seen for epoch in epochs} >= {0, 1}

    train(config("resumed", steps=2), train_set=ToyData(50))
    resumed = read_metrics(train(config("resumed"), train_set=ToyData(50), resume=True))
    assert [row["reward"] for row in resumed[2:]] == [row["reward"] for row in whole[2:]]
