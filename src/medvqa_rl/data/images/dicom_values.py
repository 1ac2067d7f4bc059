"""What the stored values of a DICOM frame mean: units, windows, palettes. Needs pydicom. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.data.images.windowing import grey_levels, stretch, window

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Elements that a functional group replaces in whole.
_REPLACED = {
    "PixelValueTransformationSequence": ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    "FrameVOILUTSequence": ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    "RealWorldValueMappingSequence": ("RealWorldValueMappingSequence",),
}


def merge_functional_groups(data: Dataset, frame: int) -> None:
    """Move rescale, window and real-world values of one frame from an enhanced object's functional groups to the top.

    Per-frame groups override shared ones, which override elements of the top level. Source: DICOM PS3.3 C.7.6.16.

    Raises:
        RuntimeError: the file has per-frame groups, but none for this frame.
    """
    shared, per_frame = data.get("SharedFunctionalGroupsSequence"), data.get("PerFrameFunctionalGroupsSequence")
    if per_frame and frame >= len(per_frame):
        raise RuntimeError(f"it has functional groups for {len(per_frame)} frames only, so none for frame {frame}")
    groups = [*([per_frame[frame]] if per_frame else []), *(shared or [])]
    for name, replaced in _REPLACED.items():
        found = next((group[name].value for group in groups if group.get(name)), None)
        if found is None:
            continue
        for element in replaced:
            if element in data:
                del data[element]
        if name == "RealWorldValueMappingSequence":
            data.RealWorldValueMappingSequence = found
        else:
            data.update(found[0])


def brightness(stored: NDArray[Any], data: Dataset, given: tuple[float, ...] | None) -> NDArray[np.float64]:
    """Brightness in [0, 1] of a greyscale frame, before the inversion of MONOCHROME1.

    The file's first VOI LUT or window applies to values after its rescale or modality LUT, never to real-world
    values (DICOM PS3.3 C.7.6.16.2.11). A given window applies to rescaled values too, or to real-world values if the
    file has no rescale.

    Args:
        stored: pixel values as stored.
        data: the file's elements, with functional groups merged.
        given: center and width of a window that overrides the file's.
    """
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, data)
    if given is not None:
        has_rescale = data.get("ModalityLUTSequence") or "RescaleSlope" in data
        return window(values if has_rescale else _real_world(stored, data), given[0], given[1])
    if data.get("VOILUTSequence"):
        table = data.VOILUTSequence[0]
        return np.asarray(apply_voi(values, data) / float(2 ** int(table.LUTDescriptor[2]) - 1))
    center, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    if center is not None and width is not None:
        return window(values, center, width, str(data.get("VOILUTFunction") or "LINEAR").upper())
    padding = data.get("PixelPaddingValue")
    return stretch(values, None if padding is None else np.asarray(stored) != int(padding))


def colours(pixels: NDArray[Any], data: Dataset) -> NDArray[np.uint8]:
    """RGB levels of a colour frame: a palette is applied, and full range is that of its entries or of stored bits."""
    from pydicom.pixels.processing import apply_color_lut

    bits = int(data.BitsStored)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, data)[..., :3]  # the fourth is opacity
        bits = int(data.RedPaletteColorLookupTableDescriptor[2])
    if bits == 8:
        return np.asarray(pixels, dtype=np.uint8)
    return grey_levels(np.clip(pixels / float(2**bits - 1), 0.0, 1.0))


def _real_world(stored: NDArray[Any], data: Dataset) -> NDArray[Any]:
    """Values by the first real-world value mapping, linear or by table; stored values if there is none."""
    mappings = data.get("RealWorldValueMappingSequence")
    if not mappings:
        return stored
    mapping = mappings[0]
    if table := mapping.get("RealWorldValueLUTData"):
        first = int(mapping.RealWorldValueFirstValueMapped)
        index = np.clip(np.asarray(stored, dtype=np.int64) - first, 0, len(table) - 1)
        return np.asarray(table, dtype=np.float64)[index]
    return np.asarray(stored * float(mapping.RealWorldValueSlope) + float(mapping.RealWorldValueIntercept))


def _first(value: Any) -> float | None:
    """The first value of an element, or None if it is absent or empty."""
    if isinstance(value, Sequence):
        value = value[0] if value else None
    return None if value is None else float(value)
