"""``medvqa-rl rewards attack``: output, exit codes and refusals, with the embedded tokenizer and no weights.

Run: pytest tests/cli/test_rewards.py
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.cells import cell_len
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.core.embedded import checkpoint_path
from medvqa_rl.core.progress import TerminalConsole
from medvqa_rl.rewards.attack.results import FILE, RESULT

FUNCTIONS = """
def names_gold(completions, answer_text, **kwargs):
    return [float(gold in completion[0]["content"]) for gold, completion in zip(answer_text, completions)]

def nothing(completions, **kwargs):
    return [float("nan") for _ in completions]

def long(completions, **kwargs):
    return [len(completion[0]["content"]) / 100 for completion in completions]

def breaks(completions, **kwargs):
    return [len(completion[0]["text"]) for completion in completions]
"""
SMALL = (
    "data.answer_types=[choice,closed,open]",
    "rewards.open_correctness=exact",
    "rollout.max_completion_length=96",
)
SMALL_OPTIONS = ("--questions", "4")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config and reward functions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "attacked_rewards", raising=False)
    (tmp_path / "attacked_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "config.yaml").write_text("data: {name: phantom}\n")
    monkeypatch.setattr("medvqa_rl.models.loading.load_policy", lambda config: pytest.fail("weights are loaded"))
    return tmp_path


def run(*args: str, config: str = "config.yaml") -> Any:
    return CliRunner().invoke(app, ["rewards", "attack", config, *SMALL, *SMALL_OPTIONS, *args])


def test_the_default_rewards_hold() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert "Rewards under attack" in result.stdout and "Totals by attack" in result.stdout
    assert "Held: the best wrong completion" in result.stdout and "stays 1 below the honest right one" in result.stdout
    assert "Written" not in result.stdout and not Path(FILE).exists()
    assert run().stdout == result.stdout != run("--seed", "1").stdout


def test_the_bound_decides_the_exit_code() -> None:
    assert run("--bound", "-1").exit_code == 0
    result = run("--bound", "-1.01", "--output", "new/out.json")
    assert result.exit_code == 1 and "Exceeded:" in result.stdout and "Written: new/out.json" in result.stdout
    assert RESULT.validate_json(Path("new/out.json").read_bytes()).bound == -1.01
    assert "With rewards.correctness=1.01, no completion of this suite exceeds the bound." in result.stdout
    assert run("--bound", "-1.01", "rewards.correctness=1.01").exit_code == 0


def test_a_function_that_searches_the_text_is_caught() -> None:
    result = run("rewards.correctness=0", "rewards.functions.attacked_rewards.names_gold=1")
    assert "equals the honest right one" in result.stdout and "names_gold rewards it as much" in result.stdout
    longer = run("rewards.functions.attacked_rewards.long=1")
    assert longer.exit_code == 1 and "long rewards it more" in longer.stdout


@pytest.mark.parametrize("width", [80, 120])
def test_the_output_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medvqa_rl.cli.rewards.open_console", lambda: TerminalConsole(width=width, highlight=False))
    result = run("rewards.ecr=1")
    tables, _, lines = result.stdout.partition("Held:")
    assert lines and all(cell_len(line) <= width for line in tables.splitlines())
    for column in ("weight", "honest", "highest", "mean", "excess"):
        assert column in tables
    assert ("worst question" in tables.replace("\n", " ")) and ("need a wider terminal" in tables) == (width == 80)


def test_a_run_directory_gets_the_file(folder: Path) -> None:
    run_dir = folder / "moved"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("output_dir: elsewhere\ndata: {name: phantom}\n")
    result = run(config="moved")
    assert result.exit_code == 0, result.output
    found = RESULT.validate_json((run_dir / FILE).read_bytes())
    assert (found.questions, found.dataset, found.max_completion_length) == (4, "phantom/home/train", 96)
    assert not (folder / "elsewhere").exists()
    assert run("--output", "x.json", config="moved").exit_code == 0 and Path("x.json").is_file()


def test_a_moved_run_brings_its_data(folder: Path) -> None:
    stored = folder / "moved" / "data"
    stored.mkdir(parents=True)
    rows = [{"image": "scan.png", "question": "Where?", "answer": side} for side in ("left", "right")]
    (stored / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (32, 32)).save(stored / "scan.png")
    (folder / "moved" / "config.yaml").write_text("output_dir: before\ndata: {name: own, path: before/data}\n")
    result = CliRunner().invoke(app, ["rewards", "attack", "moved", "rewards.open_correctness=exact"])
    assert result.exit_code == 0, result.output
    assert RESULT.validate_json((folder / "moved" / FILE).read_bytes()).questions == 2


def test_the_tags_of_the_checkpoint_are_used(folder: Path) -> None:
    """A model that was trained with tags of its own is asked with them, unless the config sets others."""
    shutil.copytree(checkpoint_path("instruct"), folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model" / "prompt.json").write_text('{"think": ["[why]", "[/why]"], "answer": ["[so]", "[/so]"]}')
    result = run("model.path=model", "--output", "out.json")
    assert result.exit_code == 0, result.output
    found = RESULT.validate_json(Path("out.json").read_bytes())
    assert "[so]" in found.worst.text and found.rewards[-1].right == 2.0


def test_rewards_of_the_policy_are_left_out() -> None:
    result = run("rewards.looking=1", "rewards.calibration=1")
    assert "Left out, because the policy's own probabilities decide it: looking and calibration." in result.stdout
    assert "looking" not in result.stdout.partition("Held:")[0]


def test_an_endpoint_is_told_of_before_requests_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no server here")

    monkeypatch.setattr("medvqa_rl.learning.attack.load_rewarding", refuse)
    result = run("rewards.semantic=1", "judge.endpoint=http://localhost:9/v1", "judge.model=x")
    assert result.exit_code == 2
    said = result.stderr
    assert "reasoning are sent to localhost:9" in said
    number = int(said.partition("at most ")[2].partition(" request")[0])
    assert 4 * 31 <= number <= 4 * 33
    assert said.index("at most") < said.index("no server here")


ONE_OPEN = '{"image": "scan.png", "question": "Where is it?", "answer": "left"}\n'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--bound", "low"), "Invalid value for '--bound'"),
        (("--bound", "nan"), "--bound is nan: give a finite number, such as 0 or -0.5."),
        (("--bound", "inf"), "--bound is inf"),
        (("--questions", "0"), "Invalid value for '--questions'"),
        (
            ("rewards.format=0", "rewards.correctness=0"),
            "All reward weights are 0",
        ),
        (
            ("rewards.format=0", "rewards.correctness=0", "rewards.looking=1"),
            "no reward to attack besides looking, which the policy's own probabilities decide: set another",
        ),
        (("rewards.functions.attacked_rewards.breaks=1",), "(KeyError: 'text'): let it return a number for any text"),
        (
            ("rewards.functions.attacked_rewards.breaks=1",),
            "'attacked_rewards.breaks' (attacked_rewards.py, line 12).",
        ),
        (("rewards.functions.attacked_rewards.nothing=1",), "and that reward functions return finite numbers."),
        (("rewards.functions.absent.f=1",), "there is no module 'absent'"),
        (("rollout.max_completion_length=16",), "No right answer fits into rollout.max_completion_length=16 tokens"),
        (("--output", "."), "--output is the folder .: give the path of a JSON file"),
        (("data.name=own", "data.path=one"), "No wrong answer is known"),
    ],
)
def test_bad_input_is_one_sentence(args: tuple[str, ...], message: str) -> None:
    Path("one").mkdir()
    Path("one/train.jsonl").write_text(ONE_OPEN)
    Image.new("RGB", (32, 32)).save("one/scan.png")
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output and not result.stdout
    assert not [*Path().glob("**/*attack.json")]


def test_a_folder_that_is_no_run() -> None:
    Path("empty").mkdir()
    result = run(config="empty")
    assert result.exit_code == 2 and "is not a run directory" in result.stderr
