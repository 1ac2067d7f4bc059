"""Slices of NIfTI volumes as RGB images. Needs the extra ``nifti`` (nibabel). Imports no torch."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvqa_rl.data.images.windowing import grey_levels, read_fragment, stretch, window

AXES = ("sagittal", "coronal", "axial")
"""Names of axes 0, 1 and 2 in canonical orientation: pointing right, anterior and superior."""

# Raised by nibabel on damaged files, besides its own ImageFileError and HeaderDataError.
_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


def decode_nifti(path: Path, fragment: str | None = None, *, max_pixels: int) -> Image.Image:
    """Decode one slice to RGB in radiological view: the patient's right on the left, anterior or superior at the top.

    From an uncompressed file only this slice is read. Values are scaled by the header, then windowed by the fragment
    or else stretched from the range of the slice. If pixels are not square, the coarser direction is enlarged.

    Args:
        path: the file.
        fragment: ``axis`` (0 sagittal, 1 coronal, 2 axial; default 2), ``slice`` (from the left, posterior or inferior
            end; default the middle), ``volume`` of a series (default the first) and ``window=CENTER,WIDTH``, joined
            by &.
        max_pixels: larger slices are rejected before they are read.

    Raises:
        ValueError: nibabel is not installed, or the file is damaged, too large, or has no such slice.
    """
    options = read_fragment(fragment, ("axis", "slice", "volume", "window"), path)
    image, errors = _open(path, max_pixels)
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import apply_orientation, io_orientation

    try:
        axis, volume = int(options.get("axis", (2,))[0]), int(options.get("volume", (0,))[0])
        if axis > 2:
            raise ValueError(f"there is no axis {axis}: 0 is sagittal, 1 coronal, 2 axial")
        volumes = int(np.prod(image.shape[3:], dtype=np.int64))
        if volume >= volumes:
            raise ValueError(f"it holds {volumes} volumes, so there is no volume {volume}: they count from 0")
        orientation = np.asarray(io_orientation(image.affine))  # type: ignore[no-untyped-call]
        if len(image.shape) < 3 or np.isnan(orientation).any():
            orientation = np.array([[0, 1], [1, 1], [2, 1]])
        order = orientation[:, 0].argsort()  # the axis in the file for each of AXES
        source = int(order[axis])
        count = int((*image.shape, 1)[source])
        number = int(options.get("slice", (count // 2,))[0])
        if number >= count:
            raise ValueError(f"it has {count} {AXES[axis]} slices, so there is no slice {number}: they count from 0")
        stored = number if orientation[source, 1] > 0 else count - 1 - number
        block = _read_slice(image, source, stored, volume)
        plane = np.asarray(apply_orientation(block, orientation)).take(0, axis)  # type: ignore[no-untyped-call]
        spacing = np.delete(voxel_sizes(image.affine)[order], axis)  # type: ignore[no-untyped-call]  # mm
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
    given = options.get("window")
    brightness = stretch(plane) if given is None else window(plane, given[0], given[1])
    picture = Image.fromarray(grey_levels(brightness.T[::-1, ::-1]))
    return _square(picture, spacing, max_pixels).convert("RGB")


def check_nifti(path: Path, *, max_pixels: int) -> None:
    """Read the header only.

    Raises:
        ValueError: as :func:`decode_nifti`, except for damage inside the data.
    """
    _open(path, max_pixels)


def _open(path: Path, max_pixels: int) -> tuple[Any, tuple[type[Exception], ...]]:
    """Open a file without reading its data; also returns the errors that a damaged file may raise."""
    try:
        import nibabel
        from nibabel.cifti2.cifti2 import Cifti2HeaderError
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError, SpatialImage
    except ImportError as error:
        raise ValueError(
            f"The image {path} is a NIfTI file, and nibabel is not installed: pip install 'medvqa-rl[nifti]'."
        ) from error
    errors = (*_ERRORS, ImageFileError, HeaderDataError, Cifti2HeaderError, ExpatError)
    try:
        image: Any = nibabel.load(path)
        dtype, shape = image.get_data_dtype(), image.shape
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(image, SpatialImage):  # the other class of nibabel with this suffix
        raise ValueError(
            f"The image {path} is a CIFTI-2 file, which holds values on brain surfaces and has no slices: name a "
            "NIfTI volume instead."
        )
    if dtype.fields is not None or dtype.kind == "c":
        raise ValueError(f"The image {path} holds colours or complex numbers: convert it to one number per voxel.")
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"The image {path} has the shape {tuple(shape)}, which has no slices: replace the file.")
    if int(np.prod(sorted(shape[:3])[-2:], dtype=np.int64)) > max_pixels:
        raise ValueError(
            f"The image {path} has the shape {tuple(shape)}, but slices of at most {max_pixels:,} pixels are read: "
            "store it at a lower resolution."
        )
    return image, errors


def _read_slice(image: Any, axis: int, number: int, volume: int) -> NDArray[np.float64]:
    """One scaled slice across an axis of the file, with 3 dimensions, of which ``axis`` has length 1."""
    if len(image.shape) < 3:
        values = np.asarray(image.dataobj, dtype=np.float64)[:, :, None]
        return values.take([number], axis)
    index: list[Any] = [slice(None)] * 3
    index[axis] = slice(number, number + 1)
    series = np.unravel_index(volume, image.shape[3:]) if len(image.shape) > 3 else ()
    return np.asarray(image.dataobj[(*index, *map(int, series))], dtype=np.float64)


def _square(picture: Image.Image, spacing: NDArray[Any], max_pixels: int) -> Image.Image:
    """Enlarge the direction with the larger spacing (columns, rows; mm) so that pixels are square."""
    if not (np.isfinite(spacing).all() and spacing.min() > 0) or spacing.max() / spacing.min() < 1.01:
        return picture
    width, height = (max(1, round(side * mm / spacing.min())) for side, mm in zip(picture.size, spacing.tolist()))
    if width * height > max_pixels:
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _unreadable(path: Path, error: Exception) -> str:
    details = " ".join(str(error).split()).rstrip(".") or "no details"
    return (
        f"The image {path} cannot be read as NIfTI ({type(error).__name__}: {details}): check the file and its name."
    )
