"""Work done ahead of its use, by threads, within a bound on memory: images decoded, prompts encoded. Imports no torch.

Pillow and NumPy release the interpreter's lock while they decode and resize, so threads are enough and nothing is
copied between processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import MemoryImage, shrink

T = TypeVar("T")
R = TypeVar("R")

BYTES_PER_PIXEL = 4
"""Pillow keeps RGB in four bytes a pixel, not three."""


class _Budget:
    """Bytes of work under way and of results that wait to be used."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._next = 0
        """The item that is handed out next; it may always begin, or nothing would move."""
        self._changed = threading.Condition()
        self._is_closed = False

    def reserve(self, number: int, size: int) -> bool:
        """Wait until there is room for the item and take it; False when nobody wants it any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._held + size <= self._max_bytes or number <= self._next
            )
            self._held += size
            return not self._is_closed

    def change(self, by: int) -> None:
        """What an item holds is more, or less, than it was."""
        with self._changed:
            self._held += by
            self._changed.notify_all()

    def used(self, number: int, size: int) -> None:
        """Item ``number`` was used and its memory is given back."""
        with self._changed:
            self._held -= size
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _Unwanted(Exception):
    """Nobody will ask for this result."""


def work_ahead(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    max_bytes: int,
    ahead: int,
    cost: Callable[[T], int],
    size: Callable[[R], int],
) -> Generator[R, None, None]:
    """``map(work, items)``, with the next results computed by threads while the caller uses the last one.

    An error of ``work``, and a ValueError of ``items``, is raised where the result would have come, and ends the
    iteration. Closing the iterator, or dropping it, leaves no thread behind: what is being worked on is finished, the
    rest is not begun.

    Results that wait, the one in use and the work under way hold at most ``max_bytes``, and what one item needs
    besides: the item that is due next always goes ahead.

    Args:
        work: called once per item, by several threads at a time.
        items: read lazily by the caller's thread, at most ``ahead`` of them beyond the one in use.
        workers: threads; with 0 each result is computed when it is asked for.
        max_bytes: the bound.
        ahead: items under way.
        cost: bytes that working on an item is expected to take at most, its result included; 0 where nothing is
            known before, which counts once the result is there.
        size: bytes of a result.

    Raises:
        ValueError: fewer than 0 workers, or nothing may be under way.
    """
    if workers < 0 or ahead < 1 or max_bytes < 1:
        raise ValueError(
            f"Working ahead with {workers} workers, {ahead} items and {max_bytes} bytes: give 0 or more workers, and "
            "1 or more of the others."
        )
    if workers == 0:
        yield from map(work, items)
        return
    budget = _Budget(max_bytes)

    def run(number: int, item: T) -> tuple[R, int]:
        expected = cost(item)
        if not budget.reserve(number, expected):
            raise _Unwanted
        result = work(item)
        held = size(result)
        budget.change(held - expected)
        return result, held

    numbered = enumerate(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    under_way: deque[tuple[int, Future[tuple[R, int]]]] = deque()
    failure: ValueError | None = None
    try:
        while True:
            try:
                for number, item in islice(numbered, ahead - len(under_way)):
                    under_way.append((number, pool.submit(run, number, item)))
            except ValueError as error:  # of the items: it has its turn after those before it
                failure = error
            if not under_way:
                if failure is not None:
                    raise failure
                return
            number, future = under_way.popleft()
            result, held = future.result()
            del future
            # Nothing here refers to a result once it is handed out: its memory is the caller's to free.
            handed_out = [result]
            del result
            yield handed_out.pop()
            budget.used(number, held)
    finally:
        budget.close()
        pool.shutdown(wait=True, cancel_futures=True)


def image_pixels(sample: Sample) -> int:
    """Pixels of a sample's images as their headers have them; images whose headers do not tell count as 0."""
    return sum(source.header_pixels() or 0 for source in sample.images)


def prefetch(
    samples: Iterable[Sample],
    *,
    workers: int = 2,
    max_bytes: int = 256 * 2**20,
    max_pixels: int | None = None,
    ahead: int = 64,
) -> Generator[Sample, None, None]:
    """The samples in their order with their images decoded, while the next ones are being decoded.

    A sample with an image that cannot be decoded comes unchanged: whoever loads the image gets the error, at its
    place.

    Args:
        samples: as ``items`` of :func:`work_ahead`, as are ``workers``, ``max_bytes`` and ``ahead``.
        workers: 1 or more.
        max_bytes: of decoded images. Each counts twice while it is decoded, because it is copied once.
        max_pixels: images are shrunk to at most this area, keeping their ratio; None keeps them.
        ahead: samples under way.

    Raises:
        ValueError: as :func:`work_ahead`.
    """
    return work_ahead(
        partial(_decode, max_pixels=max_pixels),
        samples,
        workers=workers,
        max_bytes=max_bytes,
        ahead=ahead,
        cost=lambda sample: 2 * BYTES_PER_PIXEL * image_pixels(sample),
        size=_decoded_bytes,
    )


def _decode(sample: Sample, max_pixels: int | None) -> Sample:
    try:
        images = [source.load() for source in sample.images]
    except ValueError:
        return sample
    if max_pixels is not None:
        images = [shrink(image, max_pixels) for image in images]
    return replace(
        sample, images=tuple(MemoryImage(source.key, image) for source, image in zip(sample.images, images))
    )


def _decoded_bytes(sample: Sample) -> int:
    images = [source.image for source in sample.images if isinstance(source, MemoryImage)]
    return sum(BYTES_PER_PIXEL * image.width * image.height for image in images)
