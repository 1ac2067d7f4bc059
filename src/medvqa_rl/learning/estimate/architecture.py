"""The dimensions of a model, from its config.json on this machine or by published size. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.config import ModelConfig
from medvqa_rl.core.embedded import local_file
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import printable, shown

_CONFIG = TypeAdapter[Mapping[str, Any]](dict[str, Any])
Grid = tuple[int, int]
"""Patches of an image, (rows, columns)."""


@dataclass(frozen=True)
class Architecture:
    """The dimensions of a Qwen2-VL or Qwen2.5-VL that determine its cost."""

    vocabulary: int
    """V, rows of the embedding, including padding rows."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    is_tied: bool
    """The output layer shares the weights of the embedding."""
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_is_gated: bool
    """Qwen2.5-VL: gated MLP with biases, RMS norms, window attention. Qwen2-VL: plain MLP, layer norms."""
    window_pixels: int = 0
    """Side of an attention window in pixels; 0 for full attention within each image."""
    global_layers: tuple[int, ...] = ()
    """Vision layers with full attention when the others use windows."""
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    channels: int = 3

    @property
    def kv_hidden(self) -> int:
        """Width of the keys (and of the values) of one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(input, output) features of each linear layer of a decoder layer."""
        h, i, kv = self.hidden, self.intermediate, self.kv_hidden
        return {
            "q_proj": (h, h),
            "k_proj": (h, kv),
            "v_proj": (h, kv),
            "o_proj": (h, h),
            "gate_proj": (h, i),
            "up_proj": (h, i),
            "down_proj": (i, h),
        }

    @property
    def patch_values(self) -> int:
        """Numbers per patch, as returned by the image processor."""
        return self.channels * self.temporal_patch_size * self.patch_size**2


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a config.json, in the Hub's layout (language model at the top level) or as transformers 5 saves it.

    Raises:
        ValueError: it is of another architecture, or a dimension is missing or not a positive integer.
    """
    kind = config.get("model_type")
    if kind not in ("qwen2_vl", "qwen2_5_vl"):
        raise ValueError(
            f"The config.json is of a {printable(str(kind))} model, but only Qwen2-VL (qwen2_vl) and Qwen2.5-VL "
            "(qwen2_5_vl) are supported: choose one of these."
        )
    text, vision = config.get("text_config") or config, config.get("vision_config") or {}
    blocks: Any = vision.get("fullatt_block_indexes", (7, 15, 23, 31)) if isinstance(vision, Mapping) else None
    is_list = isinstance(blocks, list | tuple) and all(type(block) is int for block in blocks)
    if not isinstance(text, Mapping) or not is_list:
        raise ValueError(
            "The config.json has another kind of value for text_config, vision_config or fullatt_block_indexes than "
            "published models: take the file from the checkpoint."
        )

    def size(section: Mapping[str, Any], name: str, default: int | None = None) -> int:
        value = section.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            where = "vision_config." if section is vision else ""
            raise ValueError(
                f"The config.json has {shown(value)} for {where}{name}, but it must be a positive whole number: "
                "take the "
                "file from the checkpoint."
            )
        return value

    is_gated = kind == "qwen2_5_vl"
    width = size(vision, "hidden_size" if is_gated else "embed_dim")
    heads = size(text, "num_attention_heads")
    return Architecture(
        vocabulary=size(text, "vocab_size"),
        hidden=size(text, "hidden_size"),
        intermediate=size(text, "intermediate_size"),
        layers=size(text, "num_hidden_layers"),
        heads=heads,
        kv_heads=size(text, "num_key_value_heads", heads),
        is_tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        vision_layers=size(vision, "depth"),
        vision_hidden=width,
        vision_intermediate=size(vision, "intermediate_size") if is_gated else width * size(vision, "mlp_ratio", 4),
        vision_is_gated=is_gated,
        window_pixels=size(vision, "window_size", 112) if is_gated else 0,
        global_layers=tuple(blocks) if is_gated else (),
        patch_size=size(vision, "patch_size", 14),
        temporal_patch_size=size(vision, "temporal_patch_size", 2),
        merge_size=size(vision, "spatial_merge_size", 2),
        channels=size(vision, "in_channels", 3),
    )


SIZES: Mapping[str, Mapping[str, Any]] = {
    "2b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4},
    },
    "7b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4},
    },
    "2.5-3b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
    },
    "2.5-7b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420},
    },
    "2.5-32b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64},
        **{"num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456},
    },
}
"""config.json of published models, by --model-size: Qwen2-VL-2B and -7B, Qwen2.5-VL-3B, -7B and -32B."""


def find_architecture(model: ModelConfig, size: str | None) -> Architecture:
    """Look up the dimensions of the configured model, or of a published model if a size is given; opens no connection.

    Raises:
        ValueError: the size is unknown, or there is no usable config.json on this machine.
    """
    if size is not None:
        if size not in SIZES:
            raise ValueError(f"--model-size is {shown(size)}, but the known sizes are {', '.join(SIZES)}.")
        return read_architecture(SIZES[size])
    file = local_file(model.path, model.revision, "config.json")
    if file is None:
        raise ValueError(
            f"model.path is {shown(model.path)}, but no config.json of it is on this machine: give the folder of a "
            f"checkpoint, download the model once, or give its size with --model-size ({', '.join(SIZES)})."
        )
    return read_architecture(read_json(_CONFIG, file, "take it from the checkpoint"))
