"""Checkpoints are checked against their manifest before a run continues from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from toy import ToyData, checkpoint_bytes, toy_config

from medvqa_rl.core.files import list_checkpoints, step_of
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.checkpoint import MANIFEST, _write_manifest, find_damage

CONFIG = {"steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2 and 4."""
    return go(toy_config(tiny_folder("qwen2_vl"), tmp_path_factory.mktemp("finished") / "run", train=CONFIG))


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def config(run, tiny_folder):
    return toy_config(tiny_folder("qwen2_vl"), run, train=CONFIG)


def go(config, **options) -> Path:
    return train(config, train_set=ToyData(), **options)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_state(folder: Path, **changes) -> None:
    """Change state.json and the manifest with it, as a program other than a damaged disk would."""
    path = folder / "trainer" / "state.json"
    state = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in state.items() if value != "remove"}))
    _write_manifest_again(folder)


def _write_manifest_again(folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    _write_manifest(folder)


DAMAGES = {
    "bit": (lambda f: flip(f / "model.safetensors"), "the content of model.safetensors has changed"),
    "optimizer-bit": (lambda f: flip(f / "trainer" / "optimizer.safetensors"), "the content of trainer/optimizer"),
    "optimizer-gone": (
        lambda f: (f / "trainer" / "optimizer.safetensors").unlink(),
        "optimizer.safetensors is missing",
    ),
    "empty": (lambda f: (f / "config.json").write_text(""), r"config.json has 0 bytes instead of [\d,]+"),
    "manifest": (lambda f: (f / MANIFEST).write_text("{}"), "manifest.json has no field files"),
    "key": (
        lambda f: change_state(f, num_tokens="remove"),
        "trainer/state.json has no field num_tokens",
    ),
    "type": (
        lambda f: change_state(f, num_tokens="many"),
        "trainer/state.json has 'many' under num_tokens .should be a valid integer.",
    ),
    "step": (lambda f: change_state(f, step=3), "trainer/state.json is of step 3"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_option_that_takes_a_sound_one(run, config, name):
    damage, what = DAMAGES[name]
    damage(run / "checkpoints" / "step_000004")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"step_000004 is damaged: .*{what}") as error:
        go(config, resume=True)
    command = f"`medvqa-rl train {run / 'config.yaml'} --resume --resume-from 2`"
    assert f"Continue from the newest sound one with {command}." in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_going_back_gives_the_same_weights_and_sets_newer_checkpoints_aside(finished, run, config, capsys):
    flip(run / "checkpoints" / "step_000004" / "model.safetensors")
    go(config, resume_from=2)
    assert checkpoint_bytes(run, 4) == checkpoint_bytes(finished, 4)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("step_000002", "step_000004", "step_000004.unused")
    ]
    said = "from step 2 (given by --resume-from; the newer step_000004 is renamed to step_000004.unused). The results"
    assert said in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"--resume-from is 3, but .* has no checkpoint of that step: give one of 2, 4\."
    ):
        go(config, resume_from=3)


def test_without_a_sound_checkpoint_there_is_a_way_out(run, config):
    for folder in list_checkpoints(run):
        flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"No other checkpoint is sound: move .*/checkpoints away to start over"):
        go(config, resume=True)


def test_a_checkpoint_of_an_older_version_has_no_manifest(run):
    folder = run / "checkpoints" / "step_000004"
    (folder / MANIFEST).unlink()
    assert find_damage(folder) is None
    (folder / "trainer" / "optimizer.safetensors").unlink()
    assert find_damage(folder) == "it has no trainer/optimizer.safetensors"


def test_what_a_user_adds_is_no_checkpoint_and_blocks_nothing(run, config):
    folder = run / "checkpoints" / "step_000004"
    shutil.copytree(folder, run / "checkpoints" / "step_final")
    (run / "samples" / "step_note.jsonl").write_text("mine")
    (folder / "README.md").write_text("a card")
    assert [step_of(path) for path in list_checkpoints(run)] == [2, 4]
    go(config, resume=True)
    assert (run / "samples" / "step_note.jsonl").read_text() == "mine"
    assert "metrics.jsonl has" not in (run / "train.log").read_text()


def test_short_metrics_are_never_filled_up(run, config):
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:-20])
    go(config, resume=True)
    assert [json.loads(line)["step"] for line in metrics.read_bytes().splitlines()] == [1, 2, 3]
    left, had = f"{len(whole.rpartition(b'{')[0]):,}", f"{len(whole):,}"
    assert f"metrics.jsonl has {left} of the {had} bytes that it had at step 4" in (run / "train.log").read_text()


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_000004", 4),
        ("step_1000000", 1000000),
        ("step_000002.jsonl", 2),
        *((name, None) for name in ("step_final", "step_4 copy", "step_000004.unused", "step_²", "best", "000004")),
    ],
)
def test_steps_are_read_from_whole_names(name, step):
    assert step_of(Path("run") / name) == step
