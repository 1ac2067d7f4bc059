"""Image files, decoded lazily and safely: any file becomes an RGB image or a ValueError. Imports no torch.

DICOM (.dcm, .dicom, .ima, or any other name) and NIfTI (.nii, .nii.gz) need their extras; a fragment after the name
selects frame, slice and window (:mod:`medvqa_rl.data.images.windowing`).
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from medvqa_rl.core.text import printable
from medvqa_rl.data.images.windowing import grey_levels, medical_kind, split_fragment, stretch

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
"""Formats that are decoded. Others are rejected, above all EPS, which Pillow passes to a PostScript interpreter."""

MAX_PIXELS = 80_000_000
"""Larger images are rejected before they are decoded; 80 megapixels take 240 MB as RGB."""

# Raised by Pillow's decoders on damaged files, as fuzzing shows.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB that holds nothing but pixels.

    Applies the EXIF orientation, composites transparency over white, takes the current frame of an animation, and
    stretches grey values of more than 8 bits linearly from the image's range to 0 to 255 (medical images often use
    12 of 16 bits, and clipping would blank them). EXIF, comments, XMP, ICC profiles and texts are dropped: they name
    patients, and Pillow writes some of them into every file it saves.
    """
    rgb = _as_rgb(ImageOps.exif_transpose(image))  # always a copy
    rgb.info = {}
    return rgb


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(grey_levels(stretch(np.asarray(image)))).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # avoids another copy


def shrink(image: Image.Image, max_pixels: int) -> Image.Image:
    """Downscale an image to at most max_pixels, keeping its aspect ratio; smaller images are returned unchanged.

    Each side is multiplied by sqrt(max_pixels / area) and rounded down, to at least 1. A strip whose short side is
    already 1 is shortened instead.

    Raises:
        ValueError: max_pixels is not positive.
    """
    if max_pixels < 1:
        raise ValueError(f"An image cannot be downscaled to {max_pixels} pixels: max_pixels must be at least 1.")
    width, height = image.size
    if width * height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (width * height))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    width, height = min(width, max_pixels // height) or 1, min(height, max_pixels // width) or 1
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _open(path: Path) -> Image.Image:
    """Open an image and check its header.

    Raises:
        ValueError: the file is missing, not an image of a known format, or too large.
    """
    _must_exist(path)
    try:
        image = Image.open(path, formats=FORMATS)
    except _DECODE_ERRORS as error:
        raise ValueError(_unreadable(path, error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"The image {path} has {width} x {height} pixels, but at most {MAX_PIXELS:,} are decoded: "
            "store it at a lower resolution."
        )
    return image


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image in memory to RGB (:func:`to_rgb`).

    Raises:
        ValueError: it is not an image of :data:`FORMATS`, damaged or too large; continues "the image".
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"has {image.width} x {image.height} pixels, but at most {max_pixels:,} are decoded")
            image.seek(0)
            return to_rgb(image)
    except _DECODE_ERRORS as error:
        if str(error).startswith("has "):
            raise
        raise ValueError(f"cannot be decoded as one of {', '.join(FORMATS)} ({type(error).__name__})") from error


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"The image {printable(str(path), 400)} does not exist: check the data folder, or remove its rows."
        )


def _unreadable(path: Path, error: BaseException) -> str:
    return (
        f"The image {printable(str(path), 400)} cannot be decoded ({type(error).__name__}: "
        f"{printable(str(error)).rstrip('.') or 'no details'}): "
        f"replace the file, or convert it to one of {', '.join(FORMATS)}."
    )


