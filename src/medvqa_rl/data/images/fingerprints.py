"""What an image is, in numbers: size, a hash of its pixels, a hash of how it looks. No torch.

Two images with one pixel hash are the same picture under two names. Two whose perceptual hashes differ in few bits
are most likely copies: compressed again, resized, brightened.
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

SIDE, KEPT = 64, 16
BITS = KEPT * KEPT - 1
"""Bits of the perceptual hash."""

NEAR = 32
"""Images whose perceptual hashes differ in at most this many of the 255 bits count as near duplicates. Measured on the
315 images of VQA-RAD: copies at JPEG quality 60, at half the size, or 15 % brighter differ in 28 bits at most, two
different images in 70 at least; copies cropped by 2 % on each side differ in 37 in the median: most are missed."""

FLAT = 2.0
"""Images whose grey levels have a smaller standard deviation show next to nothing, and have no perceptual hash."""

_COSINES: NDArray[np.float64] = np.cos(
    np.pi / SIDE * (np.arange(SIDE)[None, :] + 0.5) * np.arange(KEPT)[:, None]
)  # (KEPT, SIDE), the type-II discrete cosine transform without its scale, which does not change signs


@dataclass(frozen=True)
class ImageFacts:
    """One decoded image."""

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
    """One colour everywhere."""


def pixel_hash(image: Image.Image) -> bytes:
    """SHA-256 of the size and the RGB values: equal exactly when the decoded images are equal."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.digest()


def perceptual_hash(image: Image.Image) -> bytes:
    """The signs of the 255 lowest frequencies of the image, shrunk to 64 x 64 grey levels.

    The type-II discrete cosine transform is taken along both sides; the 16 x 16 lowest frequencies but the mean give
    a bit each: 1 where positive. 32 bytes, the last bit is 0.
    """
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float64)
    frequencies = _COSINES @ grey @ _COSINES.T
    return np.packbits(frequencies.ravel()[1:] > 0).tobytes()


def image_facts(source: ImageSource) -> ImageFacts:
    """Decode an image and take its measures.

    Raises:
        ValueError: it cannot be decoded.
    """
    image = source.load()
    grey = np.asarray(image.convert("L").reduce(max(1, min(image.size) // 256)), dtype=np.float32)
    spread = float(grey.std())
    is_constant = all(low == high for low, high in zip(*[iter(_flat_extrema(image))] * 2))
    look = b"" if spread < FLAT else perceptual_hash(image)
    return ImageFacts(source.key, image.width, image.height, pixel_hash(image), look, spread, is_constant)


def _flat_extrema(image: Image.Image) -> Iterator[float]:
    """Lowest and highest value of each band, one after the other."""
    for band in image.split():
        low, high = band.getextrema()
        assert isinstance(low, (int, float)) and isinstance(high, (int, float))
        yield from (low, high)


def _facts_or_problem(source: ImageSource) -> ImageFacts | str:
    try:
        return image_facts(source)
    except ValueError as error:
        return str(error)


def measure(sources: Iterable[ImageSource], *, workers: int = 2) -> Iterator[tuple[ImageSource, ImageFacts | str]]:
    """Decode images on several threads, in order; at most four per worker are under way, so memory is bounded.

    Yields:
        Each image with its facts, or with the sentence that says why it cannot be decoded.
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
    """Pairs of perceptual hashes that differ in at most so many bits.

    Args:
        first: (N, 4) hashes as :func:`as_words` gives them.
        second: (M, 4) hashes.
        most: the largest number of bits.
        block: pairs compared at once; bounds the memory, 9 bytes each.

    Yields:
        (row of first, row of second, number of bits), by rows.
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
