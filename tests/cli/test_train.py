"""Which run ``--resume`` continues if its folder was moved, renamed or copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from medvqa_rl.cli.train import _follow_moved_run
from medvqa_rl.config.yaml import Loaded, load_config


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the function reads of a run."""
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("status.json", "config.resolved.json"):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text(f"output_dir: {folder}\ntrain: {{steps: 3}}\n")
    return folder


def follow(config: Path, *overrides: str) -> Loaded:
    return _follow_moved_run(load_config(config, overrides), config.parent)


def test_a_moved_run_is_resumed_where_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert follow(run / "config.yaml").config.output_dir == str(run) and not capsys.readouterr().err
    moved = run.rename(tmp_path / "new")
    loaded = follow(moved / "config.yaml")
    assert loaded.config.output_dir == loaded.given["output_dir"] == str(moved)
    assert loaded.config.train.steps == 3
    assert capsys.readouterr().err == f"The run in {moved} was moved: its output_dir was {run}.\n"
    assert follow(moved / "config.yaml", f"output_dir={run}").config.output_dir == str(run)  # as the user says


def test_a_copied_run_must_be_named(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ValueError, match=rf"holds a run too: add output_dir={copy} or output_dir={run} to say which"):
        follow(copy / "config.yaml")


def test_a_config_outside_a_run_is_left_alone(run: Path, tmp_path: Path) -> None:
    config = shutil.copy(run / "config.yaml", tmp_path / "mine.yaml")
    assert follow(Path(config)).config.output_dir == str(run)
