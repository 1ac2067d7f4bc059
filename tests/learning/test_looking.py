"""How much the policy needs its images: against the stock forward of one completion at a time, and in a run.

Run: pytest tests/learning/test_looking.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medvqa_rl.config import Config
from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.answers import answer_span
from medvqa_rl.core.prompts import render_answer
from medvqa_rl.core.types import Completion, Group, Sample
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.data.phantom.questions import draw_sample
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.looking import answer_probabilities, image_gains
from medvqa_rl.models.loading import Policy, load_policy
from tests.models.families.stock import stock_logps
from tests.models.families.tiny import tiny_policy


def picture(seed: int) -> MemoryImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    return MemoryImage(f"noise {seed}", Image.fromarray(pixels))


SAMPLES = [
    Sample("one", "Is there an effusion?", "yes", "closed", (picture(1),)),
    Sample("none", "Is there an effusion?", "yes", "closed"),
    Sample("two", "Which organ is seen?", "A", "choice", (picture(2),), ("brain", "liver")),
]
GREY = MemoryImage("grey", Image.new("RGB", (40, 32), (127, 127, 127)))


class Listed(list[Sample]):
    name, fingerprint, is_endless = "listed", "f", False
    notes: dict[str, int] = {}


DATA: Any = Listed(SAMPLES)


def settings(**rewards: Any) -> Config:
    return build_config(
        {
            "rewards": {"looking": 1.0, **rewards},
            "rollout": {"temperature": 1.5},
            "train": {"prompts_per_micro_batch": 2, "prompts_per_step": 4},
        }
    )


def groups_of(policy: Policy, samples: Sequence[Sample], *, cached: bool = True) -> list[Group]:
    """Groups of three completions of different length, with cached features as rollouts leave them."""
    rng = np.random.default_rng(0)
    groups = []
    for sample in samples:
        texts = [render_answer("an opacity", "yes"), render_answer("no", "no"), "no form"]
        ids = [(*policy.processor.encode_completion(text), *rng.integers(0, 300, 2).tolist()) for text in texts]
        completions = [Completion(tuple(tokens), policy.processor.decode(tokens), False) for tokens in ids]
        groups.append(Group(sample, policy.processor.encode(sample), completions))
    if cached:
        features = policy.processor.family.image_features(policy.model, [g.prompt for g in groups], "cpu")  # type: ignore[attr-defined]
        for group, feature in zip(groups, features):
            group.image_features = feature
    return groups


@torch.no_grad()
def logps(policy: Policy, groups: Sequence[Group], temperature: float) -> torch.Tensor:
    """(B, T) from the stock forward."""
    output: Any = policy.model.get_output_embeddings()  # type: ignore[operator]
    hook = output.register_forward_hook(lambda module, inputs, logits: logits / temperature)
    try:
        return stock_logps(policy, groups)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "internvl"])
def test_gains_equal_the_stock_forward_with_and_without_the_image(name: str) -> None:
    policy = tiny_policy(name)
    groups = groups_of(policy, SAMPLES)
    blind = [
        replace(group, sample=shown, prompt=policy.processor.encode(shown), image_features=None)
        for group in groups
        for shown in [replace(group.sample, images=(GREY,) * len(group.sample.images))]
    ]
    gains = image_gains(policy, groups, settings(), DATA)
    expected = (logps(policy, groups, 1.5) - logps(policy, blind, 1.5)).double().sum(1).numpy()
    np.testing.assert_allclose(gains, expected, atol=1e-4)
    np.testing.assert_array_equal(gains[3:6], 0.0)
    assert np.abs(gains[[0, 1, 2, 6, 7, 8]]).min() > 1e-3, "every completion with an image feels it"


def test_the_answer_alone_counts_if_asked() -> None:
    policy = load_policy(settings().model)
    sample = draw_sample(seed=0, split="looking", index=3)
    think = "The organ is brain."
    text = render_answer(think, "B")
    ids = policy.processor.encode_completion(text)
    completions = [Completion(ids, text, False), Completion((5, 6), "x", False)]
    group = Group(sample, policy.processor.encode(sample), completions)
    blank = replace(sample, images=(MemoryImage("grey", Image.new("RGB", (112, 112), (127, 127, 127))),))
    blind = replace(group, sample=blank, prompt=policy.processor.encode(blank))
    (place,) = [index for index, token in enumerate(ids) if policy.processor.decode([token]) == "B"]
    gain, nothing = image_gains(policy, [group], settings(looking_of="answer"), DATA)
    difference = (logps(policy, [group], 1.5) - logps(policy, [blind], 1.5))[0, place]
    assert gain == pytest.approx(float(difference), abs=1e-4) and nothing == 0.0
    assert image_gains(policy, [group], settings(), DATA)[0] != pytest.approx(gain, abs=1e-2)


def test_shuffled_images_are_those_of_another_question_whatever_the_step() -> None:
    policy = tiny_policy("qwen2_vl")
    groups = groups_of(policy, SAMPLES)
    config = settings(looking_against="shuffled")
    together = image_gains(policy, groups, config, DATA)
    np.testing.assert_allclose(image_gains(policy, groups[2:], config, DATA), together[6:], atol=1e-5)
    swapped = [
        replace(group, sample=shown, prompt=policy.processor.encode(shown), image_features=None)
        for group, image in ((groups[0], SAMPLES[2].images), (groups[2], SAMPLES[0].images))
        for shown in [replace(group.sample, images=image)]
    ]
    seen = [groups[0], groups[2]]
    expected = (logps(policy, seen, 1.5) - logps(policy, swapped, 1.5)).double().sum(1).numpy()
    np.testing.assert_allclose(together[[0, 1, 2, 6, 7, 8]], expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"random training questions have no other image than that of one"):
        image_gains(policy, groups[:1], config, Listed(SAMPLES[:2]))  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_rewards_looking_and_resumes_exactly(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "whole"),
        "model": {"path": "phantom:instruct", "device": "cpu"},
        "rollout": {"num_generations": 4, "max_completion_length": 64},
        "rewards": {"looking": 2.0, "looking_threshold": 0.5, "looking_cap": 8.0},
        "loss": {"beta": 0.0},
        "train": {"steps": 2, "prompts_per_step": 2, "save_steps": 1, "eval_steps": 0, "log_completions_steps": 1},
    }
    whole = train(build_config(given, purpose="train"))
    rows = lines(whole / "samples" / "step_000002.jsonl")
    for row in rows:
        share = min(1.0, max(0.0, (row["extra"]["looking_gain"] - 0.5) / 7.5))
        assert row["rewards"]["looking"] == pytest.approx(share if row["rewards"]["correctness"] else 0.0, abs=1e-6)
    gains = [row["extra"]["looking_gain"] for row in rows]
    metrics = lines(whole / "metrics.jsonl")[-1]
    assert metrics["rewards/looking/gain"] == pytest.approx(sum(gains) / len(gains), abs=1e-5)
    ignoring = [bool(row["rewards"]["correctness"]) and row["extra"]["looking_gain"] <= 0.5 for row in rows]
    assert metrics["rewards/looking/right_ignoring"] == sum(ignoring) / len(rows)
    again = dict(given, output_dir=str(tmp_path / "again"), train={**given["train"], "steps": 1})
    train(build_config(again, purpose="train"))
    again["train"] = given["train"]
    resumed = train(build_config(again, purpose="train"), resume=True)
    ends = [load_file(run / "checkpoints" / "step_000002" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_probabilities_of_answers_equal_the_stock_forward(name: str) -> None:
    policy = tiny_policy(name)
    groups = groups_of(policy, SAMPLES)
    found = answer_probabilities(policy, groups, settings())
    expected = []
    for row, completion in zip(logps(policy, groups, 1.0), (one for group in groups for one in group.completions)):
        span = answer_span(completion.text)
        if span is None:
            expected.append(1.0)
            continue
        texts = [
            policy.processor.decode(completion.token_ids[:count]) for count in range(len(completion.token_ids) + 1)
        ]
        inside = [len(after) > span[0] and len(before) < span[1] for before, after in pairwise(texts)]
        expected.append(float(row[: len(inside)][inside].double().sum().exp()))
    assert expected.count(1.0) == 3  # "no form"
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_run_rewards_calibration(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": "phantom:instruct", "device": "cpu"},
        "rollout": {"num_generations": 4, "max_completion_length": 64},
        "rewards": {"calibration": 0.5},
        "loss": {"beta": 0.0},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_steps": 0, "log_completions_steps": 1},
    }
    run = train(build_config(given, purpose="train"))
    rows = lines(run / "samples" / "step_000001.jsonl")
    for row in rows:
        error = row["extra"]["confidence"] - row["rewards"]["correctness"]
        assert row["rewards"]["calibration"] == pytest.approx(1 - error**2, abs=1e-5)
    mean = sum(row["extra"]["confidence"] for row in rows) / len(rows)
    assert lines(run / "metrics.jsonl")[-1]["rewards/calibration/confidence"] == pytest.approx(mean, abs=1e-5)
