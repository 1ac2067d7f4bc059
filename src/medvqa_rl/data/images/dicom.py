"""Frames of DICOM files as RGB images. Needs the extra ``dicom`` (pydicom). Imports no torch.

Only pixels are used; patient names and other metadata are never returned or logged.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from medvqa_rl.data.images.dicom_values import brightness, colours, merge_functional_groups
from medvqa_rl.data.images.windowing import grey_levels, read_fragment

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# Raised by pydicom and its decoders on damaged files.
_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
)


def decode_dicom(path: Path, fragment: str | None = None, *, max_pixels: int) -> Image.Image:
    """Decode one frame to RGB.

    Greyscale frames are rescaled to physical units (RescaleSlope and RescaleIntercept, or the modality LUT), then
    windowed: by the fragment's ``window=CENTER,WIDTH``, by the file's first VOI LUT or window, or else stretched from
    the frame's range without padding. In enhanced (multi-frame) objects each frame has its own rescale and window.
    MONOCHROME1 is inverted, so that larger values are darker. Palette and YBR colours are converted to RGB.

    Args:
        path: the file.
        fragment: ``frame=NUMBER`` (from 0; default 0) and ``window=CENTER,WIDTH``, joined by &.
        max_pixels: larger frames are rejected before they are decoded.

    Raises:
        ValueError: pydicom is not installed, or the file is damaged, too large, or holds no such frame.
    """
    options = read_fragment(fragment, ("frame", "window"), path)
    data, errors = _read(path, max_pixels)
    from pydicom.pixels.utils import pixel_array

    frame = int(options.get("frame", (0,))[0])
    try:
        frames = int(data.get("NumberOfFrames") or 1)
        if frame >= frames:
            raise RuntimeError(f"it has {frames} frames, so there is no frame {frame}: they count from 0")
        merge_functional_groups(data, frame)
        pixels = pixel_array(data, index=frame)
        photometric = data.PhotometricInterpretation
        if data.SamplesPerPixel > 1 or photometric == "PALETTE COLOR":
            return Image.fromarray(colours(pixels, data))
        light = brightness(pixels, data, options.get("window"))
        levels = grey_levels(1.0 - light if photometric == "MONOCHROME1" else light)
        return Image.fromarray(levels).convert("RGB")
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error


def check_dicom(path: Path, *, max_pixels: int) -> None:
    """Read the header only.

    Raises:
        ValueError: as :func:`decode_dicom`, except for damage inside the pixel data.
    """
    _read(path, max_pixels, stop_before_pixels=True)


def _read(
    path: Path, max_pixels: int, *, stop_before_pixels: bool = False
) -> tuple[Dataset, tuple[type[Exception], ...]]:
    """Read a file; also returns the errors that a damaged one may still raise when its elements are used."""
    try:
        from pydicom import dcmread
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ValueError(
            f"The image {path} is a DICOM file, and pydicom is not installed: pip install 'medvqa-rl[dicom]'."
        ) from error
    errors = (*_ERRORS, BytesLengthException, InvalidDicomError)
    try:
        data = dcmread(path, stop_before_pixels=stop_before_pixels)
        rows, columns = int(data.Rows), int(data.Columns)
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
    if rows * columns > max_pixels:
        raise ValueError(
            f"The image {path} has {columns} x {rows} pixels, but at most {max_pixels:,} are decoded: "
            "store it at a lower resolution."
        )
    return data, errors


def _unreadable(path: Path, error: Exception) -> str:
    # Other errors quote values from the file, which may be patient data.
    details = f": {' '.join(str(error).split()).rstrip('.')}" if isinstance(error, (RuntimeError, OSError)) else ""
    return (
        f"The image {path} cannot be decoded as DICOM ({type(error).__name__}{details}): replace the file, or "
        "convert it to PNG; compressed ones may need a decoder such as pylibjpeg."
    )
