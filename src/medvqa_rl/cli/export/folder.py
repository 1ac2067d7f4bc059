"""A checkpoint as a Hugging Face or PEFT folder with its model card. Imports no torch until it merges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from medvqa_rl.config import ModelConfig
from medvqa_rl.config.yaml import load_config
from medvqa_rl.core.files import find_checkpoint, run_config
from medvqa_rl.core.machine import claimed
from medvqa_rl.report.card import Average, model_card
from medvqa_rl.report.runs import is_run, read_run

CARD = "README.md"
_TRAINING_FILES = ("best.json",)


def export_model(checkpoint: Path, output: Path, *, merge: bool, average: float | None = None) -> Path:
    """Copy the model or adapter of a checkpoint, whichever engine trained it.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its best model, else its last checkpoint.
        output: a new folder.
        merge: merge an adapter into its base model and write the whole model.
        average: share of the checkpoint, 0 to 1, in the average with the weights that its run started from; None
            averages nothing.

    Returns:
        The output folder.

    Raises:
        ValueError: there is no checkpoint, the output exists, there is no adapter to merge, or the checkpoint to
            average is an adapter or in no run.
    """
    from medvqa_rl.models.checkpoints import atomic_folder

    folder = chosen(checkpoint)
    if merge and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds a whole model, so there is no adapter to merge: leave out --merge.")
    start = None if average is None else _start(folder)
    with claimed(output), atomic_folder(output) as temporary:
        if output.exists():
            raise ValueError(f"The output folder {output} exists: give a new one, so that nothing is overwritten.")
        if merge:
            _write_merged(folder, temporary)
        elif start is not None and average is not None:
            _write_average(folder, start, average, temporary)
        else:
            for path in folder.iterdir():
                if path.is_file() and path.name not in _TRAINING_FILES:
                    shutil.copy2(path, temporary / path.name)
        run = run_of(folder)
        if run is not None and not (temporary / CARD).exists():
            averaged = None if average is None else Average(average, output)
            card = model_card(read_run(run), folder, is_merged=merge, average=averaged)
            (temporary / CARD).write_text(card, encoding="utf-8", errors="replace")
    return output


def chosen(checkpoint: Path) -> Path:
    """The folder that is exported: this one, or the best, else the last checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    is_model = any((checkpoint / name).is_file() for name in ("config.json", "adapter_config.json"))
    return checkpoint if is_model else find_checkpoint(checkpoint)


def has_card(checkpoint: Path, *, merge: bool) -> bool:
    """Whether the export of a checkpoint has a model card. The card of an adapter is not that of a merged model."""
    return run_of(checkpoint) is not None or (not merge and (checkpoint / CARD).is_file())


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is in: RUN/best, or RUN/checkpoints/NAME."""
    folder = checkpoint.resolve()
    run = folder.parents[1] if folder.parent.name == "checkpoints" else folder.parent
    return run if is_run(run) else None


def _start(folder: Path) -> ModelConfig:
    """The model that the run of a checkpoint started from.

    Raises:
        ValueError: the checkpoint is an adapter, or in no run.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter, but --average takes a whole model: merge it with --merge, and evaluate "
            "the merged folder with model.average_with."
        )
    run = run_of(folder)
    if run is None:
        raise ValueError(
            f"{folder} is not in a run, so the model that its training started from is not known: give a run, or a "
            "checkpoint inside of one."
        )
    return load_config(run_config(run), (), purpose="eval").config.model


def _write_average(folder: Path, start: ModelConfig, share: float, target: Path) -> None:
    """Average a checkpoint with the model that its training started from, and save it with the processor."""
    from medvqa_rl.models.loading import load_policy, resolve_folder

    other = str(resolve_folder(start.path, start.revision))
    averaged = {"path": str(folder), "revision": None, "average_with": other, "average_weight": share}
    policy = load_policy(start.model_copy(update={**averaged, "lora": None, "device": "cpu"}))
    model: Any = policy.model
    model.save_pretrained(target)
    policy.processor.save(target)


def _write_merged(folder: Path, target: Path) -> None:
    """Load the base model in its stored precision, merge the adapter and save both with the processor."""
    from medvqa_rl.models.checkpoints import model_for
    from medvqa_rl.models.loading import load_policy

    policy = load_policy(model_for(str(folder)).model_copy(update={"device": "cpu"}))
    model: Any = policy.model
    model.merge_and_unload(safe_merge=True).save_pretrained(target)
    policy.processor.save(target)