def hidden(name: str) -> str:
    """The hash that stands for the name of a sample or an image with ``data.hide_names``."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class FileImage:
    """An image file of a data set; ``path`` is relative to ``root``, the data set's folder.

    DICOM and NIfTI paths may end in a fragment (``ct.dcm#window=40,400``). It is part of the key: another slice is
    another image.
    """

    path: str
    root: Path
    is_hidden: bool = False
    """Whether the key and messages hide the name (``data.hide_names``)."""

    @property
    def key(self) -> str:
        """The relative path, which is the same on every machine, or its hash."""
        return hidden(self.path) if self.is_hidden else self.path

    @property
    def file(self) -> Path:
        """Path of the file, without a fragment."""
        return self.root / split_fragment(self.path)[0]

    def load(self) -> Image.Image:
        """Decode the first frame to RGB (:func:`to_rgb`).

        Raises:
            ValueError: the file is missing, damaged, truncated, too large or not an image, or its format needs an
                extra that is not installed. The message names the file.
        """
        if not self.is_hidden:
            return self._load()
        try:
            return self._load()
        except ValueError:
            raise ValueError(
                f"The image {self.key} cannot be read. data.hide_names hides its name: `medvqa-rl data check` with "
                "data.hide_names=false gives it, and the reason."
            ) from None

    def _load(self) -> Image.Image:
        path = self.file
        image = self._open()
        if image == "dicom":
            from medvqa_rl.data.images.dicom import decode_dicom

            return decode_dicom(path, split_fragment(self.path)[1], max_pixels=MAX_PIXELS)
        if image == "nifti":
            from medvqa_rl.data.images.nifti import decode_nifti

            return decode_nifti(path, split_fragment(self.path)[1], max_pixels=MAX_PIXELS)
        try:
            with image:
                image.seek(0)
                return to_rgb(image)
        except _DECODE_ERRORS as error:
            raise ValueError(_unreadable(path, error)) from error

    def check(self) -> None:
        """Check the header only, which finds missing and empty files and files that are not images.

        Raises:
            ValueError: as :meth:`load`, except for damaged pixel data.
        """
        image = self._open()
        if image == "dicom":
            from medvqa_rl.data.images.dicom import check_dicom

            check_dicom(self.file, max_pixels=MAX_PIXELS)
        elif image == "nifti":
            from medvqa_rl.data.images.nifti import check_nifti

            check_nifti(self.file, max_pixels=MAX_PIXELS)
        else:
            image.close()

    def _open(self) -> Image.Image | Literal["dicom", "nifti"]:
        """Open an ordinary image, or name the medical format: by the suffix, or DICOM by the content.

        Raises:
            ValueError: the file is missing, of no known format, or too large, or has a fragment but is no DICOM file.
        """
        path, fragment = self.file, split_fragment(self.path)[1]
        if kind := medical_kind(self.path):
            _must_exist(path)
            return kind
        try:
            image = _open(path)
        except ValueError:
            from medvqa_rl.data.images.dicom import looks_like_dicom

            if looks_like_dicom(path):
                return "dicom"
            raise
        if fragment is not None:
            image.close()
            raise ValueError(f"The image {path} is not DICOM, so remove the fragment #{fragment} after its name.")
        return image

    def header_pixels(self) -> int | None:
        """Width times height from the header, without decoding; None for DICOM, NIfTI and unreadable files.

        The header of a file is read once per process, however many questions are about it, until the file changes.
        """
        if medical_kind(self.path):
            return None
        try:
            return _header_pixels(self.file, self.file.stat().st_mtime_ns)
        except (OSError, ValueError):
            return None


@lru_cache(maxsize=2**18)
def _header_pixels(path: Path, changed: int) -> int:
    """Width times height from the header of a file that was last changed at this time."""
    with _open(path) as image:
        return image.width * image.height


def shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """An image with at most this many pixels, of the same proportions; itself if it is small enough."""
    share = (max_pixels / (image.width * image.height)) ** 0.5
    if share >= 1:
        return image
    return image.resize(
        (max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.BICUBIC
    )


@dataclass(frozen=True)
class MemoryImage:
    """An image in memory."""

    key: str
    image: Image.Image

    def load(self) -> Image.Image:
        """The image as RGB."""
        return to_rgb(self.image)

    def header_pixels(self) -> int:
        """Width times height."""
        return self.image.width * self.image.height
