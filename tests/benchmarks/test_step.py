"""The step benchmark: both engines do the same work, and the floors count what a step computes.

Run: pytest tests/benchmarks/test_step.py
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typer.testing import CliRunner

from benchmarks import step as step_benchmark
from benchmarks.common import Rates, Workload, make_config, measure_rates
from benchmarks.engine_trl import run_trl
from benchmarks.engines import Step, replay, run_ours, same_work
from benchmarks.floors import architecture_of, step_floors
from benchmarks.models import prepare_model
from medvqa_rl.cli.app import app
from medvqa_rl.learning.estimate.cost import group_pairs
from tests import forking

TINY = Workload("tiny", prompts=2, generations=3, length=5, side=56, prompts_per_micro_batch=2, learning_rate=1e-3)
NOISE = 0.05
"""Between policy and reference, so that the loss is not zero in the first step."""


class Products(TorchDispatchMode):
    """Adds up the operations of matrix products as torch's counter does, without its look at modules."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_model(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> list[Step]:
    pytest.importorskip("trl")
    return run_trl(TINY, folder, 2, reference_noise=NOISE)


def test_trl_computes_the_same_loss_and_gradient_on_the_same_completions(folder: Path, theirs: list[Step]) -> None:
    loss, grad_norm = replay(TINY, folder, theirs, reference_noise=NOISE)
    assert theirs[0].loss > 1e-4
    assert loss == pytest.approx(theirs[0].loss, rel=1e-4)
    assert grad_norm == pytest.approx(theirs[0].grad_norm, rel=1e-4)


def test_both_engines_do_the_same_work(folder: Path, theirs: list[Step]) -> None:
    ours = run_ours(TINY, folder, 2, reference_noise=NOISE)
    assert same_work(ours, theirs) == []
    for step in (*ours, *theirs):
        assert [len(ids) for ids in step.completion_ids] == [5] * 6
        assert min(step.rollout, step.reward, step.reference, step.update) > 0
        assert len(set(step.rewards)) > 1
    assert [step.prompt_ids for step in ours] == [step.prompt_ids for step in theirs]
    assert ours[0].loss != ours[1].loss


def test_different_work_is_found(folder: Path) -> None:
    (step,) = run_ours(TINY, folder, 1, reference_noise=NOISE)
    changes = {
        "the prompts differ": {"prompt_ids": step.prompt_ids[::-1]},
        "the lengths of the completions differ": {
            "completion_ids": [step.completion_ids[0][:-1], *step.completion_ids[1:]]
        },
        "the losses are": {"loss": step.loss + 0.1},
        "the entropies are": {"entropy": step.entropy * 1.5},
    }
    assert same_work([step], [step]) == []
    for message, change in changes.items():
        (found,) = same_work([step], [dataclasses.replace(step, **change)])
        assert message in found


