"""Which dtype a model is loaded in. Imports no torch."""

from __future__ import annotations


def uses_bfloat16(dtype: str, device_type: str) -> bool:
    """True for bfloat16, False for float32: ``auto`` is bfloat16 on a GPU and float32 on a CPU.

    Args:
        dtype: auto, float32 or bfloat16.
        device_type: cpu or cuda.
    """
    return dtype == "bfloat16" or (dtype == "auto" and device_type == "cuda")
