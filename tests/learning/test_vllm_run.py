"""Whole runs whose completions come from the stand-in for vLLM: through the command, resumed, on two ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy import toy_config
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.learning.setup import Setup
from medvqa_rl.rollout.decode import RolloutEngine
from tests import forking

STEPS = 3


def train(config: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", str(config), *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def write(tiny_folder, tmp_path, serve_vllm):
    """Writes settings of a run: ``write("name", "server")``."""

    def write_one(name: str, mode: str, **model: Any) -> Path:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "model": {"path": str(tiny_folder("qwen2_vl"))} | model,
            "data": {"num_val": 4},
            "rollout": {"num_generations": 3, "max_completion_length": 16, "engine": "vllm"},
            "rewards": {"format": 0.0, "correctness": 0.0, "functions": {"toy.vowels": 1.0}},
            "optimizer": {"learning_rate": 1e-2},
            "train": {"steps": STEPS, "prompts_per_step": 2, "save_steps": 1, "eval_steps": STEPS},
            "eval": {"bootstrap": 20},
        }
        if mode == "server":
            settings["vllm"] = {"mode": "server", "server_url": serve_vllm(tiny_folder("qwen2_vl")).url}
        path = tmp_path / f"{name}.yaml"
        path.write_text(write_yaml(settings), encoding="utf-8")
        return path

    return write_one


def weights(run: Path, which: int = -1) -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    folder = sorted((run / "checkpoints").iterdir())[which]
    return load_file(next(path for path in folder.iterdir() if re.match(r"(adapter_)?model\.safetensors", path.name)))


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("mode", "model"),
    [("colocate", {}), ("server", {"lora": {"rank": 2}})],
    ids=["colocate-full", "server-lora"],
)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(write, tmp_path, monkeypatch, mode, model):
    """Exactly so over the stand-in, whose completions depend on seeds and weights alone. Evaluations are the plain
    engine's; vLLM learns of the weights once a step."""
    loads, sampled = [], []
    fresh = Setup.sampling
    monkeypatch.setattr(Setup, "sampling", lambda setup: loads.append(1) or fresh(setup))
    monkeypatch.setattr(RolloutEngine, "rollout", lambda *args, **kwargs: sampled.append(1))
    train(write("whole", mode, **model))
    assert (len(loads), sampled) == (STEPS, [])
    train(write("parted", mode, **model), "train.steps=2", "train.eval_steps=0")
    train(write("parted", mode, **model), "--resume", "train.eval_steps=0")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parted")
    assert all(torch.equal(one[name], two[name]) for name in one) and len(one) == len(two)
    steps = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert len(steps) == STEPS
    for line in steps:
        # Suppressed tokens have some probability in training and none where it samples, so the ratio is below 1.
        assert 0 < line["sampling/importance_sampling_ratio/min"] <= line["sampling/importance_sampling_ratio/max"]
        assert line["sampling/importance_sampling_ratio/max"] < 1
        assert line["sampling/sampling_logp_difference/max"] > 0
    assert sum("eval/accuracy" in line for line in metrics(tmp_path / "whole")) == 2
    first = weights(tmp_path / "whole", which=0)
    assert any(not torch.equal(first[name], one[name]) for name in one)


def test_a_dry_run_shows_a_step_and_leaves_nothing(write, fake_vllm, tmp_path):
    path = write("dry", "colocate")
    before = set(tmp_path.iterdir())
    output = train(path, "--dry-run", f"vllm.weights_dir={tmp_path}")
    assert re.search(r"groups +2 prompts x 3 completions", output) and re.search(r"rollouts on +vLLM", output)
    made = fake_vllm.LLM.made.pop()
    # Weights can be handed over only within this process, without a message.
    assert made.requests
    assert made.environment == {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG",  # as it was
    }
    fake_vllm.LLM.made.clear()
    assert set(tmp_path.iterdir()) == before


def test_prompts_that_are_drawn_again_come_from_vllm_with_the_same_weights(write, tmp_path, monkeypatch, fake_vllm):
    """Dynamic sampling; with a reward that never differs every group is drawn again."""
    loads = []
    reload = fake_vllm.Engine.reload_weights
    monkeypatch.setattr(
        fake_vllm.Engine, "reload_weights", lambda engine, **given: loads.append(1) or reload(engine, **given)
    )
    config = write("again", "colocate")
    equal = ["rewards.functions={}", "rewards.format=1", "rollout.max_resample_times=2"]
    train(config, *equal, "train.steps=1", "train.eval_steps=0")
    assert len(loads) == 1
    assert len(fake_vllm.LLM.made[-1].requests) == 2 * 3


