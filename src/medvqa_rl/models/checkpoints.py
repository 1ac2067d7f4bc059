"""Model folders on disk: standard Hugging Face or PEFT files, written so that a crash never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from safetensors import SafetensorError

from medvqa_rl.config import ModelConfig
from medvqa_rl.models.loading import Policy


def save_model(policy: Policy, folder: str | Path) -> None:
    """Write a policy as a folder that stock transformers and PEFT load, replacing an older one of that name.

    Full fine-tuning writes the whole model; LoRA writes the adapter (with the projector or tower where they are
    trained alongside). Tokenizer, chat template and image settings lie beside both.

    Raises:
        ValueError: no space is left on the device.
    """
    with atomic_folder(folder) as temporary:
        write_model(policy, temporary)


def write_model(policy: Policy, folder: Path) -> None:
    """Write a policy's files into an existing folder, for callers who add files of their own."""
    if isinstance(policy.model, PeftModel):
        # "auto" would ask the Hub for the base model's configuration to compare vocabulary sizes.
        policy.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        cast(Any, policy.model).save_pretrained(folder)
    policy.processor.save(folder)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside the target that takes its name when the block ends well, else disappears.

    Files are flushed to disk before the renaming. An older folder of that name is moved away at the last moment.

    Raises:
        ValueError: no space is left on the device.
    """
    target = Path(folder)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full or "No space left" in str(error):
            raise ValueError(
                f"No space is left to write {target}: free some, or set output_dir to a device with more room."
            ) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Force a file's or a folder's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_checkpoint(model: ModelConfig, folder: Path) -> ModelConfig:
    """The settings of a model with its weights taken from a checkpoint's folder, whole model or LoRA adapter.

    Raises:
        ValueError: the folder does not exist or holds neither.
    """
    if (folder / "config.json").is_file():
        return model.model_copy(update={"path": str(folder), "adapter": None, "lora": None, "revision": None})
    if (folder / "adapter_config.json").is_file():
        return model.model_copy(update={"adapter": str(folder), "lora": None})
    if not folder.is_dir():
        raise ValueError(f"The checkpoint {folder} does not exist: give the folder of a saved model or adapter.")
    found = {path.parent for name in ("config.json", "adapter_config.json") for path in folder.rglob(name)}
    inside = sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    best = [path for path in inside if path.name == "best"]
    hint = f"try {(best or inside)[-1]}" if inside else "give the folder of a saved model or adapter"
    raise ValueError(f"The folder {folder} holds neither config.json nor adapter_config.json: {hint}.")


def model_for(path: str) -> ModelConfig:
    """Settings of a model from one path: phantom name, Hub id, folder of a model, or of an adapter, whose base model
    is the one it was trained on.

    Raises:
        ValueError: a folder that holds no model, or an adapter that does not name its base model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        with_checkpoint(ModelConfig(), folder)  # a run's folder holds models but is none: say which
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return ModelConfig(path=path)
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"The adapter in {folder} does not name the model that it was trained on: write it as "
            "base_model_name_or_path into its adapter_config.json."
        )
    return ModelConfig(path=base, adapter=str(folder))