@pytest.mark.parametrize("changes", [{}, {"lora": 4}, {"train_vision": True}, {"beta": 0.0}], ids=str)
def test_floors_equal_torchs_count_except_masked_pairs(folder: Path, changes: dict[str, object]) -> None:
    workload = dataclasses.replace(TINY, prompts=1, prompts_per_micro_batch=1, **changes)
    counter = Products()
    with sdpa_kernel(SDPBackend.MATH), counter:
        (step,) = run_ours(workload, folder, 1, attention="eager")
    model = architecture_of(folder)
    floors = step_floors(model, workload, list(map(len, step.prompt_ids)), [(4, 4)], Rates(1.0, 1.0))
    # Torch counts whole squares, of the prompt in the prefill and of the group's row in the passes after it. The
    # backward pass of attention has four products where the forward pass has two.
    prompt = len(step.prompt_ids[0])
    row = prompt + 3 * 5
    masked = 3 * (row**2 - group_pairs(prompt, [5] * 3))
    masked += prompt**2 - group_pairs(prompt, []) + (masked // 3 if workload.beta else 0)
    counted = counter.flops - 4 * model.hidden * model.layers * masked
    assert sum(floor.flops for floor in floors.values()) == counted


def test_a_decoding_step_takes_the_longer_of_flops_and_bytes(folder: Path) -> None:
    model = architecture_of(folder)
    sizes = model.parameters
    bound_by_bytes = step_floors(model, TINY, [70, 72], [(4, 4)] * 2, Rates(flops=1e30, bytes=1.0))["rollout"]
    keys = 2 * 2 * 16 * 4  # keys and values, layers, width of one head, float32
    stored = [70 + 72 + 6 * position for position in range(1, 5)]
    expected = 4 * (sizes.language + sizes.vision) + 4 * 4 * sizes.language + keys * sum(stored)
    assert bound_by_bytes.seconds == bound_by_bytes.bytes == expected
    bound_by_flops = step_floors(model, TINY, [70, 72], [(4, 4)] * 2, Rates(flops=1.0, bytes=1e30))["rollout"]
    assert bound_by_flops.seconds == bound_by_flops.flops


def test_the_last_line_is_the_speedup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(step_benchmark.subprocess, "run", forking.run)
    output = tmp_path / "result.json"
    options = ["--preset", "smoke", "--engine", "ours", "trl", "--warmup", "0", "--steps", "1", "--rounds", "1"]
    assert step_benchmark.main([*options, "--output", str(output)]) == 0
    found = re.fullmatch(r"speedup: (\d+\.\d+)", capsys.readouterr().out.splitlines()[-1])
    assert found is not None
    written = json.loads(output.read_text())
    ours, trl = written["engines"]["ours"], written["engines"]["trl"]
    assert float(found[1]) == pytest.approx(trl["seconds"] / ours["seconds"], abs=0.01)
    assert written["differences"] == [] and written["hardware"]["threads"] == torch.get_num_threads()
    assert sum(ours["phases"].values()) == pytest.approx(ours["seconds"])
    assert ours["tokens_per_second"] == pytest.approx(2 * 2 * 4 / ours["seconds"])


def test_what_was_measured_before_an_engine_fails_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (step,) = run_ours(TINY, folder, 1)

    def in_a_new_process(request: dict[str, Any]) -> tuple[list[Step], int]:
        if request["engine"] == "trl":
            raise ValueError("The engine trl failed: out of memory")
        assert request["options"] == {"rollout": "graph"}
        return [step], 3 * 2**29

    monkeypatch.setattr(step_benchmark, "in_a_new_process", in_a_new_process)
    output = tmp_path / "result.json"
    options = ["--preset", "smoke", "--engine", "graph", "trl", "--warmup", "0", "--steps", "1", "--rounds", "1"]
    with pytest.raises(ValueError, match="out of memory"):
        step_benchmark.main([*options, "--output", str(output)])
    (name, found), *others = json.loads(output.read_text())["engines"].items()
    assert (name, others) == ("graph", [])
    assert found["peak_gib"] == 1.5 and found["seconds"] == pytest.approx(step.seconds)


def test_the_estimate_beside_the_peak_is_that_of_the_command(folder: Path, tmp_path: Path) -> None:
    (step,) = run_ours(TINY, folder, 1)
    workload = dataclasses.replace(TINY, length=16)
    settings = tmp_path / "settings.yaml"
    settings.write_text(json.dumps(make_config(workload, folder).model_dump(mode="json")))
    result = CliRunner().invoke(
        app,
        [
            *("estimate", str(settings), "--json", "--matmul-tflops", "1", "--bandwidth-gbs", "1"),
            *("--memory-gib", "1000", "--image-size", "56x56", "--device", "cpu"),
            *("--question-tokens", str(max(map(len, step.prompt_ids)) - 4)),  # 16 patches are 4 tokens
        ],
    )
    assert result.exit_code == 0, result.output
    expected = json.loads(result.stdout)["peak"]["bytes"] / 2**30
    assert step_benchmark.estimated_gib(workload, folder, [step], {}) == pytest.approx(expected)


def test_a_failing_engine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match="The engine ours failed"):
        step_benchmark.in_a_new_process({"engine": "ours"})


@pytest.mark.parametrize(
    "options", [["--lora", "4", "--train-vision"], ["--prompts", "3", "--prompts-per-micro-batch", "2"]], ids=str
)
def test_work_that_cannot_be_compared_is_refused(options: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--.*\.$"):
        step_benchmark.main(["--preset", "smoke", *options])


def test_rates_are_positive_numbers() -> None:
    rates = measure_rates(torch.float32, seconds=0.0, size=64)
    assert 1e6 < rates.flops < 1e16 and 1e6 < rates.bytes < 1e14