def test_a_server_that_is_lost_leaves_a_checkpoint(write, serve_vllm, tiny_folder, tmp_path):
    config = write("lost", "server")
    server = serve_vllm(tiny_folder("qwen2_vl"))
    answer = server.answer

    def dying(method: str, path: str, body: Any) -> Any:
        loads = sum(asked == "/collective_rpc" for asked, _ in server.asked)
        return (503, "gone") if path == "/inference/v1/generate" and loads == 3 else answer(method, path, body)

    server.answer = dying
    output = train(config, f"vllm.server_url={server.url}", "train.eval_steps=0", "train.save_steps=0", code=1)
    assert "Step 3: The vLLM server at" in output and "HTTP 503" in output
    assert [folder.name for folder in (tmp_path / "lost" / "checkpoints").iterdir()] == ["step_000002"]
    server.answer = answer
    train(config, f"vllm.server_url={server.url}", "train.eval_steps=0", "train.save_steps=0", "--resume")


def test_missing_requirements_are_reported_before_the_run_starts(tiny_folder, tmp_path):
    path = tmp_path / "config.yaml"
    settings = {"output_dir": str(tmp_path / "run"), "model": {"path": str(tiny_folder("qwen2_vl"))}}
    path.write_text(write_yaml(settings | {"rollout": {"engine": "vllm"}}), encoding="utf-8")
    if importlib.util.find_spec("vllm") is None:
        output = train(path, code=2)
        assert "rollout.engine is vllm, but vLLM cannot be imported" in output and "medvqa-rl[vllm]" in output
    output = train(path, "vllm.mode=server", "vllm.server_url=http://127.0.0.1:9", code=2)
    assert "vllm.server_url is http://127.0.0.1:9, but no vLLM server can be used there" in output
    assert not (tmp_path / "run").exists()


def test_stale_weights_are_noticed(write, fake_vllm, tmp_path, monkeypatch):
    """A dry run fails. A run warns, and stops before it updates the weights if the difference is above the limit."""
    loads = []
    reload = fake_vllm.Engine.reload_weights

    def once(engine: Any, **given: Any) -> None:
        loads.append(1)
        if len(loads) == 1:
            reload(engine, **given)

    monkeypatch.setattr(fake_vllm.Engine, "reload_weights", once)
    assert "vLLM did not take over changed weights" in train(write("dry", "colocate"), "--dry-run", code=1)
    loads.clear()
    settings = ["optimizer.learning_rate=0.1", "optimizer.warmup_steps=0", "train.eval_steps=0", "train.save_steps=0"]
    limit = "vllm.max_logp_difference=1000"
    output = train(write("stale", "colocate"), *settings, limit)
    assert re.search(r"Warning: step 2: The log-probabilities of vLLM and of training differ by [\d.]+ nats", output)
    gaps = [line["sampling/sampling_logp_difference/mean"] for line in metrics(tmp_path / "stale")]
    limit = f"vllm.max_logp_difference={(gaps[0] + gaps[1]) / 2}"
    loads.clear()
    output = train(write("stopped", "colocate"), *settings, limit, code=1)
    assert "Step 2: the log-probabilities of vLLM and of training differ by" in output
    (folder,) = (tmp_path / "stopped" / "checkpoints").iterdir()
    assert folder.name == "step_000001"


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_and_a_server_train_as_one_does(tiny_folder, tmp_path, serve_vllm):
    """Both ask for their own prompts; the main one alone hands over the weights, which both gather. A dry run gives
    both the same noise."""
    folder = tiny_folder("qwen2_vl")
    server, tried = serve_vllm(folder), serve_vllm(folder)
    shared = {"mode": "server", "server_url": server.url}
    jobs = []
    for name, ranks, vllm in (("one", 1, {}), ("two", 2, shared), ("dry", 2, shared | {"server_url": tried.url})):
        config = toy_config(
            folder,
            tmp_path / name,
            rollout={"engine": "vllm"},
            vllm=vllm,
            optimizer={"learning_rate": 1e-4, "warmup_steps": 0, "lr_scheduler_type": "constant"},
            train={"steps": 2, "log_completions_steps": 0},
        )
        job = {"name": name, "engine": "fsdp2", "ranks": ranks, "config": config.model_dump(mode="json")}
        jobs.append(job | {"completions": str(tmp_path / "completions.json"), "dry_run": name == "dry"})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(Path(__file__).parents[1] / "fakes"), *sys.path])
    process = forking.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), str(tmp_path / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    codes = json.loads(process.stdout.splitlines()[-1])
    assert codes == {"one": [0], "two": [0, 0], "dry": [0, 0]}, process.stderr
    assert "changed weights" in process.stdout + process.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((two[name] - one[name]).abs().max() <= 2e-5 for name in one)
    routes = [route for route, body in server.asked if body]
    assert (routes.count("/collective_rpc"), routes.count("/inference/v1/generate")) == (2, 2 * 4)
