"""A ``vllm serve`` process on a CPU: handovers, runs of the command line, and servers that do not fit."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import LoraConfig, VllmConfig
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.vllm.agreement import VllmError, difference, rehearse
from medvqa_rl.rollout.vllm.client import Client, check_answers
from medvqa_rl.rollout.vllm.engine import VllmEngine
from medvqa_rl.rollout.vllm.server import Server
from tests.engines.engine import GREEDY, SAMPLED, load, move, roll_out, serving, tokens

LORA = {"lora": LoraConfig(rank=4)}
STEPS = 3


def connect(policy: Policy, url: str) -> VllmEngine:
    config = VllmConfig(mode="server", server_url=url, timeout=60)
    return VllmEngine(policy, Server(policy, config, is_main=True, wait_for_everyone=lambda: None))


def check_three_handovers(engine: VllmEngine, own: Policy, questions: Any) -> None:
    """Tokens and log-probabilities before any change and after each of three."""
    for step in range(4):
        with engine.fresh():
            greedy, groups = (roll_out(engine, own, questions, config) for config in (GREEDY, SAMPLED))
        assert tokens(greedy) == tokens(roll_out(RolloutEngine(own), own, questions, GREEDY)), step
        assert difference(own, groups, SAMPLED) < 2e-5
        move(own, step)
        assert difference(own, groups, SAMPLED) > 0.01  # as it would be without a handover


def settings(tmp_path: Path, url: str | None, **model: Any) -> Path:
    """Settings of a run in a file; without a server, vLLM runs in the training process."""
    vllm = {"max_model_length": 1024} if url is None else {"mode": "server", "server_url": url, "timeout": 60}
    given = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": "phantom:instruct", "device": "cpu"} | model,
        "rollout": {"engine": "vllm", "num_generations": 4, "max_completion_length": 48},
        "vllm": vllm,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "train": {"steps": STEPS, "prompts_per_step": 2, "eval_steps": 0, "save_steps": 0},
    }
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(given), encoding="utf-8")
    return path


def train(path: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", str(path), *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def check_mismatch(tmp_path: Path) -> None:
    """Training and vLLM compute the same log-probabilities in every step, while the policy changes."""
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 1e-4 for line in lines)
    assert lines[-1]["kl"] > 1e-4


@pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])
def test_three_handovers(server, questions, kind):
    own = load("phantom:instruct", **kind)
    check_three_handovers(connect(own, server.url), own, questions)


def test_the_weights_of_another_run_are_replaced(server, questions):
    """An adapter lies on the original weights, whatever an earlier run left on the server."""
    earlier = load("phantom:instruct")
    move(earlier, 0)
    with connect(earlier, server.url).fresh():
        pass
    own = load("phantom:instruct", **LORA)
    engine = connect(own, server.url)
    with engine.fresh():
        assert difference(own, roll_out(engine, own, questions, SAMPLED), SAMPLED) < 2e-5
    with connect(earlier, server.url).fresh():  # another run, while this one trains
        pass
    engine._agrees = False
    with engine.fresh(), pytest.raises(VllmError, match="no other run uses the server"):
        roll_out(engine, own, questions, SAMPLED)


@pytest.mark.parametrize("kind", [{}, {"lora": {"rank": 4}}], ids=["full", "lora"])
def test_the_command_line_trains(server, tmp_path, kind):
    path = settings(tmp_path, server.url, **kind)
    assert "changed weights" in train(path, "--dry-run")
    assert not (tmp_path / "run").exists()
    train(path)
    check_mismatch(tmp_path)


@pytest.mark.parametrize(
    "kind", [{}, pytest.param({"lora": {"rank": 4}}, marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_the_command_line_trains_colocated(tmp_path, kind):
    path = settings(tmp_path, None, **kind)
    train(path)
    check_mismatch(tmp_path)


def test_a_server_that_does_not_fit_is_refused(server, tmp_path):
    """Another model, another dtype or a larger adapter, in one sentence with the command that fits."""
    start = r"was started with other settings than training needs \({}\): start it with `.*vllm serve .*`\.$"
    for path, changes, wrong in (
        ("phantom:base", {}, "it serves .*instruct, but model.path is phantom:base"),
        ("phantom:instruct", {"dtype": "bfloat16"}, "--dtype is float32 instead of bfloat16"),
        (
            "phantom:instruct",
            {"lora": LoraConfig(rank=9)},
            "--max-lora-rank is 8, but an adapter of rank 9 is trained",
        ),
    ):
        with pytest.raises(ValueError, match=start.format(wrong)) as caught:
            connect(load(path, **changes), server.url)
        assert "--enable-scale-out --dtype" in str(caught.value)
    assert "vllm serve" in train(settings(tmp_path, server.url, dtype="bfloat16"), code=2)


def test_another_server_at_the_port(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    other = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=other.serve_forever, args=(0.02,))
    thread.start()
    try:
        config = VllmConfig(mode="server", server_url=f"http://127.0.0.1:{other.server_address[1]}")
        with pytest.raises(ValueError, match="Another server answers there: it names no version of vLLM"):
            check_answers(config)
    finally:
        other.shutdown()
        thread.join()
        other.server_close()


@pytest.mark.slow
def test_what_is_skipped_is_noticed(server, questions, monkeypatch):
    """Prefix cache and weights; see test_colocate.py for the others."""
    own = load("phantom:instruct")
    engine = connect(own, server.url)
    ask = Client.ask

    def sample(config: Any) -> Any:
        with engine.fresh():
            return roll_out(engine, own, questions, config)

    sample(SAMPLED)
    for number, skipped in enumerate(("reload_weights", "pack_heads", "/reset_prefix_cache")):

        def without(client: Client, method: Any, path: str, body: Any = None, skipped: str = skipped) -> Any:
            is_skipped = path == skipped or (body or {}).get("method") == skipped
            return {"success": True} if is_skipped else ask(client, method, path, body)

        move(own, number)
        with monkeypatch.context() as patch:
            patch.setattr(Client, "ask", without)
            assert difference(own, sample(SAMPLED), SAMPLED) > 0.002, skipped
        assert difference(own, sample(SAMPLED), SAMPLED) < 2e-5, skipped
    assert rehearse(own, SAMPLED, sample).changed < 1e-4


MATRIX = [(arch, tied) for arch in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") for tied in (True, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "tied"), MATRIX)
def test_other_models(model_folder, questions, tmp_path, arch, tied):
    folder = model_folder(arch, tied)
    with serving(load(folder, **LORA), tmp_path / "log.txt") as own_server:
        for kind in ({}, LORA):
            own = load(folder, **kind)
            check_three_handovers(connect(own, own_server.url), own, questions)


@pytest.mark.slow
def test_a_server_without_the_needed_flags_is_refused(tmp_path):
    """All that are missing are named, in one sentence."""
    own, adapted, log = load("phantom:instruct"), load("phantom:instruct", **LORA), tmp_path / "log.txt"
    needed = ("--enable-scale-out", "--no-enable-chunked-prefill", "--worker-extension-cls")
    with serving(own, log, without=needed) as bare:
        with pytest.raises(
            ValueError, match=r"\(--enable-scale-out is missing; --no-enable-chunked-prefill is m"
        ) as e:
            connect(own, bare.url)
        assert "--worker-extension-cls is missing" in str(e.value)
        with pytest.raises(ValueError, match="--enable-scale-out is missing; --enable-lora is missing"):
            connect(adapted, bare.url)
    with serving(adapted, log, without=["VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]) as bare:
        with pytest.raises(ValueError, match=r"\(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is missing\)"):
            connect(adapted, bare.url)
        connect(own, bare.url)
    with (
        serving(adapted, log, without=["VLLM_SERVER_DEV_MODE=1"]) as bare,
        pytest.raises(ValueError, match=r"no vLLM server in development mode answers there .*HTTP 404"),
    ):
        connect(own, bare.url)


def wait_for_step(run: Path, step: int) -> None:
    """Wait until a run has finished a step."""
    path = run / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (path.is_file() and len(path.read_text().splitlines()) >= step):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_goes_on_with_a_restarted_server(questions, tmp_path):
    own = load("phantom:instruct", **LORA)
    with serving(own, tmp_path / "log.txt") as first:
        engine = connect(own, first.url)
        with engine.fresh():
            roll_out(engine, own, questions, SAMPLED)
        first.kill()
        move(own, 0)
        with pytest.raises(VllmError, match="does not answer"), engine.fresh():
            pass
    with serving(own, tmp_path / "log.txt", port=first.port), engine.fresh():
        assert difference(own, roll_out(engine, own, questions, SAMPLED), SAMPLED) < 2e-5


def test_a_server_that_dies_leaves_a_checkpoint(server, tmp_path):
    """Runs last, as it ends the server."""
    path = settings(tmp_path, server.url)
    killer = threading.Thread(target=lambda: (wait_for_step(tmp_path / "run", 2), server.kill()))
    killer.start()
    output = train(path, "train.steps=50", code=1)
    killer.join()
    assert f"The vLLM server at {server.url} does not answer" in output and "Step " in output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step_")) >= 2
