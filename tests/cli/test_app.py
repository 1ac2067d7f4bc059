"""The command line: help, exit codes, messages, and the arguments that each verb passes on."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from medvqa_rl import __version__
from medvqa_rl.cli.app import app, installed_extras
from medvqa_rl.config import Config, DataConfig
from medvqa_rl.config.yaml import read_yaml
from medvqa_rl.evaluation.store import Shard
from medvqa_rl.learning.run.errors import NonFiniteError

VERBS = ["demo", "train", "sft", "eval", "compare", "ask", "env", "phantom build", "phantom draw"]
VERBS += ["estimate", "config show", "config check", "config schema", "report", "view"]
VERBS += ["judge calibrate", "phantom build-judges"]


def invoke(*args: str) -> Any:
    """Run the command in this process."""
    return CliRunner().invoke(app, list(args))


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, name: str, error: BaseException | None = None) -> list[Any]:
    """Put a function that records its calls, or raises, in the place of the one that a verb calls."""
    calls: list[Any] = []

    def record(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))
        if error is not None:
            raise error

    fake = ModuleType(module)
    setattr(fake, name, record)
    monkeypatch.setitem(sys.modules, module, fake)
    return calls


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 5}\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb: str) -> None:
    result = invoke(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_help_starts_at_once_and_without_torch() -> None:
    code = "import sys, medvqa_rl.cli; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "medvqa_rl", "--help"], capture_output=True, text=True, check=True)
    assert "Research" in result.stdout
    assert time.perf_counter() - start < 3  # 0.2 s here; the bound is for a machine under load


def test_libraries_show_no_progress_bars_of_their_own() -> None:
    code = (
        "from medvqa_rl.cli.common import prepare_process; prepare_process()\n"
        "from transformers.utils import logging; assert not logging.is_progress_bar_enabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version() -> None:
    assert invoke("--version").output == f"medvqa-rl {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "module", "name"),
    [("train", "medvqa_rl.learning.grpo", "train"), ("sft", "medvqa_rl.learning.sft", "train_sft")],
)
def test_training_verbs_hand_over_settings(
    verb: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch, config_file: str
) -> None:
    calls = stand_in(monkeypatch, module, name)
    cards = stand_in(monkeypatch, "medvqa_rl.report.card", "write_cards")
    assert invoke(verb, config_file, "train.seed=3", "--resume", "--dry-run").exit_code == 0
    assert invoke(verb, config_file).exit_code == 0
    assert invoke(verb, config_file, "--resume-from", "4").exit_code == 0
    (config,), kwargs = calls[0]
    assert isinstance(config, Config) and (config.train.steps, config.train.seed) == (5, 3)
    assert kwargs == {
        "resume": True, "resume_from": None, "dry_run": True, "given": {"train": {"steps": 5, "seed": 3}}
    }  # fmt: skip
    assert calls[1][1] == {
        "resume": False, "resume_from": None, "dry_run": False, "given": {"train": {"steps": 5}}
    }  # fmt: skip
    assert calls[2][1]["resume_from"] == 4
    assert len(cards) == 2  # none for the dry run


def test_what_is_resumed_keeps_its_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, config_file: str, tmp_path: Path
) -> None:
    """The verbs hand over the files with the number; evaluations also into how many shards they are divided."""
    threads: dict[str, Any] = {}

    def use_threads(model: str | None, *, processes: int = 1, records: Iterable[Path] = ()) -> None:
        threads.update(processes=processes, records=[path.relative_to(tmp_path) for path in records])

    for module in ("train", "evaluate"):
        monkeypatch.setattr(f"medvqa_rl.cli.{module}.use_threads", use_threads)
    for module, name in (
        *(("learning.grpo", "train"), ("learning.sft", "train_sft")),
        *(("report.card", "write_cards"), ("evaluation.cells", "run_eval")),
    ):
        stand_in(monkeypatch, f"medvqa_rl.{module}", name)
    for verb in ("train", "sft"):
        assert invoke(verb, config_file, f"output_dir={tmp_path}/run", "--resume").exit_code == 0
        assert threads == {"processes": 1, "records": [Path("run/env.json")]}
        assert invoke(verb, config_file, f"output_dir={tmp_path}/run").exit_code == 0
        assert threads == {"processes": 1, "records": []}
    (tmp_path / "out" / "phantom").mkdir(parents=True)
    (tmp_path / "out" / "phantom" / "evaluation.json").write_text("{}")
    assert invoke("eval", config_file, "--output", f"{tmp_path}/out", "--shard", "1/3", "--resume").exit_code == 0
    assert threads == {"processes": 3, "records": [Path("out/phantom/evaluation.json")]}


def test_gpus_starts_the_same_command_through_the_launcher(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr("os.execv", execv)
    words = ["train", config_file, "model.device=cpu", "--resume"]
    assert invoke(*words, "--debug", "--gpus", "2").exit_code == 130
    (command,) = commands
    assert command[command.index("medvqa_rl") + 1 :] == [*words, "--debug"]
    assert command[command.index("--num_processes") + 1] == "2"


def test_eval_hands_over_checkpoint_split_and_output(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    calls = stand_in(monkeypatch, "medvqa_rl.evaluation.cells", "run_eval")
    assert invoke("eval", config_file, "--checkpoint", "a", "--split", "val", "--output", "b").exit_code == 0
    (config,), kwargs = calls[0]
    assert isinstance(config, Config)
    assert kwargs == {
        "checkpoint": Path("a"),
        "split": "val",
        "output": Path("b"),
        "dry_run": False,
        "data": [],
        "prompts": (),
        "protocols": (),
        "controls": False,
        "shard": None,
        "resume": False,
    }


def test_eval_hands_over_data_prompts_samples_and_shard(
    monkeypatch: pytest.MonkeyPatch, config_file: str, tmp_path: Path
) -> None:
    calls = stand_in(monkeypatch, "medvqa_rl.evaluation.cells", "run_eval")
    other = tmp_path / "other.yaml"
    other.write_text("data: {scanner: unseen}\n")
    options = ["--data", str(other), "--prompts", "direct, think_answer", "--samples", "8"]
    result = invoke("eval", config_file, *options, "--controls", "--shard", "1/4", "--resume")
    assert result.exit_code == 0, result.output
    (config,), kwargs = calls[0]
    assert isinstance(config, Config) and config.eval.num_samples == 8
    assert kwargs["data"] == [DataConfig(scanner="unseen")]
    assert kwargs["prompts"] == ("direct", "think_answer")
    assert (kwargs["controls"], kwargs["shard"], kwargs["resume"]) == (True, Shard(1, 4), True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "4/4"], "The shard '4/4' is not of the format I/N"),
        (["--shard", "half"], "is not of the format I/N"),
        (["--prompts", "chain"], "There is no prompt template 'chain': choose from think_answer, direct"),
        (["--prompts", "direct,direct"], "must name each template once"),
        (["--data", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_eval_says_what_is_wrong_with_its_options(config_file: str, options: list[str], message: str) -> None:
    result = invoke("eval", config_file, *options)
    assert result.exit_code == 2 and message in result.output


def test_ask_hands_over_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("medvqa_rl.cli.ask.run_ask", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert invoke("ask", "x.png", "Where?", "--option", "left", "--option", "right", "--samples", "8").exit_code == 0
    args, kwargs = calls[0]
    assert args == (Path("x.png"), "Where?")
    assert kwargs["options"] == ("left", "right") and kwargs["samples"] == 8 and kwargs["template"] == "think_answer"


def test_judge_calibrate_hands_over_the_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in(monkeypatch, "medvqa_rl.cli.judge.calibrate", "run_calibrate")
    words = ("--judge", "m", "--endpoint", "http://judge.example/v1", "--pairs", "p.jsonl", "--no-policies")
    result = invoke("judge", "calibrate", *words, "--count", "7")
    assert result.exit_code == 0 and "sent to judge.example" in result.output
    ((judge,), kwargs) = calls[0]
    assert (judge.model, judge.endpoint) == ("m", "http://judge.example/v1")
    assert kwargs == {"pairs_file": Path("p.jsonl"), "output": None, "count": 7, "seed": 0, "with_policies": False}
    bad = invoke("judge", "calibrate", "--template", "poem")
    assert bad.exit_code == 2 and "judge.template is the text 'poem', but must be" in bad.stderr


def test_demo_and_phantom_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = stand_in(monkeypatch, "medvqa_rl.phantom.demo", "run_demo")
    build = stand_in(monkeypatch, "medvqa_rl.phantom.build", "build")
    draw = stand_in(monkeypatch, "medvqa_rl.data.phantom.sheet", "draw_sheet")
    assert invoke("demo", "--seed", "2").exit_code == 0
    assert invoke("phantom", "build", "--output", "x").exit_code == 0
    assert invoke("phantom", "draw", "--output", "x.png", "--count", "6", "--scanner", "unseen").exit_code == 0
    assert demo[0][0] == (Path("runs/demo"), 2)
    assert build[0][0] == (Path("x"),)
    assert draw[0][0] == (Path("x.png"), 6, 0, "unseen")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("The folder x is in use."), 2, "error: The folder x is in use."),
        (ValueError(), 2, "error: ValueError without a message: run again with --debug"),
        (FloatingPointError("The loss is nan at step 7."), 1, "error: The loss is nan at step 7."),
        (NonFiniteError("Step 7: the loss is nan.", []), 1, "error: Step 7: the loss is nan."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "No space is left on the device (runs/x)"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            2,
            "Permission denied (runs/x): check the path",
        ),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, config_file: str
) -> None:
    stand_in(monkeypatch, "medvqa_rl.learning.grpo", "train", error)
    result = invoke("train", config_file)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    stand_in(monkeypatch, "medvqa_rl.learning.grpo", "train", ValueError("x"))
    assert isinstance(invoke("train", config_file, "--debug").exception, ValueError)


def test_defects_are_not_hidden(monkeypatch: pytest.MonkeyPatch, config_file: str) -> None:
    for error in (AssertionError("x"), RuntimeError("x")):
        stand_in(monkeypatch, "medvqa_rl.learning.grpo", "train", error)
        assert invoke("train", config_file).exception is error


def test_all_wrong_settings_are_said_with_exit_code_2(config_file: str) -> None:
    result = invoke("train", config_file, "rollout.num_generations=1", "optimizer.learning_rate=-1", "train.stpes=1")
    assert result.exit_code == 2
    assert result.output.count("error: ") == 3
    assert "did you mean train.steps?" in result.output


@pytest.mark.parametrize("args", [["trian"], ["train"], ["train", "none.yaml"], ["train", "x=1"], ["eval", "--split"]])
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    assert invoke(*args).exit_code == 2


def test_config_verbs(config_file: str) -> None:
    assert invoke("config", "check", config_file).output == "ok\n"
    assert invoke("config", "check", config_file, "rollout.num_generations=1").exit_code == 2
    assert invoke("config", "check", config_file, "rollout.num_generations=1", "--for", "eval").output == "ok\n"
    shown = invoke("config", "show", config_file, "train.seed=3").output
    assert read_yaml(shown)["train"]["seed"] == 3
    assert "seed: 3  # given on the command line" in shown
    assert json.loads(invoke("config", "schema").output)["$defs"]["TrainConfig"]["properties"]["steps"]["minimum"] == 1


def test_env_prints_versions_and_extras() -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    assert f"medvqa-rl {__version__}" in " ".join(result.output.split())
    for name in ("torch", "torch thread", "GiB", "extras"):
        assert name in result.output
    assert set(installed_extras()) >= {"bench", "dev", "hub", "track", "vllm"}


def test_standard_output_that_is_full_is_a_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "medvqa_rl", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"error: Standard output cannot be written (No space left on device).\n"
