"""Reward functions are imported from installed packages and the working folder, and the command says from which file.

Run: pytest tests/rewards/test_functions.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medvqa_rl.rewards.functions import load_function

FUNCTION = "def one(prompts, completions, completion_ids, **kwargs): return [1.0]\ntwo = one\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_file_that_a_setting_imports_is_named_once_before_it_runs(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "named_once.py").write_text("import sys\nprint('running', file=sys.stderr)\n" + FUNCTION)
    load_function("named_once.one")
    load_function("named_once.two")
    said = f"Importing Python from the settings: named_once.one runs {folder / 'named_once.py'}\n"
    assert capfd.readouterr().err == said + "running\n"


def test_a_package_is_named_by_the_file_that_runs_first(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, file in (("named_package", "__init__.py"), ("named_space", "")):
        (folder / name).mkdir()
        (folder / name / "inner.py").write_text(FUNCTION)
        if file:
            (folder / name / file).write_text("")
        load_function(f"{name}.inner.one")
        assert capfd.readouterr().err.endswith(f" runs {folder / name / file}\n")


def test_a_missing_module_is_not_announced(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="there is no module 'missing_module'"):
        load_function("missing_module.one")
    assert capfd.readouterr().err == ""
