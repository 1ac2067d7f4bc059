"""Decoding images ahead of their use, by threads, within a bound on memory. Imports no torch.

Pillow releases the interpreter's lock while it decodes, so threads are enough and nothing is copied between processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from PIL import Image

from medvqa_rl.data.images import MemoryImage, shrink
from medvqa_rl.types import Sample


class _Budget:
    """Bytes of decoded images that wait to be used."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self.next = 0
        """The sample that will be handed out next; it may always be decoded, or nothing would move."""
        self._changed = threading.Condition()
        self._is_closed = False

    def wait(self, number: int) -> bool:
        """Until there is room for the sample; False when nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self.held < self.max_bytes or number <= self.next)
            return not self._is_closed

    def add(self, size: int) -> None:
        with self._changed:
            self.held += size

    def hand_out(self, number: int, size: int) -> None:
        """Sample ``number`` was used and its images are given back."""
        with self._changed:
            self.held -= size
            self.next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def prefetch(
    samples: Iterable[Sample],
    *,
    workers: int = 2,
    max_bytes: int = 256 * 2**20,
    max_pixels: int | None = None,
    ahead: int = 64,
) -> Iterator[Sample]:
    """The samples in their order with their images decoded, while the next ones are being decoded.

    Decoded images that wait take at most ``max_bytes`` and what one sample per worker takes besides. A sample with an
    image that cannot be decoded comes unchanged: whoever loads the image gets the error, at its place.

    Args:
        samples: read lazily, at most ``ahead`` of them beyond the one in use.
        workers: threads that decode.
        max_bytes: of RGB pixels that are decoded and not yet asked for.
        max_pixels: images are shrunk to at most this area, keeping their ratio; None keeps them.
        ahead: samples under way.

    Raises:
        ValueError: no workers, or nothing may be under way.
    """
    if workers < 1 or ahead < 1 or max_bytes < 1:
        raise ValueError(f"Prefetching with {workers} workers, {ahead} samples and {max_bytes} bytes: give 1 or more.")
    budget = _Budget(max_bytes)

    def decode(number: int, sample: Sample) -> tuple[Sample, int]:
        if not budget.wait(number):
            return sample, 0
        try:
            images = [_decode(source.load(), max_pixels) for source in sample.images]
        except ValueError:
            return sample, 0
        size = sum(3 * image.width * image.height for image in images)
        budget.add(size)
        sources = zip(sample.images, images)
        return replace(sample, images=tuple(MemoryImage(source.key, image) for source, image in sources)), size

    numbered = enumerate(samples)
    with ThreadPoolExecutor(workers, thread_name_prefix="prefetch") as pool:
        under_way: deque[tuple[int, Future[tuple[Sample, int]]]] = deque()
        try:
            while True:
                for number, sample in islice(numbered, ahead - len(under_way)):
                    under_way.append((number, pool.submit(decode, number, sample)))
                if not under_way:
                    return
                number, future = under_way.popleft()
                ready, size = future.result()
                yield ready
                budget.hand_out(number, size)
        finally:
            budget.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _decode(image: Image.Image, max_pixels: int | None) -> Image.Image:
    return image if max_pixels is None else shrink(image, max_pixels)
