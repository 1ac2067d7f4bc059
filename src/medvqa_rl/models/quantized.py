"""Base weights in 4 bits below an adapter, as QLoRA keeps them (arXiv 2305.14314), by bitsandbytes.

The linear layers of the language model are stored in NF4: 16 levels, a constant for every 64 weights, and these
constants in 8 bits again. A layer's weights are written out in the model's type whenever it is used, forward and
backward, so that all else is as with ordinary weights. Embedding, output layer, tower and projector keep their type.
PEFT's ``prepare_model_for_kbit_training`` is not called: it would turn all of these into float32, which takes memory,
and have inputs require gradients for a kind of checkpointing that is not used here.

Tested on a CPU against the same weights written out. Not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

BLOCK = 64
"""Weights that share a constant."""

KEPT = ("model.visual", "lm_head")
"""Modules of ``...ForConditionalGeneration`` whose linear layers are not quantized."""


def loading_arguments(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What makes ``from_pretrained`` quantize each weight as it is read.

    Args:
        config: transformers' configuration of the model in the folder.
        dtype: that weights are written out in, and that everything else has.

    Raises:
        ValueError: bitsandbytes is not installed or cannot compute on the device, or a layer is no whole number of
            blocks wide.
    """
    _check_backend(device)
    widths = {name: getattr(config.text_config, name) for name in ("hidden_size", "intermediate_size")}
    odd = [f"{name} {width}" for name, width in widths.items() if width % BLOCK]
    if odd:
        raise ValueError(
            f"model.load_in_4bit is true, but the model in {folder} has {' and '.join(odd)}, and weights in 4 bits "
            f"come in blocks of {BLOCK}: set model.load_in_4bit to false for this model."
        )
    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(KEPT),
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _check_backend(device: torch.device) -> None:
    """Quantize one block and write it out again.

    Raises:
        ValueError: bitsandbytes is not installed, or has no code for this device.
    """
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError as error:
        raise ValueError(
            f"model.load_in_4bit is true, but bitsandbytes cannot be imported ({error}): install it with "
            "`pip install 'medvqa-rl[quantize]'`, or set model.load_in_4bit to false."
        ) from error
    try:
        codes, state = quantize_4bit(torch.ones(1, BLOCK, device=device), quant_type="nf4")
        works = bool((dequantize_4bit(codes, state) == 1).all())
    except (RuntimeError, AttributeError) as error:  # no kernel for the device, or no library for its driver
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model.load_in_4bit is true, but bitsandbytes cannot compute on this {device.type} device ({reason}): "
            "`python -m bitsandbytes` says what it found; set model.load_in_4bit to false, or model.device to another."
        ) from error
    assert works, "bitsandbytes does not give back the weights that it was given"


def use_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for a kernel of its own on CPUs with AVX512-BF16.

    It does so at the first pass in evaluation mode and does not go back: from then on products are rounded to bfloat16
    whatever the type is, and have no gradients. On a GPU nothing changes.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_stored(folder: Path, config: Any) -> None:
    """Refuse a checkpoint whose weights were quantized before they were saved.

    Adapters are merged into whole weights, and other schemes and modules than those above were not tested.

    Raises:
        ValueError: it is one.
    """
    stored = config.to_dict().get("quantization_config")
    if stored is not None:
        kind = stored.get("quant_method", "an unknown method")
        raise ValueError(
            f"The weights in {folder} were stored quantized ({kind}), but an adapter is merged into weights in full "
            "precision: give the original checkpoint, and set model.load_in_4bit to true to keep it in 4 bits in "
            "memory."
        )
