"""Model folders on disk: standard Hugging Face or PEFT files, written so that a crash never leaves half of one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from safetensors import SafetensorError

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
