"""Saving models as standard Hugging Face or PEFT folders, atomically, and the settings to load them again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from pydantic import BaseModel, TypeAdapter

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.files import flush, read_json, temporary_folder
from medvqa_rl.models.loading import Policy


class _Adapter(BaseModel):
    base_model_name_or_path: str | None = None


_ADAPTER = TypeAdapter(_Adapter)


def write_model(policy: Policy, folder: Path) -> None:
    """Save a policy so that stock transformers and PEFT load it.

    Full fine-tuning saves the whole model, LoRA the adapter (with the projector or vision tower if they are trained).
    Tokenizer, chat template and image settings are saved with both. Use :func:`atomic_folder` to replace a folder.
    """
    if isinstance(policy.model, PeftModel):
        # "auto" would ask the Hub for the base model's configuration to compare vocabulary sizes.
        policy.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        cast(Any, policy.model).save_pretrained(folder)
    policy.processor.save(folder)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder next to the target; flush it to disk and rename it when the block ends.

    An existing target is replaced at the last moment. If the block raises, the temporary folder is removed and the
    target stays as it was.

    Raises:
        OSError: a file cannot be written, for lack of space or by a limit; names the target.
    """
    target = Path(os.path.abspath(folder))  # "." has no name
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    with temporary_folder(target) as temporary:
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # by the umask; safetensors lets only the owner read its files
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(readable)
            flush(path)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def with_checkpoint(model: ModelConfig, folder: Path) -> ModelConfig:
    """Model settings with the weights of a checkpoint folder, which holds a whole model or a LoRA adapter.

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
    """Model settings from one path: an embedded model, a Hub id, or the folder of a model or of an adapter, which is
    loaded onto the base model it was trained on.

    Raises:
        ValueError: the folder holds no model, or the adapter does not name its base model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        with_checkpoint(ModelConfig(), folder)  # raises for the folder of a run, and names its checkpoints
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return ModelConfig(path=path)
    settings = folder / "adapter_config.json"
    adapter = read_json(_ADAPTER, settings, "restore the file, or give the folder of another adapter")
    base = adapter.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter in {folder} does not name the model it was trained on: set base_model_name_or_path in its "
            "adapter_config.json."
        )
    return ModelConfig(path=base, adapter=str(folder))
