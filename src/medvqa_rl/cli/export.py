"""The verb ``medvqa-rl export``: a checkpoint as a Hugging Face or PEFT folder. Imports no torch until it runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from medvqa_rl.cli.common import verb
from medvqa_rl.core.files import find_checkpoint
from medvqa_rl.core.machine import claimed

_TRAINING_FILES = ("best.json",)


@verb
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a run folder for its best, else its last checkpoint.")
    ],
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model, in full precision.")
    ] = False,
) -> None:
    """Write a model as a Hugging Face folder, or an adapter as a PEFT folder, without training state."""
    print(export_model(checkpoint, output, merge=merge))
    if merge:
        typer.echo(
            "The adapter was merged into the base model's original weights, in full precision, even if it was trained "
            "on 4-bit weights.",
            err=True,
        )


def export_model(checkpoint: Path, output: Path, *, merge: bool) -> Path:
    """Copy the model or adapter of a checkpoint, whichever engine trained it.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its best model, else its last checkpoint.
        output: a new folder.
        merge: merge an adapter into its base model and write the whole model.

    Returns:
        The output folder.

    Raises:
        ValueError: there is no checkpoint, the output exists, or there is no adapter to merge.
    """
    from medvqa_rl.models.checkpoints import atomic_folder

    is_model = any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json"))
    folder = checkpoint if is_model else find_checkpoint(checkpoint)
    if merge and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a whole model, so there is no adapter to merge: leave out --merge.")
    with claimed(output), atomic_folder(output) as temporary:
        if output.exists():
            raise ValueError(f"The output folder {output} exists: give a new one, so that nothing is overwritten.")
        if merge:
            _write_merged(folder, temporary)
        else:
            for path in folder.iterdir():
                if path.is_file() and path.name not in _TRAINING_FILES:
                    shutil.copy2(path, temporary / path.name)
    return output


def _write_merged(folder: Path, target: Path) -> None:
    """Load the base model in its stored precision, merge the adapter and save both with the processor."""
    from medvqa_rl.models.checkpoints import model_for
    from medvqa_rl.models.loading import load_policy

    policy = load_policy(model_for(str(folder)).model_copy(update={"device": "cpu"}))
    model: Any = policy.model
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    policy.processor.save(target)
