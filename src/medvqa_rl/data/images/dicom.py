"""Frames of DICOM files as RGB images. Needs the extra ``dicom`` (pydicom). Imports no torch.

Only pixels are used; patient names and other metadata are never returned or logged.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

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
    zlib.error,
)

# The first elements of files without a preamble, little endian: group 0002 or 0008 and a low element number.
_FIRST_ELEMENTS = tuple(bytes((group, 0, element, 0)) for group in (2, 8) for element in (0, 1, 5, 8, 0x12, 0x16))


def looks_like_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without preamble, or does so after gzip decompression."""
    try:
        with _open(path) as file:
            start = file.read(132)
    except _ERRORS:
        return False
    return start[128:] == b"DICM" or start.startswith(_FIRST_ELEMENTS)


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
        from pydicom.errors import BytesLengthException
    except ImportError as error:
        raise ValueError(
            f"The image {path} is a DICOM file, and pydicom is not installed: pip install 'medvqa-rl[dicom]'."
        ) from error
    errors = (*_ERRORS, BytesLengthException)
    try:
        with _open(path) as file:
            # Forced, because the preamble may be missing.
            data = dcmread(file, stop_before_pixels=stop_before_pixels, force=True)
        kind = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
        is_image = all(name in data for name in ("Rows", "Columns", "PhotometricInterpretation"))
        if not is_image and kind is None:
            raise RuntimeError("it has no DICOM header")
        rows, columns = (int(data.Rows), int(data.Columns)) if is_image else (0, 0)
        problem = _no_decoder(data) if is_image else _without_pixels(kind)
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
    if problem:
        raise ValueError(f"The file {path} {problem}")
    if rows * columns > max_pixels:
        raise ValueError(
            f"The image {path} has {columns} x {rows} pixels, but at most {max_pixels:,} are decoded: "
            "store it at a lower resolution."
        )
    return data, errors


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file, through gzip if it is compressed as a whole (``.dcm.gz``)."""
    file = path.open("rb")
    if file.read(2) == b"\x1f\x8b":
        file.close()
        return gzip.open(path)
    file.seek(0)
    return file


def _without_pixels(kind: Any) -> str:
    from pydicom.uid import UID

    # Only names of the standard: other values may be patient data.
    name = UID(kind).name  # the value itself if it is not in the standard
    name = "of an unknown kind" if name == kind else name.removesuffix(" Storage")
    return f"is a DICOM object without pixels ({name}): remove its rows, or name a file with an image."


def _no_decoder(data: Dataset) -> str | None:
    """Set the transfer syntax of a file without a header; return what is missing to decode its pixels, if anything."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGExtended12Bit

    if "TransferSyntaxUID" not in data.file_meta:
        is_implicit, is_little = data.original_encoding
        explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_transfer_syntax or syntax.is_private or not syntax.is_compressed or syntax.is_deflated:
        return None
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return f"is compressed as {syntax.name}, which pydicom does not decode: convert its frames to PNG."
    if syntax == JPEGExtended12Bit and int(data.BitsStored) > 8 and "pylibjpeg" not in decoder.available_plugins:
        return (
            f"is compressed as {syntax.name} with {data.BitsStored} bits, which only pylibjpeg-libjpeg (GPL) decodes: "
            "pip install pylibjpeg pylibjpeg-libjpeg."
        )
    if not decoder.is_available:
        return (
            f"is compressed as {syntax.name}, and no decoder of it is installed: pip install "
            "'medvqa-rl[dicom-compressed]'."
        )
    return None


def _unreadable(path: Path, error: Exception) -> str:
    # Other errors quote values from the file, which may be patient data.
    details = f": {' '.join(str(error).split()).rstrip('.')}" if isinstance(error, (RuntimeError, OSError)) else ""
    return (
        f"The image {path} cannot be decoded as DICOM ({type(error).__name__}{details}): replace the file, or "
        "convert it to PNG."
    )
