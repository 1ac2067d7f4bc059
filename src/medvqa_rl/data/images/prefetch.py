"""Background threads that decode images and encode prompts ahead of use, within a memory limit. Imports no torch.

Pillow and NumPy release the GIL while they decode and resize, so threads are enough and nothing is copied between
processes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class _Budget:
    """Bytes held by work in progress and by results that have not been used yet."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0
        self._next = 0
        """Item to be handed out next. It may always start, or the iteration could deadlock."""
        self._changed = threading.Condition()
        self._is_closed = False

    def reserve(self, number: int, size: int) -> bool:
        """Wait until the item fits and reserve its memory; returns False if the iterator has been closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._held + size <= self._max_bytes or number <= self._next
            )
            self._held += size
            return not self._is_closed

    def adjust(self, by: int) -> None:
        """Correct a reservation once the size of the result is known."""
        with self._changed:
            self._held += by
            self._changed.notify_all()

    def release(self, number: int, size: int) -> None:
        """Free the memory of item ``number``, which has been used."""
        with self._changed:
            self._held -= size
            self._next = number + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _Closed(Exception):
    """The iterator was closed before this item could start."""


def prefetch_map(
    work: Callable[[T], R],
    items: Iterable[T],
    *,
    workers: int,
    max_bytes: int,
    ahead: int,
    cost: Callable[[T], int],
    size: Callable[[R], int],
) -> Generator[R, None, None]:
    """Like ``map(work, items)``, but threads compute the next results while the caller uses the last one.

    An error raised by ``work``, or a ValueError raised by ``items``, is raised in place of the result and ends the
    iteration. When the iterator is closed or dropped, running work is finished, queued work is cancelled, and no
    thread is left behind.

    Queued results, the one in use and work in progress hold at most ``max_bytes``, plus what the next item needs:
    that item may always start.

    Args:
        work: called once per item, concurrently from several threads.
        items: iterated lazily in the caller's thread, at most ``ahead`` items beyond the one in use.
        workers: number of threads; with 0, each result is computed when it is requested.
        max_bytes: memory limit.
        ahead: maximum number of items queued or in progress.
        cost: upper bound on the bytes needed to process an item, including its result; 0 if unknown, in which case
            only the result is counted.
        size: bytes of a result.

    Raises:
        ValueError: ``workers`` is negative, or ``ahead`` or ``max_bytes`` is below 1.
    """
    if workers < 0 or ahead < 1 or max_bytes < 1:
        raise ValueError(
            f"Cannot prefetch with {workers} workers, {ahead} items ahead and {max_bytes} bytes: workers must be at "
            "least 0, the others at least 1."
        )
    if workers == 0:
        yield from map(work, items)
        return
    budget = _Budget(max_bytes)

    def run(number: int, item: T) -> tuple[R, int]:
        expected = cost(item)
        if not budget.reserve(number, expected):
            raise _Closed
        result = work(item)
        held = size(result)
        budget.adjust(held - expected)
        return result, held

    numbered = enumerate(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    pending: deque[tuple[int, Future[tuple[R, int]]]] = deque()
    failure: ValueError | None = None
    try:
        while True:
            try:
                for number, item in islice(numbered, ahead - len(pending)):
                    pending.append((number, pool.submit(run, number, item)))
            except ValueError as error:  # from items; raised after the results before it
                failure = error
            if not pending:
                if failure is not None:
                    raise failure
                return
            number, future = pending.popleft()
            result, held = future.result()
            del future
            # Keep no reference to a result once it is handed out, so that the caller can free it.
            handed_out = [result]
            del result
            yield handed_out.pop()
            budget.release(number, held)
    finally:
        budget.close()
        pool.shutdown(wait=True, cancel_futures=True)
