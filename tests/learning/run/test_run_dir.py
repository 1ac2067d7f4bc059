"""What a run records about itself."""

from __future__ import annotations

import stat

import pytest

from medvqa_rl.learning.run import run_dir


@pytest.fixture
def git(tmp_path, monkeypatch):
    """Put a shell script in place of git: ``git(script)``."""

    def write(script: str) -> None:
        path = tmp_path / "git"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setattr(run_dir.shutil, "which", lambda name: str(tmp_path / name))
    return write


COMMIT = 'if [ "$2" = rev-parse ]; then echo abc; exit; fi'


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f"{COMMIT}\necho ' M a.py'", {"commit": "abc", "is_dirty": True}),
        (COMMIT, {"commit": "abc", "is_dirty": False}),
        (f"{COMMIT}\nexit 128", {"commit": "abc", "is_dirty": None, "problem": "git status failed"}),
        ("exit 128", None),
    ],
    ids=["dirty", "clean", "status-fails", "no-repository"],
)
def test_the_commit_is_recorded(git, script, expected):
    git(script)
    assert run_dir.environment()["git"] == expected


@pytest.mark.parametrize(("script", "commit"), [(f"{COMMIT}\nexec sleep 60", "abc"), ("exec sleep 60", None)])
def test_a_slow_git_does_not_end_the_run(git, monkeypatch, script, commit):
    monkeypatch.setattr(run_dir, "GIT_TIMEOUT", 0.2)
    git(script)
    problem = "git did not answer within 0.2 seconds"
    assert run_dir.environment()["git"] == {"commit": commit, "is_dirty": None, "problem": problem}


def test_a_git_that_cannot_be_started_does_not_end_the_run(git, tmp_path):
    git("exit 0")
    (tmp_path / "git").chmod(0o644)
    assert run_dir.environment()["git"]["problem"] == "git could not be started: Permission denied"
