"""LoRA on 4-bit base weights, as in QLoRA (arXiv 2305.14314), with bitsandbytes.

The linear layers of the language model are stored in NF4 with double quantization: 16 levels, a scale per 64 weights,
and 8-bit scales. Weights are dequantized to the model's dtype in every forward and backward pass. Embedding, output
layer, vision tower and projector are not quantized. PEFT's ``prepare_model_for_kbit_training`` is not called: it would
convert all of these to float32, and make inputs require gradients for reentrant checkpointing, which is not used here.

Tested on a CPU against the dequantized weights. Not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from medvqa_rl.models.families.family import Family

BLOCK = 64
"""Weights per scale."""


def loading_arguments(
    folder: Path, config: Any, family: Family, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments that make ``from_pretrained`` quantize weights while it loads them.

    Args:
        folder: of the model.
        config: its transformers configuration.
        family: of the model.
        dtype: of dequantized weights, and of everything else.
        device: to load to.

    Raises:
        ValueError: bitsandbytes is not installed or does not support the device, or the width of a layer is not a
            multiple of 64.
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
        llm_int8_skip_modules=[*(f"model.{name}" for name in family.vision), "lm_head"],
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _check_backend(device: torch.device) -> None:
    """Quantize and dequantize one block.

    Raises:
        ValueError: bitsandbytes is not installed, or does not support this device.
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
    except (RuntimeError, AttributeError) as error:  # no kernel for the device, or no library for the driver
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model.load_in_4bit is true, but bitsandbytes cannot compute on this {device.type} device ({reason}): "
            "run `python -m bitsandbytes` for details, set model.load_in_4bit to false, or change model.device."
        ) from error
    assert works, "bitsandbytes does not reproduce the weights"


def use_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights for a special kernel on CPUs with AVX512-BF16.

    It would do so at the first forward in evaluation mode, permanently: from then on products are rounded to bfloat16
    regardless of the dtype and have no gradients. Does nothing on a GPU.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def refuse_stored(folder: Path, config: Any) -> None:
    """Refuse a checkpoint that was saved quantized.

    Adapters are merged into full-precision weights, and other quantization schemes are not tested.

    Raises:
        ValueError: the weights were saved quantized.
    """
    stored = config.to_dict().get("quantization_config")
    if stored is not None:
        kind = stored.get("quant_method", "an unknown method")
        raise ValueError(
            f"The weights in {folder} were stored quantized ({kind}), but an adapter is merged into weights in full "
            "precision: give the original checkpoint, and set model.load_in_4bit to true to keep it in 4 bits in "
            "memory."
        )
