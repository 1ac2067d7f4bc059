"""Models with random weights, made on this machine: nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.common import Workload
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import resolve_folder
from medvqa_rl.models.processor import Processor

PHANTOM = "phantom:instruct"

MODELS: Mapping[str, Mapping[str, Any]] = {
    # Qwen2-VL-2B's published config.json: 2.2 billion parameters, of which 0.67 billion are the vision tower.
    "qwen2-vl-2b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "mrope_section": [16, 24, 24],
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    },
    # All depths and widths divided by four, half the head size, and a vocabulary of 4,096.
    "quarter": {
        "vocab_size": 4096,
        "hidden_size": 384,
        "intermediate_size": 2240,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "mrope_section": [8, 12, 12],
        "vision": {"depth": 8, "embed_dim": 320, "num_heads": 5, "mlp_ratio": 4},
    },
    # For tests; widths that 4-bit weights can have.
    "tiny": {
        "vocab_size": 640,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "vision": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2},
    },
}


def model_config(name: str, processor: Processor) -> Qwen2VLConfig:
    """Build the config for a key of MODELS, with the special tokens of a tokenizer.

    Raises:
        ValueError: the tokenizer has more tokens than the model's vocabulary.
    """
    sizes = MODELS[name]
    tokenizer = processor.tokenizer
    if len(tokenizer) > sizes["vocab_size"]:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but the vocabulary of {name!r} holds {sizes['vocab_size']}: "
            "choose a smaller tokenizer, or omit --tokenizer."
        )
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
        )
    }
    text = {key: value for key, value in sizes.items() if key not in ("vision", "rope_theta", "mrope_section")}
    return Qwen2VLConfig(
        text_config={
            **text,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": sizes["rope_theta"],
                "mrope_section": sizes["mrope_section"],
            },
            "bos_token_id": None,
            "eos_token_id": processor.eos_id,
            "pad_token_id": processor.pad_id,
            "tie_word_embeddings": True,
        },
        vision_config={
            **sizes["vision"],
            "hidden_size": sizes["hidden_size"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        tie_word_embeddings=True,
        **ids,
    )


def prepare_model(workload: Workload, folder: Path, tokenizer: Path | None = None) -> Path:
    """Return the folder of the workload's model. A model with random weights is written first.

    Args:
        folder: where random weights are written: each model in a subfolder, which a later call uses again.
        tokenizer: folder with the tokenizer and image settings of a Qwen2-VL checkpoint; None uses the embedded ones.
    """
    if workload.model not in MODELS:
        return resolve_folder(workload.model)
    target = folder / f"{workload.model}-{workload.dtype}"
    if target.is_dir():
        return target
    processor = Processor.from_folder(resolve_folder(PHANTOM) if tokenizer is None else tokenizer, Qwen2VL())
    config = model_config(workload.model, processor)
    dtype, before = getattr(torch, workload.dtype), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    unfinished = target.with_name(f"{target.name}.unfinished")
    model.save_pretrained(unfinished)
    processor.save(unfinished)
    unfinished.rename(target)
    return target


@contextmanager
def prepared(workload: Workload, tokenizer: Path | None = None, models: Path | None = None) -> Iterator[Path]:
    """The folder of the workload's model during the block, for :func:`prepare_model`.

    Args:
        models: keeps models with random weights for other benchmarks; None removes them at the end.
    """
    if models is not None:
        models.mkdir(parents=True, exist_ok=True)
        yield prepare_model(workload, models, tokenizer)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield prepare_model(workload, Path(scratch), tokenizer)
