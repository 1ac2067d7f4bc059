"""The script for a GPU: its parts are independent, and what ended stays.

Run: pytest tests/benchmarks/test_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

STAND_IN = """#!/usr/bin/env bash
# Answers as python does where the card is an H200, without vLLM, and with some benchmarks that fail.
case $1 in
  -)
    shift
    cat >/dev/null
    for name in "$@"; do case $name in {missing}) found+=("$name") ;; esac; done
    echo "${{found[*]}}" ;;
  -c) echo nvidia-h200 ;;
  -m)
    module=$2
    echo "$*" >>"$CALLS"
    while [ "$1" != --output ]; do shift; done
    case $module in
      benchmarks.decode) echo "no graph was captured" >&2; exit 3 ;;
      benchmarks.update) sleep 30 ;;
    esac
    echo "table of $module"
    echo '{{"benchmark": "'$module'"}}' >"$2" ;;
esac
"""


def run(folder: Path, *options: str, missing: str = "vllm") -> subprocess.CompletedProcess[str]:
    """Run the script with a stand-in for Python."""
    program = folder / "python"
    program.write_text(STAND_IN.format(missing=missing))
    program.chmod(0o755)
    environment = os.environ | {"PYTHON": str(program), "CALLS": str(folder / "calls")}
    command = ["bash", str(SCRIPT), "--out", str(folder / "out"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_part_that_fails_or_is_too_slow_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    done = run(tmp_path, "--limit", "18")
    assert done.returncode == 1
    states = {
        "sameness": "ok",
        "step-lora": "ok",
        "step-full": "ok",
        "decode": "failed with code 3",
        "step-4bit": "ok",
        "update": "stopped after 2 s",
        "step-vllm": "skipped: vllm is not installed",
        "scaling": "stopped after 2 s",
    }
    ends = [line.split(maxsplit=1) for line in done.stdout.splitlines()[-9:-1]]
    assert {name: state for name, state in ends if not state.startswith("ok")} == {
        name: state for name, state in states.items() if state != "ok"
    }
    assert [name for name, _ in ends] == list(states)
    results = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert results.keys() == {f"{name}-nvidia-h200.json" for name, state in states.items() if state == "ok"}
    log = (tmp_path / "out" / "gpu-nvidia-h200.txt").read_text()
    assert "no graph was captured" in log and "table of benchmarks.sameness" in log
    assert done.stdout == log


def test_only_the_parts_that_were_asked_for_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "step-lora sameness", missing="trl|vllm")
    assert done.returncode == 0 and "TRL is not installed" in done.stdout
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("-m benchmarks.sameness --preset gpu --models ")
    assert second.startswith("-m benchmarks.step --preset paper-gpu ") and "--lora 16 --engine ours --models" in second


def test_vllm_needs_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    done = run(tmp_path, "--parts", "step-vllm", missing="nothing")
    assert done.returncode == 0 and "step-vllm: skipped: vLLM can suppress 1,024 tokens" in done.stdout
    assert not (tmp_path / "calls").exists()
    assert run(tmp_path, "--parts", "step-vllm", "--tokenizer", "qwen", missing="nothing").returncode == 0
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--tokenizer qwen" in call and "--engine ours vllm" in call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--smok"], "There is no option --smok: use --smoke, "),
        (["--parts"], "--parts needs a value after it."),
        (["--parts", "decode speed"], "There is no part speed: choose from sameness "),
        (["--limit", "9min"], "--limit is 9min: give whole seconds, such as 540."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_given_wrong_is_explained_before_anything_runs(
    tmp_path: Path, options: list[str], message: str
) -> None:
    done = run(tmp_path, *options)
    assert done.returncode == 2 and done.stderr.startswith(message)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    done = run(tmp_path, missing="pydantic|ruamel.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("These packages are missing: pydantic ruamel.yaml. Install them, or give a folder")


@pytest.mark.slow
def test_the_first_part_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), "--smoke", "--parts", "sameness", "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "sameness-smoke.json").read_text())["hardware"]["cpu"]
