"""Published models, whose files need not be here. Written down from what is known of them; nothing was downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_TOWER = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304}
_SMALL_TOWER = {**_TOWER, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16} | {
    "deepstack_visual_indexes": [5, 11, 17]
}
_LARGE_TOWER = {**_TOWER, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16} | {
    "deepstack_visual_indexes": [8, 16, 24]
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "2b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 1536},
    },
    "7b": {
        "model_type": "qwen2_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "hidden_size": 3584},
    },
    "2.5-3b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
        **{"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
    },
    "2.5-7b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    },
    "2.5-32b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64},
        **{"num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 5120},
    },
    "2.5-72b": {
        "model_type": "qwen2_5_vl",
        **{"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3456, "out_hidden_size": 8192},
    },
    "qwen3-2b": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "tie_word_embeddings": True},
        "vision_config": {**_SMALL_TOWER, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "tie_word_embeddings": True},
        "vision_config": {**_SMALL_TOWER, "out_hidden_size": 2560},
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "tie_word_embeddings": False},
        "vision_config": {**_LARGE_TOWER, "out_hidden_size": 4096},
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "model_type": "qwen3_vl",
        "text_config": {**_QWEN3, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64}
        | {"num_attention_heads": 64, "tie_word_embeddings": False},
        "vision_config": {**_LARGE_TOWER, "out_hidden_size": 5120},
        "tie_word_embeddings": False,
    },
    "gemma3-4b": {
        "model_type": "gemma3",
        "text_config": {
            **{"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
            **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024},
        },
        "vision_config": {
            **{"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304},
            **{"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14},
            "vision_use_head": False,
        },
        "mm_tokens_per_image": 256,
    },
    **{
        f"internvl3-{name}": {
            "model_type": "internvl",
            "text_config": {"model_type": "qwen2", "vocab_size": words, "tie_word_embeddings": False}
            | dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), text))
            | dict(zip(("num_attention_heads", "num_key_value_heads"), heads)),
            "vision_config": {
                **{"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
                **{"num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14]},
                "attention_bias": True,
            },
            "tie_word_embeddings": False,
        }
        for name, words, text, heads in (
            ("1b", 151674, (896, 4864, 24), (14, 2)),
            ("2b", 151674, (1536, 8960, 28), (12, 2)),
            ("8b", 151674, (3584, 18944, 28), (28, 4)),
            ("14b", 151674, (5120, 13824, 48), (40, 8)),
        )
    },
}
"""config.json of published models, by --model-size."""


class Checkpoint(NamedTuple):
    """A published checkpoint."""

    path: str
    """On the Hub."""
    model_type: str
    size: str | None
    """Key of :data:`SIZES`; None if its dimensions are not known here."""
    licence: str
    is_gated: bool = False
    is_medical: bool = False


def size_of(path: str) -> str | None:
    """The key of :data:`SIZES` of a published checkpoint, None if it is not known."""
    return next((checkpoint.size for checkpoint in CHECKPOINTS if checkpoint.path == path), None)


_PAGE = "see its page"
CHECKPOINTS = (
    Checkpoint("google/medgemma-4b-it", "gemma3", "gemma3-4b", "HAI-DEF terms", is_gated=True, is_medical=True),
    Checkpoint("google/medgemma-1.5-4b-it", "gemma3", "gemma3-4b", "HAI-DEF terms", is_gated=True, is_medical=True),
    Checkpoint("lingshu-medical-mllm/Lingshu-7B", "qwen2_5_vl", "2.5-7b", "MIT", is_medical=True),
    Checkpoint("lingshu-medical-mllm/Lingshu-32B", "qwen2_5_vl", "2.5-32b", "MIT", is_medical=True),
    Checkpoint(
        "FreedomIntelligence/HuatuoGPT-Vision-7B-Qwen2.5VL", "qwen2_5_vl", "2.5-7b", "Apache-2.0", is_medical=True
    ),
    Checkpoint("JZPeterPan/MedVLM-R1", "qwen2_vl", "2b", _PAGE, is_medical=True),
    Checkpoint("yuxianglai117/Med-R1", "qwen2_vl", "2b", _PAGE, is_medical=True),
    Checkpoint("UCSC-VLAA/MedVLThinker-3B-RL_m23k", "qwen2_5_vl", "2.5-3b", _PAGE, is_medical=True),
    Checkpoint("UCSC-VLAA/MedVLThinker-7B-RL_m23k", "qwen2_5_vl", "2.5-7b", _PAGE, is_medical=True),
    Checkpoint("MBZUAI/MediX-R1-2B", "qwen3_vl", "qwen3-2b", _PAGE, is_medical=True),
    Checkpoint("MBZUAI/MediX-R1-8B", "qwen3_vl", "qwen3-8b", _PAGE, is_medical=True),
    Checkpoint("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl", "2b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", "7b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2_5_vl", "2.5-3b", "Qwen Research"),
    Checkpoint("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", "2.5-7b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen2.5-VL-32B-Instruct", "qwen2_5_vl", "2.5-32b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen2.5-VL-72B-Instruct", "qwen2_5_vl", "2.5-72b", "Qwen"),
    Checkpoint("Qwen/Qwen3-VL-2B-Instruct", "qwen3_vl", "qwen3-2b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", "qwen3-4b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl", "qwen3-8b", "Apache-2.0"),
    Checkpoint("Qwen/Qwen3-VL-32B-Instruct", "qwen3_vl", "qwen3-32b", "Apache-2.0"),
    Checkpoint("google/gemma-3-4b-it", "gemma3", "gemma3-4b", "Gemma terms", is_gated=True),
    Checkpoint("OpenGVLab/InternVL3-1B-hf", "internvl", "internvl3-1b", _PAGE),
    Checkpoint("OpenGVLab/InternVL3-2B-hf", "internvl", "internvl3-2b", _PAGE),
    Checkpoint("OpenGVLab/InternVL3-8B-hf", "internvl", "internvl3-8b", _PAGE),
    Checkpoint("OpenGVLab/InternVL3-14B-hf", "internvl", "internvl3-14b", _PAGE),
    Checkpoint("HuggingFaceTB/SmolVLM-Instruct", "idefics3", None, "Apache-2.0"),
)
"""Medical and general checkpoints; their names, licences and gates were not looked up."""
