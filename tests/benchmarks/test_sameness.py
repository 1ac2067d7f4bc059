"""The proof that fast paths equal the stock model holds, and finds what differs.

Run: pytest tests/benchmarks/test_sameness.py
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sameness
from benchmarks.models import prepare_model
from benchmarks.sameness import Check, coarse_checks, distance
from medvqa_rl.core.types import Group
from medvqa_rl.learning.objective.logprobs import CompletionBatch

WORKLOAD = sameness.PRESETS["smoke"]


def test_the_fast_paths_compute_what_the_stock_model_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    assert sameness.main(["--preset", "smoke", "--models", str(tmp_path), "--output", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same as the stock model"
    checks = json.loads(output.read_text())["checks"]
    assert [(check["dtype"], check["what"]) for check in checks] == [
        (dtype, what)
        for dtype in ("float32", "bfloat16")
        for what in ("greedy (eager)", "log-probabilities", "gradient")
    ]
    exact, coarse = checks[:3], checks[3:]
    assert all(check["holds"] and check["measured"] < 1e-5 for check in exact)
    assert all(check["holds"] for check in coarse) and coarse[1]["measured"] > 1e-5


def test_what_differs_is_named_and_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, right_greedy = sameness.lay_out, sameness.greedy_groups

    def moved(*args: Any) -> list[CompletionBatch]:
        return [dataclasses.replace(batch, position_ids=batch.position_ids * 2) for batch in right(*args)]

    def replaced(*args: Any) -> list[Group]:
        groups: Sequence[Group] = right_greedy(*args)
        (completion,) = groups[0].completions
        other = (5, *completion.token_ids[1:])
        assert other != completion.token_ids
        changed = dataclasses.replace(groups[0], completions=[dataclasses.replace(completion, token_ids=other)])
        return [changed, *groups[1:]]

    monkeypatch.setattr(sameness, "lay_out", moved)
    monkeypatch.setattr(sameness, "greedy_groups", replaced)
    monkeypatch.setattr(sameness, "LIMITS", {"float32": sameness.LIMITS["float32"], "bfloat16": {"greedy": 1e-2}})
    output = tmp_path / "result.json"
    assert sameness.main(["--preset", "smoke", "--output", str(output)]) == 1
    assert not any(check["holds"] for check in json.loads(output.read_text())["checks"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT THE SAME: greedy (eager) in float32, log-prob")


def test_the_distance_of_gradients_is_relative_to_the_second() -> None:
    first = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}
    second = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance(first, second) == pytest.approx(32**0.5 / 5)
    with pytest.raises(AssertionError, match="b"):
        distance({"a": first["a"]}, second)


def test_in_bfloat16_the_limit_is_the_error_of_the_stock_model() -> None:
    exact = (torch.tensor([[0.0, 0.0]]), {"w": torch.tensor([2.0])})
    stock = (torch.tensor([[0.3, 0.4]]), {"w": torch.tensor([2.2])})
    ours = (torch.tensor([[0.0, 0.5]]), {"w": torch.tensor([2.4])})
    logps, gradient = coarse_checks(ours, stock, exact)
    assert logps.measured == pytest.approx(0.125**0.5) and logps.limit == pytest.approx(1.5 * 0.125**0.5)
    assert gradient.measured == pytest.approx(0.2) and gradient.limit == pytest.approx(0.15)
    assert logps.holds and not gradient.holds


def test_a_number_that_is_none_does_not_hold() -> None:
    assert not Check("float32", "gradient", float("nan"), 1.0, "").holds


def test_a_kept_model_is_used_again(tmp_path: Path) -> None:
    folder = prepare_model(WORKLOAD, tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepare_model(WORKLOAD, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-bfloat16"]
