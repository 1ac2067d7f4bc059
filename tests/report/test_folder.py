"""The runs below a folder: found by name, and nothing outside of it.

Run: pytest tests/report/test_folder.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from synthetic import make_run, write, write_eval

from medvqa_rl.report.folder import RunsFolder, version_of
from medvqa_rl.report.runs import read_headline


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "study" / "grpo" / "seed0")
    write_eval(tmp_path / "runs" / "before", [True] * 4)
    return tmp_path / "runs"


def test_runs_and_evaluations_are_found_by_their_path(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "first" / "checkpoints" / "step_000001").mkdir(parents=True)
    make_run(root / ".hidden")
    make_run(root / "a/b/c/d/e/f/g")  # too deep
    folder = RunsFolder(root)
    assert list(folder.find()) == ["before", "first", "study/grpo/seed0"]
    assert folder.read("study/grpo/seed0").name == "study/grpo/seed0"
    before = folder.read("before")
    assert [one.name for one in before.evaluations] == ["before"] and before.problems == []
    assert len(before.evaluations[0].records()) == 4
    assert list(RunsFolder(root / "first").find()) == ["first"]
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere: give the folder that holds the runs"):
        RunsFolder(root / "nowhere")


@pytest.mark.parametrize(
    "name", ["../runs/first", "/etc", "first/..", "first/eval", "./first", "", "notes\0", "first/"]
)
def test_only_names_of_runs_open_anything(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="There is no run"):
        RunsFolder(root).read(name)


def test_links_out_of_the_folder_are_refused(root: Path, tmp_path: Path) -> None:
    outside = make_run(tmp_path / "outside")
    (root / "linked").symlink_to(outside)
    folder = RunsFolder(root)
    assert "linked" not in folder.find()
    for link, target in (
        ("metrics.jsonl", outside / "metrics.jsonl"),
        ("eval/step_000040/samples.jsonl", outside / "eval" / "step_000040" / "samples.jsonl"),
        ("eval/other", outside / "eval" / "step_000040"),
        ("samples/step_000001.jsonl", outside / "samples" / "step_000020.jsonl"),
        ("checkpoints/step_000001", outside),
        ("best", outside),
    ):
        path = root / "first" / link
        path.parent.mkdir(exist_ok=True)
        kept = path.rename(path.with_name("kept")) if path.exists() else None
        path.symlink_to(target)
        with pytest.raises(ValueError, match=f"its link '{link}' leads out of the folder runs"):
            folder.read("first")
        runs, problems = folder.headlines()
        assert [run.name for run in runs] == ["before", "study/grpo/seed0"] and len(problems) == 1
        path.unlink()
        if kept is not None:
            kept.rename(path)
    (root / "first" / "best").symlink_to(root / "first" / "eval")  # inside
    assert folder.read("first").problems == []


def test_a_headline_has_status_and_main_evaluations(root: Path) -> None:
    for step in (10, 20, 30):
        write_eval(root / "first" / "eval" / f"step_{step:06d}", [True] * 20)
    write_eval(root / "first" / "eval" / "after_home", [True] * 20)
    found = read_headline(root / "first")
    assert [one.name for one in found.evaluations] == ["step_000000", "step_000040", "after_home"]
    assert found.status["state"] == "finished" and found.problems == [] and found.metrics == ()


def test_headlines_follow_their_files(root: Path) -> None:
    folder = RunsFolder(root)
    (first,) = [run for run in folder.headlines()[0] if run.name == "first"]
    assert next(run for run in folder.headlines()[0] if run.name == "first") is first
    status = json.loads((root / "first" / "status.json").read_text())
    write(root / "first" / "status.json", status | {"state": "failed"})
    assert {run.name: run.status.get("state") for run in folder.headlines()[0]}["first"] == "failed"


def test_a_version_changes_with_every_file_of_a_page(root: Path) -> None:
    run = root / "first"
    for name in (
        *("status.json", "metrics.jsonl", "config.resolved.json", "data.json", "env.json"),
        *("samples/step_000040.jsonl", "eval/step_000040/results.json", "eval/step_000040/samples.jsonl"),
    ):
        before, evaluations = version_of(run), version_of(run, only_evaluations=True)
        os.utime(run / name, ns=(1, 1))
        assert version_of(run) != before
        assert (version_of(run, only_evaluations=True) != evaluations) == name.startswith("eval/")


def test_a_folder_that_cannot_be_read_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "study":
            raise PermissionError
        return scan(path)

    monkeypatch.setattr("medvqa_rl.report.folder.os.scandir", refuse)
    assert list(RunsFolder(root).find()) == ["before", "first"]
