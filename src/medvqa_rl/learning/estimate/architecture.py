"""The dimensions of the configured model, or of a published one. Imports torch only when called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import local_file
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import shown
from medvqa_rl.models.dimensions import Architecture

_SETTINGS: TypeAdapter[Mapping[str, Any]] = TypeAdapter(Mapping[str, Any])


def find_architecture(model: ModelConfig, size: str | None) -> Architecture:
    """Look up the dimensions of the configured model, or of a published model if a size is given; opens no connection.

    Raises:
        ValueError: the size is unknown, or there is no usable config.json on this machine.
    """
    from medvqa_rl.models.families.costs import read_architecture
    from medvqa_rl.models.families.published import SIZES, size_of

    file = local_file(model.path, model.revision, "config.json")
    if size is None and file is None:
        size = size_of(model.path)
    if size is not None:
        if size not in SIZES:
            raise ValueError(f"--model-size is {shown(size)}, but the known sizes are {', '.join(SIZES)}.")
        return read_architecture(SIZES[size])
    if file is None:
        raise ValueError(
            f"model.path is {shown(model.path)}, but no config.json of it is on this machine: give the folder of a "
            f"checkpoint, download the model once, or give its size with --model-size ({', '.join(SIZES)})."
        )
    return read_architecture(read_json(_SETTINGS, file, "take it from the checkpoint"))
