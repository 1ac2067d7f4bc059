"""Bad input through the real command: one clear sentence, exit code 2, and what is there stays as it was.

Every case starts from a run that works: a tiny random model on a small VQA-RAD folder.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.data.sets.vqa_rad import FILE

MakeFolder = Callable[[str], Path]


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A row of VQA-RAD's file, in training unless told otherwise."""
    return {
        "qid": str(number),
        "image_name": f"{number}.png",
        "question": "Is there an effusion?",
        "answer": "yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "image_organ": "CHEST",
        "phrase_type": "freeform" if number < 24 else "test_freeform",
        **fields,
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A VQA-RAD folder of thirty questions about as many images."""
    folder = tmp_path / "vqa_rad"
    (folder / "images").mkdir(parents=True)
    for number in range(30):
        Image.linear_gradient("L").resize((56, 56)).rotate(12 * number).save(folder / "images" / f"{number}.png")
    write_rows(folder, [row(number) for number in range(30)])
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / FILE).write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def config(data: Path, tiny_folder: MakeFolder, tmp_path: Path) -> Path:
    """Settings of a run of two steps on it."""
    path = tmp_path / "config.yaml"
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_folder("qwen2_vl")), "device": "cpu"},
        "data": {"name": "vqa_rad", "path": str(data), "max_dropped": 0.3},
        "rollout": {"num_generations": 2, "max_completion_length": 16},
        "loss": {"beta": 0},
        "train": {"steps": 2, "prompts_per_step": 2},
        "eval": {"bootstrap": 20},
    }
    path.write_text(write_yaml(settings), encoding="utf-8")
    return path


def refused(*arguments: str | Path) -> str:
    """Run the command, which must refuse with exit code 2; returns its one message."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    assert result.output.count("error: ") == 1
    message = result.output[result.output.index("error: ") :].strip()
    assert message.endswith((".", "?"))
    return message


def accepted(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_the_run_that_the_cases_start_from_works(config: Path, tmp_path: Path) -> None:
    assert "Nothing was written" in accepted("train", config, "--dry-run")
    assert not (tmp_path / "run").exists()
    accepted("train", config, "train.eval_steps=1")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    shown = accepted("eval", config, "--checkpoint", tmp_path / "run" / "best")
    assert "vqa_rad/official/test" in shown
    assert (tmp_path / "run" / "eval" / "vqa_rad-official-test-best" / "results.json").exists()


def test_sft_runs_through_the_command_too(config: Path, tmp_path: Path) -> None:
    accepted("sft", config, "sft.batch_size=2", "model.lora.rank=2")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["kind"] == "sft"


def test_data_folder_that_is_not_there(config: Path) -> None:
    assert "The data folder /nowhere does not exist" in refused("train", config, "data.path=/nowhere")


def test_every_image_missing(config: Path, data: Path) -> None:
    for path in (data / "images").iterdir():
        path.unlink()
    assert "30 of 30 rows of VQA-RAD" in (message := refused("train", config)) and "missing image" in message


def test_an_image_whose_pixels_are_damaged_is_named(config: Path, data: Path) -> None:
    for path in (data / "images").iterdir():
        path.write_bytes(path.read_bytes()[:-60])
    message = refused("train", config)
    assert "cannot be decoded" in message and ".png" in message


def test_empty_split(config: Path, data: Path) -> None:
    write_rows(data, [row(number) for number in range(24)])
    assert "No question is left in the test split" in refused("eval", config)


def test_no_question_of_the_wanted_kind(config: Path) -> None:
    assert "No question is left" in refused("train", config, "data.answer_types=[open]")


def test_checkpoint_of_another_architecture(config: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    message = refused("train", config, f"model.path={tmp_path / 'bert'}")
    assert "is a bert model, a language model" in message
    assert "is a bert model" in refused("eval", config, "--checkpoint", tmp_path / "bert")


def test_output_folder_in_use_and_resume_with_another_configuration(config: Path, tmp_path: Path) -> None:
    accepted("train", config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "already contains a run (finished at step 2 of 2)" in refused("train", config)
    message = refused("train", config, "--resume", "optimizer.learning_rate=1e-3", "rollout.temperature=0.5")
    assert "optimizer.learning_rate" in message and "rollout.temperature" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "There is no run to resume" in refused("train", config, "--resume", f"output_dir={tmp_path / 'none'}")


def test_no_space_left(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("medvqa_rl.models.checkpoints.flush", full)
    assert "No space is left" in refused("train", config)


def test_a_reward_function_that_is_not_there(config: Path) -> None:
    message = refused("train", config, "rewards.functions.no_such_module.reward=1")
    assert "there is no module 'no_such_module'" in message


def test_special_tokens_in_a_question_do_no_harm_and_are_counted(config: Path, data: Path, tmp_path: Path) -> None:
    bad = "Is <|image_pad|> there </think> an effusion?"
    write_rows(data, [row(number, question=bad) for number in range(30)])
    accepted("train", config)
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    assert described["train"]["notes"]["neutralised: questions with special-token strings"] > 0
