"""Saved folders are never left half written; tests/models/families opens them with stock transformers and PEFT."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medvqa_rl.config import LoraConfig, ModelConfig
from medvqa_rl.models.checkpoints import atomic_folder, model_for, with_checkpoint, write_model

LORA = LoraConfig(rank=4, alpha=8)


def test_saving_an_adapter_opens_no_connection(tiny_policy, tmp_path, monkeypatch):
    policy = tiny_policy(lora=LORA)
    policy.model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen2-VL-2B-Instruct"
    policy.model.get_base_model().config.vocab_size = 151936  # what PEFT compares with the Hub's

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    write_model(policy, tmp_path / "checkpoint")


def test_an_existing_folder_is_replaced(tiny_policy, tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "best") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["new"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_the_weights(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
            (folder / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}


def test_a_failure_leaves_the_existing_folder(tmp_path):
    with atomic_folder(tmp_path / "best") as folder:
        (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "best") as folder:
        (folder / "new").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["old"]


@pytest.mark.parametrize("size", [1000, 20_000])  # the tokenizer's file does not fit, or the weights' file
def test_weights_or_tokenizer_beyond_the_file_limit_name_the_folder(tiny_policy, file_limit, tmp_path, size):
    folder, processor = tmp_path / "best", tiny_policy("qwen2_vl").processor
    with pytest.raises(OSError) as caught, file_limit(size), atomic_folder(folder) as temporary:
        processor.save(temporary)
        save_file({"a": torch.zeros(10_000)}, temporary / "model.safetensors")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(folder))
    assert not list(tmp_path.iterdir())


def test_a_run_folder_is_not_a_checkpoint_but_its_best_one_is_named(tmp_path: Path) -> None:
    for name in ("checkpoints/step_000100", "best", ".best.tmp"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
    with pytest.raises(ValueError, match=f"holds neither .*: try {tmp_path / 'best'}"):
        with_checkpoint(ModelConfig(), tmp_path)
    with pytest.raises(ValueError, match="does not exist: give the folder"):
        with_checkpoint(ModelConfig(), tmp_path / "none")


def test_the_models_in_a_run_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds neither config.json nor adapter_config.json: try .*best\.$"):
        model_for(str(tmp_path))


def test_an_adapter_is_loaded_with_its_base_model(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text('{"base_model_name_or_path": "some/model"}')
    assert model_for(str(tmp_path)) == ModelConfig(path="some/model", adapter=str(tmp_path))
    assert model_for("some/model") == ModelConfig(path="some/model")
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not name the model it was trained on"):
        model_for(str(tmp_path))
