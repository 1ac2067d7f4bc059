"""The scaling benchmark: its arithmetic, and that two ranks do what one does.

Run: pytest tests/benchmarks/test_scaling.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.common import use_clock
from benchmarks.scaling import RankStep, summary, tokens_of
from tests import forking

STEP = RankStep(rollout=3.0, update=1.0, wall=9.0, tokens={"a": [1, 2], "b": [3]})


def test_ranks_wait_for_the_slowest_one_in_every_phase() -> None:
    # Rank 0 is the longer one in the first phase, rank 1 in the second: 4 + 3 seconds, of which they work 5 and 6.
    ranks = [[replace(STEP, rollout=4.0, update=1.0)], [replace(STEP, rollout=3.0, update=3.0, wall=10.0)]]
    found = summary(ranks, alone=9.0)
    assert found["seconds"] == 7.0 and found["wall_seconds"] == 10.0
    assert found["own_seconds"] == [5.0, 6.0] and found["waiting_seconds"] == [2.0, 1.0]
    assert found["efficiency"] == pytest.approx(9 / 14)
    assert found["waiting_share"] == pytest.approx(3 / 14)
    assert found["extra_work_share"] == pytest.approx(2 / 14)


def test_steps_are_averaged_after_the_longest_rank_of_each_is_known() -> None:
    ranks = [[STEP, replace(STEP, rollout=5.0)], [replace(STEP, rollout=5.0), STEP]]
    found = summary(ranks, alone=12.0)
    assert found["seconds"] == 6.0 and found["efficiency"] == 1.0
    assert found["waiting_seconds"] == [1.0, 1.0]


def test_one_rank_alone_is_fully_efficient() -> None:
    found = summary([[STEP]], alone=None)
    assert (found["efficiency"], found["waiting_share"], found["extra_work_share"]) == (1.0, 0.0, 0.0)
    assert found["steps_per_second"] == 0.25


def test_tokens_of_all_ranks_are_merged_by_prompt() -> None:
    first, second = replace(STEP, tokens={"b": [3]}), replace(STEP, tokens={"a": [1, 2]})
    assert tokens_of([[first], [second]]) == tokens_of([[STEP]])
    assert tokens_of([[first], [replace(second, tokens={"a": [1, 4]})]]) != tokens_of([[STEP]])


@pytest.mark.parametrize("ranks", [["2"], ["1", "0"], ["1", "3"]], ids=str)
def test_ranks_that_cannot_be_compared_are_refused(ranks: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--ranks is .*\.$"):
        scaling.main(["--smoke", "--ranks", *ranks])


def test_a_failing_rank_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ValueError, match="Rank 0 of 2 failed"):
        scaling.run_ranks(scaling.SMOKE, tmp_path, 1, ranks=2, engine="ddp")


FAKE_RANK = """#!{python}
import json, os, sys
request = json.loads(sys.argv[-1])
rank = os.environ.get("RANK", "alone")
step = {{"rollout": 2.0, "update": 1.0, "wall": 4.0, "tokens": {tokens}}}
open(request["output"], "w").write(json.dumps([step] * request["steps"]))
"""
"""A program that answers as a rank does, without training anything."""


@pytest.mark.parametrize(("tokens", "code"), [('{"a": [rank == "1"]}', 1), ('{"b": [1]}', 0)], ids=["other", "same"])
def test_tokens_that_differ_from_one_rank_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: str, code: int
) -> None:
    program = tmp_path / "rank.py"
    program.write_text(FAKE_RANK.format(python=sys.executable, tokens=tokens))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert scaling.main(["--smoke", "--output", str(tmp_path / "result.json")]) == code
    finally:
        torch.set_num_threads(before)
        use_clock("wall")
    result = json.loads((tmp_path / "result.json").read_text())
    is_reported = "2 ranks, step 1: the sampled tokens differ" in capsys.readouterr().out
    assert bool(result["differences"]) == is_reported == bool(code)
    # Two ranks that each do what one does alone: no waiting, and half is extra work.
    assert [run["efficiency"] for run in result["runs"]] == [1.0, 0.5]
    assert [run["extra_work_share"] for run in result["runs"]] == [0.0, 0.5]


@pytest.mark.slow
def test_one_and_two_ranks_do_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(scaling.subprocess, "Popen", forking.Popen)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert scaling.main(["--smoke", "--output", str(tmp_path / "result.json")]) == 0
    finally:
        torch.set_num_threads(before)
        use_clock("wall")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["differences"] == [] and [run["ranks"] for run in result["runs"]] == [1, 2]
    for run in result["runs"]:
        assert all(seconds > 0 for seconds in run["phases"].values())
        assert min(run["waiting_seconds"]) >= 0
    assert "efficiency" in capsys.readouterr().out
