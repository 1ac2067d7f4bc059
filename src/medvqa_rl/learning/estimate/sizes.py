"""Which sizes a model has: from its config.json on this machine, or of a published one by name. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medvqa_rl.config import Config, LoraConfig, ModelConfig
from medvqa_rl.core.embedded import local_file
from medvqa_rl.learning.estimate.cost import Architecture, read_architecture

SIZES: Mapping[str, Mapping[str, Any]] = {
    "2b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16},
    },
    "7b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16},
    },
    "2.5-3b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    },
    "2.5-7b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    },
    "2.5-32b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64},
        **{"num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "num_heads": 16},
    },
}
"""What config.json has for Qwen2-VL-2B and -7B and Qwen2.5-VL-3B, -7B and -32B, by their names here."""


def find_architecture(model: ModelConfig, size: str | None) -> Architecture:
    """The sizes of the model that the settings name, from its config.json on this machine, or of a known size.

    Opens no connection.

    Raises:
        ValueError: the size is unknown, there is no config.json here, or it cannot be used.
    """
    if size is not None:
        if size not in SIZES:
            raise ValueError(f"--model-size is {size!r}, but the known sizes are {', '.join(SIZES)}.")
        return read_architecture(SIZES[size])
    file = local_file(model.path, model.revision, "config.json")
    if file is None:
        raise ValueError(
            f"model.path is {model.path!r}, but no config.json of it is on this machine: give the folder of a "
            f"checkpoint, download the model once, or name its size with --model-size ({', '.join(SIZES)})."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {file} is not valid JSON ({error}): take it from the checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"The file {file} is no model's configuration: take it from the checkpoint.")
    return read_architecture(content)


def with_adapter_read(config: Config) -> Config:
    """The settings with the adapter that they name described by its own rank and targets.

    Raises:
        ValueError: its folder holds no description of a LoRA adapter.
    """
    if config.model.adapter is None:
        return config
    file = Path(config.model.adapter).expanduser() / "adapter_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rank, targets = int(content["r"]), content["target_modules"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.adapter is {config.model.adapter!r}, but {file} does not describe a LoRA adapter "
            f"({type(error).__name__}): give the folder of a checkpoint that was trained with model.lora."
        ) from error
    names = targets if isinstance(targets, list) else re.findall(r"\w+_proj", str(targets))
    lora = LoraConfig(rank=rank, targets=tuple(names))
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
