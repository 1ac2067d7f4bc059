"""Phantom models of three sizes, and builds that are interrupted.

Run: pytest tests/phantom/test_build.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import SIZES
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.phantom import binding, training
from medvqa_rl.phantom import build as module
from medvqa_rl.phantom.architectures import DIMENSIONS, PHANTOMS
from medvqa_rl.phantom.binding import Binding, learn_binding
from medvqa_rl.phantom.build import build
from medvqa_rl.phantom.training import count_parameters
from medvqa_rl.phantom.vlm import build_model, build_processor


@pytest.mark.parametrize(("size", "millions"), [("small", 0.43), ("base", 1.53), ("large", 5.92)])
def test_sizes_have_the_stated_weights(size: str, millions: float) -> None:
    model = build_model(build_processor(), seed=0, size=size)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert all(dimensions.hidden == 32 * dimensions.heads for dimensions in DIMENSIONS.values())


@pytest.mark.parametrize("family", PHANTOMS)
@pytest.mark.parametrize("size", [size for size in SIZES if size != "base"])
def test_every_family_has_every_size(family: str, size: str) -> None:
    processor = build_processor(family)
    policy = Policy(build_model(processor, 0, size), processor, torch.device("cpu"), ModelConfig())
    practice = Binding(policy, 0)
    loss, _ = practice.loss(policy.model, *practice.draw(2, 2, 5, use_words=True))
    assert torch.isfinite(loss)
    sample, _ = module.lesson("base", 0, 0)
    assert int((processor.encode(sample, "think_answer").input_ids == processor.image_token_id).sum()) == 16


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make every stage a few steps, of which each is kept, and record which stages are run."""
    ran: list[str] = []

    def recorded(name: str, **settings: Any) -> None:
        function = getattr(module, name)

        def run(policy: Policy, stage: Any, *args: Any, **rest: Any) -> None:
            ran.append(stage if name == "learn" else name)
            function(policy, stage, *args, **rest, **settings)

        monkeypatch.setattr(module, name, run)

    recorded("learn_to_see", batch=2)
    recorded("learn_binding")
    recorded("learn")
    loss = Binding.loss
    monkeypatch.setattr(Binding, "loss", lambda *args: (loss(*args)[0], 1.0))  # learned at once: 4 checks
    for place, name, value in (
        (module, "STEPS_SEEING", 2),
        (module, "BATCH", 2),
        (module, "examine", lambda policy, stage: {"home/choice": 0.5}),
        (binding, "CHECK_STEPS", 1),
        (training, "LOG_STEPS", 1),
    ):
        monkeypatch.setattr(place, name, value)
    return ran


def test_an_interrupted_build_ends_with_the_same_weights(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"size": "small", "steps": {"base": 2, "instruct": 2}, "resume": True}
    build(tmp_path / "whole", **settings)
    assert short == ["learn_to_see", "learn_binding", "base", "instruct"]
    short.clear()
    save, save_state, unsaved = module.save, training.save_state, ["base", "instruct"]

    def stop_after(*args: Any, **numbers: int) -> None:
        save_state(*args, **numbers)
        raise Interrupted

    def stop_before(policy: Policy, folder: Path) -> None:
        if folder.name in unsaved:
            unsaved.remove(folder.name)
            raise Interrupted
        save(policy, folder)

    monkeypatch.setattr(training, "save_state", stop_after)
    monkeypatch.setattr(binding, "save_state", stop_after)
    monkeypatch.setattr(module, "save", stop_before)
    for _ in range(2 + 3 + 2 + 2 + len(unsaved)):  # after every step but binding's last, and after either checkpoint
        with pytest.raises(Interrupted):
            build(tmp_path / "parts", **settings)
        assert not (tmp_path / "parts" / "build.json").exists()
    build(tmp_path / "parts", **settings)
    assert short == ["learn_to_see"] * 3 + ["learn_binding"] * 4 + ["base"] * 4 + ["instruct"] * 4
    for name in ("base", "instruct"):
        one, other = (load_file(tmp_path / place / name / "model.safetensors") for place in ("whole", "parts"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / "parts" / "stages").exists()
    policy = load_policy(ModelConfig(path=str(tmp_path / "parts" / "instruct"), device="cpu"))
    assert count_parameters(policy.model) == json.loads((tmp_path / "parts" / "build.json").read_text())["parameters"]
    short.clear()
    build(tmp_path / "parts", **settings)
    assert short == []  # it is finished


def test_binding_that_is_not_learned_is_reported() -> None:
    processor = build_processor()
    policy = Policy(build_model(processor, 0, "small"), processor, torch.device("cpu"), ModelConfig())
    with pytest.raises(RuntimeError, match="not learned in 2 steps"):
        learn_binding(policy, 0, [].append, rate=1e-3, max_steps=2)


def test_other_settings_and_unknown_sizes_are_refused(short: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--size is 'larg', but the sizes are small, base, large: did you mean large"):
        build(tmp_path / "new", size="larg")
    assert not (tmp_path / "new").exists()
    (tmp_path / "settings.json").write_text(json.dumps({"family": "qwen2_vl", "size": "large"}))
    with pytest.raises(ValueError, match="continue the build in it with --resume"):
        build(tmp_path, size="small")
    with pytest.raises(ValueError, match="was started with size large, but it is now small: remove the folder"):
        build(tmp_path, size="small", resume=True)
    assert short == []
