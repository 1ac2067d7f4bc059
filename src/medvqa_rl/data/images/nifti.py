"""Slices of NIfTI volumes as RGB images. Needs the extra ``nifti`` (nibabel). No torch."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvqa_rl.data.images.windowing import grey_levels, read_fragment, stretch, window

AXES = ("sagittal", "coronal", "axial")
"""Names of the axes 0, 1, 2 of a volume whose axes point right, anterior and superior."""

# What nibabel raises on damaged files, besides its own ImageFileError and HeaderDataError.
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
    """One slice as RGB, in the radiological view: the patient's right on the left, anterior or superior at the top.

    Only this slice is read from an uncompressed file. Values are scaled as the header says, then windowed by the
    fragment, or stretched from the slice's own range. Where voxels are not square, the coarser side is enlarged.

    Args:
        path: the file.
        fragment: ``axis`` (0 sagittal, 1 coronal, 2 axial, the default), ``slice`` (counted from the left, posterior
            or inferior end; else the middle), ``volume`` of a series (else the first) and ``window=CENTER,WIDTH``,
            joined by &.
        max_pixels: larger slices are refused before they are read.

    Raises:
        ValueError: nibabel is not installed, or the file is damaged, too large, or has no such slice.
    """
    options = read_fragment(fragment, ("axis", "slice", "volume", "window"), path)
    image, errors = _open(path, max_pixels)
    from nibabel.orientations import io_orientation

    try:
        axis, volume = int(options.get("axis", (2,))[0]), int(options.get("volume", (0,))[0])
        if axis > 2:
            raise ValueError(f"there is no axis {axis}: 0 is sagittal, 1 coronal, 2 axial")
        shape = (*image.shape, 1, 1)[:3] if len(image.shape) < 3 else image.shape[:3]
        volumes = int(np.prod(image.shape[3:], dtype=np.int64))
        if volume >= volumes:
            raise ValueError(f"it holds {volumes} volumes, so there is no volume {volume}: they count from 0")
        orientation = np.asarray(io_orientation(image.affine))  # type: ignore[no-untyped-call]
        if len(image.shape) < 3 or np.isnan(orientation).any():
            orientation = np.array([[0, 1], [1, 1], [2, 1]])
        source = int(np.flatnonzero(orientation[:, 0] == axis)[0])  # the file's axis across the slice
        count = int(shape[source])
        place = int(options.get("slice", (count // 2,))[0])
        if place >= count:
            raise ValueError(f"it has {count} {AXES[axis]} slices, so there is no slice {place}: they count from 0")
        inside = place if orientation[source, 1] > 0 else count - 1 - place
        plane = _plane(image, source, inside, volume)
        kept = [each for each in range(3) if each != source]
        for number, each in enumerate(kept):
            if orientation[each, 1] < 0:
                plane = np.flip(plane, number)
        if orientation[kept[0], 0] > orientation[kept[1], 0]:
            plane, kept = plane.T, kept[::-1]
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
    given = options.get("window")
    shares = stretch(plane) if given is None else window(plane, given[0], given[1])
    picture = Image.fromarray(grey_levels(shares.T[::-1, ::-1]))
    spacing = np.sqrt((np.asarray(image.affine)[:3, :3] ** 2).sum(axis=0))[kept]  # mm, columns then rows
    return _square(picture, spacing, max_pixels).convert("RGB")


def check_nifti(path: Path, *, max_pixels: int) -> None:
    """Read the header only.

    Raises:
        ValueError: as :func:`decode_nifti`, except for damage inside the data.
    """
    _open(path, max_pixels)


def _open(path: Path, max_pixels: int) -> tuple[Any, tuple[type[Exception], ...]]:
    """The volume, its data unread, and the errors that a damaged file may raise."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
    except ImportError as error:
        raise ValueError(
            f"The image {path} is a NIfTI file, and nibabel is not installed: pip install 'medvqa-rl[nifti]'."
        ) from error
    errors = (*_ERRORS, ImageFileError, HeaderDataError)
    try:
        image: Any = nibabel.load(path)
        dtype, shape = image.get_data_dtype(), image.shape
    except errors as error:
        raise ValueError(_unreadable(path, error)) from error
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


def _plane(image: Any, axis: int, place: int, volume: int) -> NDArray[np.float64]:
    """One slice across an axis of the file, as the header scales it."""
    if len(image.shape) < 3:
        return np.asarray(image.dataobj, dtype=np.float64)
    series = np.unravel_index(volume, image.shape[3:]) if len(image.shape) > 3 else ()
    index = tuple(place if each == axis else slice(None) for each in range(3))
    return np.asarray(image.dataobj[(*index, *(int(each) for each in series))], dtype=np.float64)


def _square(picture: Image.Image, spacing: NDArray[Any], max_pixels: int) -> Image.Image:
    """Enlarge the side with the coarser voxels, so that a millimetre is as long in both directions."""
    if not (np.isfinite(spacing).all() and spacing.min() > 0) or spacing.max() / spacing.min() < 1.01:
        return picture
    width, height = (max(1, round(side * each / spacing.min())) for side, each in zip(picture.size, spacing.tolist()))
    if width * height > max_pixels:
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _unreadable(path: Path, error: Exception) -> str:
    details = " ".join(str(error).split()).rstrip(".") or "no details"
    return (
        f"The image {path} cannot be read as NIfTI ({type(error).__name__}: {details}): check the file and its name."
    )
