"""Size, pixel hash and perceptual hash of images. Imports no torch.

Images with equal pixel hashes are the same picture under two names. Images whose perceptual hashes differ in few bits
are most likely copies that were recompressed, resized or brightened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medvqa_rl.core.types import ImageSource

SIDE, FREQUENCIES = 64, 16
BITS = FREQUENCIES * FREQUENCIES - 1
"""Number of bits of the perceptual hash."""

NEAR = 32
"""Images whose perceptual hashes differ in at most this many of the 255 bits count as near duplicates. Measured on the
315 images of VQA-RAD: copies at JPEG quality 60, at half the size, or 15 % brighter differ in 28 bits at most, two
different images in 70 at least. Copies cropped by 2 % on each side differ in 37 (median), so most are missed."""

FLAT = 2.0
"""Images whose grey levels have a standard deviation below this are nearly blank and get no perceptual hash."""

_COSINES: NDArray[np.float64] = np.cos(
    np.pi / SIDE * (np.arange(SIDE)[None, :] + 0.5) * np.arange(FREQUENCIES)[:, None]
)  # (FREQUENCIES, SIDE), type-II discrete cosine transform; unnormalised, since only signs are used


@dataclass(frozen=True)
class ImageFacts:
    """Measurements of one decoded image."""

    key: str
    width: int
    height: int
    pixels: bytes
    """SHA-256 of size and RGB values; 32 bytes."""
    look: bytes
    """:func:`perceptual_hash`, 32 bytes; empty for flat images."""
    spread: float
    """Standard deviation of the grey levels."""
    is_constant: bool
    """All pixels have the same colour."""


def image_hash(images: Iterable[Image.Image]) -> str | None:
    """Hash the sizes and RGB pixels of images in order: 16 hexadecimal digits of SHA-256; None without images."""
    digest, pixels = hashlib.sha256(), b""
    for image in images:
        pixels = (image if image.mode == "RGB" else image.convert("RGB")).tobytes()
        digest.update(f"{image.size}".encode() + pixels)
    return digest.hexdigest()[:16] if pixels else None


def pixel_hash(image: Image.Image) -> bytes:
    """SHA-256 of size and RGB values: equal if and only if the decoded images are equal."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.digest()


def perceptual_hash(image: Image.Image) -> bytes:
    """Signs of the 255 lowest frequencies of the image, downscaled to 64 x 64 grey levels.

    Applies the type-II discrete cosine transform along both axes. Each of the 16 x 16 lowest frequencies except the
    mean gives one bit, 1 if positive. Returns 32 bytes; the last bit is 0.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    frequencies = _COSINES @ grey @ _COSINES.T
    return np.packbits(frequencies.ravel()[1:] > 0).tobytes()


def image_facts(source: ImageSource) -> ImageFacts:
    """Decode and measure an image.

    Raises:
        ValueError: it cannot be decoded.
    """
    image = source.load()
    grey = np.asarray(image.convert("L").reduce(max(1, min(image.size) // 256)), dtype=np.float32)
    spread = float(grey.std())
    is_constant = image.getcolors(1) is not None  # None if there are more colours
    look = b"" if spread < FLAT else perceptual_hash(image)
    return ImageFacts(source.key, image.width, image.height, pixel_hash(image), look, spread, is_constant)


def _facts_or_problem(source: ImageSource) -> ImageFacts | str:
    try:
        return image_facts(source)
    except ValueError as error:
        return str(error)


def measure(sources: Iterable[ImageSource], *, workers: int = 2) -> Iterator[tuple[ImageSource, ImageFacts | str]]:
    """Measure images on several threads, in order. At most four images per worker are queued, which bounds memory.

    Yields:
        Each image with its facts, or with an error message if it cannot be decoded.
    """
    remaining = iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[tuple[ImageSource, Future[ImageFacts | str]]] = []
        for source in islice(remaining, 4 * workers):
            waiting.append((source, pool.submit(_facts_or_problem, source)))
        while waiting:
            source, future = waiting.pop(0)
            yield source, future.result()
            for following in islice(remaining, 1):
                waiting.append((following, pool.submit(_facts_or_problem, following)))


def near_pairs(
    first: NDArray[np.uint64], second: NDArray[np.uint64], most: int = NEAR, *, block: int = 1 << 22
) -> Iterator[tuple[int, int, int]]:
    """Find pairs of perceptual hashes that differ in at most ``most`` bits.

    Args:
        first: (N, 4) hashes from :func:`as_words`.
        second: (M, 4) hashes.
        most: maximum number of bits.
        block: number of pairs compared at once, at 9 bytes each.

    Yields:
        (row of first, row of second, number of bits), sorted by row.
    """
    if not len(second):
        return
    step = max(1, block // len(second))
    for start in range(0, len(first), step):
        rows = first[start : start + step]
        distance = np.zeros((len(rows), len(second)), dtype=np.uint16)
        for word in range(first.shape[1]):
            distance += np.bitwise_count(rows[:, word, None] ^ second[None, :, word])
        for row, column in np.argwhere(distance <= most).tolist():
            yield start + row, column, int(distance[row, column])


def as_words(hashes: Iterable[bytes]) -> NDArray[np.uint64]:
    """Hashes of 32 bytes as (N, 4) words."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64).reshape(-1, 4)
