"""Prefetching: the same results in the same order, within the memory limit, and no thread left behind.

Run: pytest tests/data/images/test_prefetch.py
"""

import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from medvqa_rl.data.images.prefetch import prefetch_map


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch") and thread.is_alive()]


@pytest.mark.parametrize(("workers", "max_bytes"), [(0, 1), (1, 1), (3, 1), (3, 1000)])
def test_each_result_is_computed_once_and_in_order(workers: int, max_bytes: int) -> None:
    computed = []

    def work(number: int) -> int:
        time.sleep(0.004 if number % 4 == 0 else 0.0)  # later items are ready before every fourth
        computed.append(number)
        return number**2

    found = prefetch_map(
        work, range(60), workers=workers, max_bytes=max_bytes, ahead=8, cost=lambda _: 0, size=lambda _: 40
    )
    assert list(found) == [number**2 for number in range(60)]
    assert sorted(computed) == list(range(60))


def test_an_endless_stream_is_read_lazily_and_can_be_closed() -> None:
    computed = []
    stream = prefetch_map(
        computed.append, itertools.count(), workers=2, max_bytes=1000, ahead=8, cost=abs, size=lambda _: 1
    )
    for _ in range(20):
        next(stream)
    stream.close()
    count = len(computed)
    assert 20 <= count <= 20 + 8 + 2
    time.sleep(0.02)
    assert len(computed) == count
    assert not prefetch_threads()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_of_unknown_cost_count_once_they_are_there(workers: int) -> None:
    computed = []
    stream = prefetch_map(
        computed.append, range(60), workers=workers, max_bytes=3, ahead=40, cost=lambda _: 0, size=lambda _: 1
    )
    most = 0
    for used, _ in enumerate(stream, start=1):
        time.sleep(0.002)  # a slow consumer: the threads run into the limit
        most = max(most, len(computed) - used)
    assert 1 <= most <= 3 + workers  # each worker may have been computing one more


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"ahead": 0}, {"max_bytes": 0}])
def test_impossible_limits_are_rejected(wrong: dict[str, int]) -> None:
    limits = {"workers": 1, "ahead": 1, "max_bytes": 1} | wrong
    with pytest.raises(ValueError, match="workers must be at least 0"):
        next(prefetch_map(abs, [], **limits, cost=abs, size=abs))


class Ledger:
    """Bytes of work in progress and of unused results, counted independently of the code under test."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_work_in_progress_counts_towards_the_limit(workers: int) -> None:
    ledger = Ledger()
    sizes = [10 + 37 * number % 50 for number in range(80)]  # 10 to 59

    def work(size: int) -> int:
        ledger.add(size)
        time.sleep(0.001)
        return size

    for size in prefetch_map(
        work, sizes, workers=workers, max_bytes=100, ahead=30, cost=lambda size: size, size=lambda size: size
    ):
        time.sleep(0.0005)
        ledger.add(-size)
    assert ledger.now == 0
    assert ledger.most <= 100 + max(sizes)
    assert workers == 1 or ledger.most > 60  # it did run ahead


def test_a_result_can_be_freed_once_it_is_handed_out() -> None:
    class Result:
        pass

    stream = prefetch_map(
        lambda number: Result(), range(3), workers=1, max_bytes=1, ahead=1, cost=lambda _: 0, size=lambda _: 1
    )
    first = weakref.ref(next(stream))
    assert first() is None
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_in_order_and_ends_the_iteration(workers: int) -> None:
    def work(number: int) -> int:
        if number == 5:
            raise KeyError("five")
        return number

    stream = prefetch_map(work, range(20), workers=workers, max_bytes=100, ahead=8, cost=lambda _: 1, size=lambda _: 1)
    assert [next(stream) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="five"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not prefetch_threads()


def test_an_error_from_items_is_raised_in_order() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("three")

    stream = prefetch_map(abs, items(), workers=2, max_bytes=100, ahead=8, cost=abs, size=abs)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(stream)
    assert not prefetch_threads()


def test_no_thread_is_left_when_the_caller_fails_or_is_interrupted() -> None:
    def caller(error: type[BaseException]) -> None:
        waiting = prefetch_map(
            np.zeros, itertools.repeat(8), workers=3, max_bytes=64, ahead=20, cost=lambda _: 64, size=np.size
        )
        with closing(waiting):
            for _ in waiting:
                assert prefetch_threads()
                raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            caller(error)
        assert not prefetch_threads()
