"""Images on disk, decoded only when asked for and safely: any file becomes an RGB image or a clear error. No torch."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
"""What is decoded. Others are refused, EPS above all: Pillow would hand it to an interpreter of PostScript."""

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded; 80 megapixels take 240 MB as RGB."""

# What Pillow's decoders raise on damaged files, as fuzzing shows; none of it may pass for an error of ours.
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
    """An image of any mode as 8-bit RGB, upright.

    The EXIF orientation is applied; transparency is laid over white; of an animation the current frame is taken;
    grey values of more than 8 bits are stretched linearly from the image's own range to 0 to 255 (medical images
    often use 12 of 16 bits, and clipping would blank them).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(values), values, 0.0)
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _open(path: Path) -> Image.Image:
    """Read the header of an image and refuse what is too large.

    Raises:
        ValueError: the file is missing, not an image of a known format, or too large.
    """
    if not path.is_file():
        raise ValueError(f"The image {path} does not exist: check the data folder, or leave its rows out.")
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


def _unreadable(path: Path, error: BaseException) -> str:
    return (
        f"The image {path} cannot be decoded ({type(error).__name__}: {str(error).rstrip('.') or 'no details'}): "
        f"replace the file, or convert it to one of {', '.join(FORMATS)}."
    )


@dataclass(frozen=True)
class FileImage:
    """An image file of a data set; ``path`` is relative to ``root``, the data set's folder."""

    path: str
    root: Path

    @property
    def key(self) -> str:
        """The relative path: it names the image on every machine."""
        return self.path

    def load(self) -> Image.Image:
        """Decode the first frame to RGB (:func:`to_rgb`).

        Raises:
            ValueError: the file is missing, damaged, truncated, too large or not an image; the message names it.
        """
        path = self.root / self.path
        image = _open(path)
        try:
            with image:
                image.seek(0)
                return to_rgb(image)
        except _DECODE_ERRORS as error:
            raise ValueError(_unreadable(path, error)) from error

    def check(self) -> None:
        """Read the header only: cheap, and finds missing and empty files and files that are no images.

        Raises:
            ValueError: as :meth:`load`, except for damage inside the pixel data.
        """
        _open(self.root / self.path).close()


@dataclass(frozen=True)
class MemoryImage:
    """An image that is already decoded."""

    key: str
    image: Image.Image

    def load(self) -> Image.Image:
        """The image as RGB."""
        return to_rgb(self.image)
