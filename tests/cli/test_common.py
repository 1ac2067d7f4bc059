"""Commands choose the number of CPU threads before torch is loaded, unless the user did."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.common import use_threads, verb
from medvqa_rl.core import machine, packages
from medvqa_rl.core.machine import SHARE, Load


@pytest.fixture
def fresh(monkeypatch):
    """A process without torch on a machine with eight cores, of which others keep three busy."""
    for name in (*machine.VARIABLES, SHARE):
        monkeypatch.setenv(name, "")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(machine, "own_cores", lambda: range(8))
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(machine, "measure_load", lambda: Load(8, 3.0))
    monkeypatch.setattr(machine, "watch_load", lambda: None)
    monkeypatch.setattr(packages, "check_installed", lambda: None)


@pytest.mark.parametrize(
    ("model", "processes", "recorded", "environment", "count"),
    [
        (None, 1, None, {}, "5"),
        ("phantom:instruct", 1, None, {}, "4"),
        (None, 4, None, {}, "2"),
        (None, 1, None, {SHARE: "3"}, "3"),
        (None, 1, 7, {}, "7"),
        (None, 1, 7, {"OMP_NUM_THREADS": "2"}, "2"),
        (None, 1, 7, {"MKL_NUM_THREADS": "2"}, ""),
    ],
)
def test_the_environment_that_torch_reads(
    fresh, monkeypatch, tmp_path, capsys, model, processes, recorded, environment, count
):
    if recorded is not None:
        (tmp_path / "env.json").write_text(json.dumps({"threads": recorded}))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use_threads(model, processes=processes, records=[tmp_path / "env.json"])
    assert os.environ["OMP_NUM_THREADS"] == count
    said = capsys.readouterr().err
    if environment.keys() & set(machine.VARIABLES):
        assert said == ""
    else:
        assert said.startswith(f"Using {count} CPU threads: other processes keep 3.0 of 8 cores busy (")
        assert ("as many" in said) == (recorded is not None)


def test_nothing_is_chosen_once_torch_is_loaded(fresh, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", sys)
    use_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "" and capsys.readouterr().err == ""


def test_releases_that_were_not_tested_are_reported_once_by_the_first_rank(fresh, monkeypatch, capsys):
    monkeypatch.setattr(packages, "check_installed", lambda: "Warning: not tested.")
    monkeypatch.setitem(sys.modules, "torch", sys)
    for rank, said in (("0", "Warning: not tested.\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        use_threads(None)
        assert capsys.readouterr().err == said


def test_a_release_that_is_too_old_ends_a_command_before_it_loads_anything(monkeypatch):
    monkeypatch.setitem(packages.TESTED, "torch", packages.Releases("99.0", "99.1"))
    result = CliRunner().invoke(app, ["train", "configs/phantom_cpu.yaml"])
    assert result.exit_code == 2
    assert "is too old: run `pip install 'torch>=99.0'`" in result.stderr


def test_the_number_reaches_torch():
    """One thread on a busy machine, where torch would use all cores."""
    code = """
from medvqa_rl.cli.common import use_threads, verb
from medvqa_rl.core import machine
machine.measure_load = lambda: machine.Load(2, 1.0)
use_threads("phantom:instruct")
import torch
print(torch.get_num_threads())
"""
    inherited = {name: value for name, value in os.environ.items() if name not in machine.VARIABLES}
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True)
    assert process.stdout == "1\n"
    assert "Using 1 CPU thread: other processes keep 1.0 of 2 cores busy" in process.stderr


def test_a_setting_given_as_an_option_is_shown_as_it_is_written() -> None:
    for option, written in {
        "--steps 4": "--steps is not an option: settings are written without dashes, as train.steps=4.",
        "--train.steps=4": "--train.steps is not an option: settings are written without dashes, as train.steps=4.",
        "--learning-rate 1e-5": "as optimizer.learning_rate=1e-5.",
        "--lr --resume": "as optimizer.learning_rate=VALUE.",
    }.items():
        result = CliRunner().invoke(app, ["train", "configs/phantom_cpu.yaml", *option.split()])
        assert result.exit_code == 2 and written in result.output
    result = CliRunner().invoke(app, ["train", "configs/phantom_cpu.yaml", "--nonsense", "4"])
    assert result.exit_code == 2 and "No such option: --nonsense" in result.output


def test_flags_show_no_type() -> None:
    for words in (["train"], ["data", "check"], []):
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0 and "bool" not in result.output and "--help" in result.output


def test_config_check_refuses_a_model_folder_that_does_not_exist() -> None:
    check = ["config", "check", "configs/phantom_cpu.yaml"]
    result = CliRunner().invoke(app, [*check, "model.path=./nope"])
    assert result.exit_code == 2 and "model.path is './nope', but there is no such folder" in result.output
    result = CliRunner().invoke(app, [*check, "model.path=Qwen/Qwen2-VL-2B-Instruct", "model.dtype=bfloat16"])
    assert result.exit_code == 0 and result.output == "ok\n"


@pytest.mark.parametrize("text", ["x" * 2000, "x" * 2001, "\x1b[2J" * 900, "\ud800" * 900, "é" * 50_000])
def test_a_message_is_cut_and_cannot_steer_the_terminal(text, capsys):
    @verb
    def fail():
        raise ValueError(f"{text}\nHow to fix it.")

    with pytest.raises(typer.Exit) as exit_:
        fail()
    first, second, rest = capsys.readouterr().err.split("\n")
    escaped = "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)
    assert first == "error: " + (escaped if len(escaped) <= 2000 else escaped[:2000] + "...")
    assert (second, rest, exit_.value.exit_code) == ("How to fix it.", "", 2)
