"""What the verb ``export`` does: a checkpoint as one folder that needs nothing of this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import find_checkpoint
from medvqa_rl.models.checkpoints import atomic_folder, model_for
from medvqa_rl.models.loading import load_policy

_OF_TRAINING = ("best.json",)


def export_model(checkpoint: Path, output: Path, *, merge: bool) -> Path:
    """Copy the model or adapter of a checkpoint, whatever engine trained it.

    Args:
        checkpoint: its folder, or that of a run: its best model, or its last checkpoint where none was evaluated.
        output: a new folder.
        merge: add an adapter to its base model and write the whole.

    Returns:
        The folder that was written.

    Raises:
        ValueError: there is no checkpoint, the output exists, or there is nothing to merge.
    """
    is_model = any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json"))
    folder = checkpoint if is_model else find_checkpoint(checkpoint)
    if output.exists():
        raise ValueError(f"The output folder {output} exists: give a new one, so that nothing is overwritten.")
    is_adapter = (folder / "adapter_config.json").is_file()
    if merge and not is_adapter:
        raise ValueError(f"{folder} holds a whole model, so there is no adapter to merge: leave out --merge.")
    with atomic_folder(output) as temporary:
        if merge:
            _write_merged(folder, temporary)
        else:
            for path in folder.iterdir():
                if path.is_file() and path.name not in _OF_TRAINING:
                    shutil.copy2(path, temporary / path.name)
    return output


def _write_merged(folder: Path, target: Path) -> None:
    """The base model, loaded as it is stored, with the adapter's products added to its weights."""
    policy = load_policy(model_for(str(folder)).model_copy(update={"device": "cpu"}))
    model: Any = policy.model
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    policy.processor.save(target)
