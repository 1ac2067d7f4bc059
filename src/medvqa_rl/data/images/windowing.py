"""Grey levels from the measured values of medical images, and fragments of file names. Imports no torch.

A file name may end in a fragment that selects what is shown: ``ct.dcm#frame=3&window=40,400`` or
``brain.nii.gz#axis=0&slice=40``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.text import shown

_VOLUME = re.compile(r"(.*\.(?:dcm|dicom|ima|nii)(?:\.gz)?)(?:#(.*))?", re.IGNORECASE | re.DOTALL)
# DICOM files often have no suffix, so a fragment is also recognised by its form.
_OTHER = re.compile(r"(.*)#((?:frame|window)=[^#]*)", re.DOTALL)


def split_fragment(name: str) -> tuple[str, str | None]:
    """Split a file name into name and fragment: anything after # of DICOM and NIfTI files, else only
    ``frame=...`` and ``window=...``.
    """
    match = _VOLUME.fullmatch(name) or _OTHER.fullmatch(name)
    return (match[1], match[2]) if match else (name, None)


def medical_kind(name: str) -> Literal["dicom", "nifti"] | None:
    """Medical format of a file by its suffix (.dcm, .dicom, .ima, .nii, also with .gz), or None for other names."""
    match = _VOLUME.fullmatch(name)
    if match is None:
        return None
    return "nifti" if match[1].lower().endswith((".nii", ".nii.gz")) else "dicom"


def read_fragment(fragment: str | None, allowed: Collection[str], path: Path) -> dict[str, tuple[float, ...]]:
    """Parse a fragment: ``window=40,400&frame=3`` is ``{"window": (40.0, 400.0), "frame": (3.0,)}``.

    Raises:
        ValueError: a name is not allowed or occurs twice, or its value is invalid: ``window`` takes a center and a
            positive width, all others a non-negative integer.
    """
    result: dict[str, tuple[float, ...]] = {}
    if not fragment:
        return result
    for part in fragment.split("&"):
        name, _, text = part.partition("=")
        try:
            values = tuple(float(value) for value in text.split(","))
        except ValueError:
            values = ()
        is_window = name == "window" and len(values) == 2 and np.isfinite(values).all() and values[1] > 0
        is_index = name != "window" and len(values) == 1 and values[0] >= 0 and values[0].is_integer()
        if name not in allowed or name in result or not (is_window or is_index):
            raise ValueError(
                f"The fragment #{fragment} after the image {path} is not understood at {shown(part)}: join any of "
                f"{', '.join(f'{each}=CENTER,WIDTH' if each == 'window' else f'{each}=NUMBER' for each in allowed)} "
                "by &, each once; the width is positive, and numbers count from 0."
            )
        result[name] = values
    return result


def window(values: NDArray[Any], center: float, width: float, function: str = "LINEAR") -> NDArray[np.float64]:
    """Apply a DICOM window.

    LINEAR is 0 up to c - 0.5 - (w-1)/2, 1 above c - 0.5 + (w-1)/2 and (x - (c-0.5))/(w-1) + 0.5 between; LINEAR_EXACT
    is (x-c)/w + 0.5, clipped; SIGMOID is 1 / (1 + exp(-4 (x-c)/w)). Source: DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3.

    Args:
        values: any shape, in the units of the window (after rescaling).
        center: c.
        width: w; at least 1 for LINEAR, above 0 for the others.
        function: LINEAR_EXACT or SIGMOID; everything else is LINEAR, the standard's default.

    Returns:
        Brightness in [0, 1], of the same shape.

    Raises:
        ValueError: the width is too small.
    """
    x = np.asarray(values, dtype=np.float64)
    is_linear = function not in ("LINEAR_EXACT", "SIGMOID")
    if width < 1 if is_linear else width <= 0:
        allowed = "at least 1 for a LINEAR" if is_linear else f"above 0 for a {function}"
        raise ValueError(f"The window's width is {width:g}, but must be {allowed} window: choose another width.")
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - center) / width, -700.0, 700.0))))
    if function == "LINEAR_EXACT":
        return np.asarray(np.clip((x - center) / width + 0.5, 0.0, 1.0))
    if width == 1:
        return np.asarray(x > center - 0.5, dtype=np.float64)
    return np.asarray(np.clip((x - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0))


def stretch(values: NDArray[Any], is_valid: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Stretch values linearly from their range to [0, 1]; a constant becomes 0.

    Args:
        values: any shape; non-finite values count as 0.
        is_valid: the same shape; False marks padding, which is excluded from the range and clipped to it.
    """
    x = np.asarray(values, dtype=np.float64)
    x = np.where(np.isfinite(x), x, 0.0)
    inside = x if is_valid is None or not is_valid.any() else x[is_valid]
    low, high = (float(inside.min()), float(inside.max())) if inside.size else (0.0, 0.0)
    return np.clip((x - low) / (high - low), 0.0, 1.0) if high > low else np.zeros_like(x)


def grey_levels(brightness: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Brightness in [0, 1] as 8-bit grey levels."""
    return np.asarray(np.rint(brightness * 255.0), dtype=np.uint8)
