"""Diversity prompting: templates are drawn deterministically, shared by a group, and logged separately."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import ToyData, checkpoint_bytes, read_metrics, toy_config

from medvqa_rl.config import PromptConfig
from medvqa_rl.core.answers import read_group
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.learning.batching.mixing import template_for
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.step_metrics import record_completions, template_metrics
from medvqa_rl.learning.sft import SftLearner, train_sft
from medvqa_rl.rewards.scores import Scores

MIX = PromptConfig.model_validate({"mix": {"explain": 1, "short": 2, "open_ended": 1, "choice": 4}})
CHOICE = Sample("s", "Which?", "B", "choice", options=("left", "right"))
OPEN = Sample("s", "What is seen?", "mass", "open")


def drawn(sample: Sample, config: PromptConfig = MIX, *, count: int = 4000) -> Counter[str]:
    return Counter(template_for(sample, config, seed=0, step=step, occurrence=0) for step in range(count))


def test_templates_are_drawn_by_weight() -> None:
    found = drawn(CHOICE)
    for template, weight in MIX.mix.weights.items():
        share = weight / 8
        assert abs(found[template] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    # Without options the multiple-choice template does not fit, and the others share its weight.
    found = drawn(OPEN)
    assert found.keys() == {"explain", "short", "open_ended"}
    assert abs(found["short"] / 4000 - 0.5) < 4 * math.sqrt(0.25 / 4000)


def test_the_default_template_is_used_if_none_fits_or_has_a_weight() -> None:
    only = PromptConfig.model_validate({"template": "direct", "mix": {"choice": 1}})
    assert drawn(OPEN, only, count=50) == {"direct": 50}
    assert drawn(CHOICE, only, count=50) == {"choice": 50}
    assert drawn(CHOICE, PromptConfig(), count=50) == {"think_answer": 50}


def test_a_template_depends_on_its_address_and_not_on_the_gold_answer() -> None:
    def draw(sample: Sample, seed: int = 0, step: int = 0, occurrence: int = 0) -> str:
        return template_for(sample, MIX, seed=seed, step=step, occurrence=occurrence)

    samples = [replace(CHOICE, id=f"s{index}") for index in range(200)]
    first = [draw(sample) for sample in samples]
    assert first == [draw(sample) for sample in reversed(samples)][::-1]
    assert first == [draw(replace(sample, answer="A", reasoning="seen")) for sample in samples]
    for other in ({"seed": 1}, {"step": 1}, {"occurrence": 1}):
        assert first != [draw(sample, **other) for sample in samples]
    assert first[:6] == ["short", "explain", "short", "explain", "choice", "explain"]  # on any machine


def group(template: Any, *texts: str) -> Group:
    prompt = EncodedPrompt(np.arange(3), {}, "prompt", template=template)
    return Group(CHOICE, prompt, [Completion((1,) * (index + 1), text, False) for index, text in enumerate(texts)])


def test_metrics_per_template() -> None:
    groups = [
        group("short", "<answer>B</answer>", "<think>x</think><answer>B</answer>"),
        group("think_answer", "<answer>B</answer>", "<think>x</think><answer>A</answer>"),
        group("short", "B", "<answer>A</answer>"),
    ]
    reward = np.array([[2.0, 1.0], [1.0, 1.0], [0.0, math.nan]])
    reads = [read for group in groups for read in read_group(group)]
    records = record_completions(
        groups, Scores(reward, {"mine": reward}, {"mine": reward == reward}, reads=reads), np.zeros((3, 2))
    )
    assert [record.template for record in records] == ["short"] * 2 + ["think_answer"] * 2 + ["short"] * 2
    assert [record.is_well_formed for record in records] == [True, False, False, True, False, True]
    assert json.loads(json.dumps(records[0].to_json()))["template"] == "short"
    found = template_metrics(records)
    assert found == pytest.approx(
        {
            "prompts/short/share": 4 / 6,
            "prompts/short/reward": 1.0,  # of the three that are scored
            "prompts/short/correct": 0.5,
            "prompts/short/format": 0.5,
            "prompts/short/length": 1.5,
            "prompts/think_answer/share": 2 / 6,
            "prompts/think_answer/reward": 1.0,
            "prompts/think_answer/correct": 0.5,
            "prompts/think_answer/format": 0.5,
            "prompts/think_answer/length": 1.5,
        }
    )


def stored(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(run.glob("samples/*.jsonl")) for line in path.open()]


SHORT: dict[str, Any] = {"steps": 3, "save_steps": 1, "log_completions_steps": 1}


def test_a_group_shares_one_template_and_a_resumed_run_draws_the_same(tiny_folder, tmp_path) -> None:
    folder, prompt = tiny_folder("qwen2_vl"), {"mix": {"explain": 1, "short": 1, "describe_think": 1}}
    constant = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
    common = {"prompt": prompt, "optimizer": constant, "rollout": {"max_resample_times": 1}}
    whole = train(toy_config(folder, tmp_path / "whole", train=SHORT, **common), train_set=ToyData())
    rows = stored(whole)
    size = len({row["index"] for row in rows})
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    assert all(len({row["template"] for row in own}) == 1 for own in groups)
    assert {row["template"] for row in rows} == {"explain", "short", "describe_think"}
    for line in read_metrics(whole):
        shares = {name: value for name, value in line.items() if name.startswith("prompts/") and "share" in name}
        of_step = [row["template"] for row in rows if row["step"] == line["step"]]
        assert shares == {f"prompts/{t}/share": pytest.approx(of_step.count(t) / len(of_step)) for t in set(of_step)}
    parts = tmp_path / "parts"
    for steps, workers in ((1, 2), (3, 0)):
        more = {"train": SHORT | {"steps": steps}, "prefetch": {"workers": workers}}
        train(toy_config(folder, parts, **more, **common), train_set=ToyData(), resume=steps > 1)
    assert checkpoint_bytes(parts, 3) == checkpoint_bytes(whole, 3)
    assert [row["template"] for row in stored(parts)] == [row["template"] for row in rows]


def test_without_a_mix_there_are_no_template_metrics(tiny_folder, tmp_path) -> None:
    run = train(toy_config(tiny_folder("qwen2_vl"), tmp_path / "run", train=SHORT | {"steps": 1}), train_set=ToyData())
    assert not any(name.startswith("prompts/") for line in read_metrics(run) for name in line)
    assert {row["template"] for row in stored(run)} == {"think_answer"}


def test_supervised_targets_follow_the_format_of_their_template(tiny_folder, tmp_path, monkeypatch) -> None:
    seen: list[tuple[str, str]] = []
    accumulate = SftLearner.accumulate

    def spy(learner: Any, groups: Any) -> Any:
        seen.extend((group.template, group.completions[0].text) for group in groups)
        return accumulate(learner, groups)

    monkeypatch.setattr(SftLearner, "accumulate", spy)
    config = toy_config(
        tiny_folder("qwen2_vl"),
        tmp_path / "run",
        train=SHORT | {"steps": 2},
        prompt={"mix": {"direct": 1, "short": 1, "think_answer": 1}},
    )
    train_sft(config, train_set=ToyData())
    assert {template for template, _ in seen} >= {"direct", "short"}
    for template, text in seen:
        assert text.startswith("<answer>") == (
            template == "short" or (template == "think_answer" and "<think>" not in text)
        )
        assert ("<" in text) == (template != "direct")
