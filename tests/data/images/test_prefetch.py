"""Working ahead: the same results in the same order, within the bound on memory, and no thread left behind.

Run: pytest tests/data/images/test_prefetch.py
"""

import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.prefetch import image_pixels, prefetch, work_ahead


@dataclass
class Counter:
    """What is decoded and not yet used."""

    loaded: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Source:
    """An image of 100 x 100 pixels, 40,000 bytes, that takes its time and whose size nobody knows before."""

    key: str
    counter: Counter
    seconds: float = 0.0
    fails: bool = False

    def load(self) -> Image.Image:
        time.sleep(self.seconds)
        with self.counter.lock:
            self.counter.loaded += 1
        if self.fails:
            raise ValueError(f"The image {self.key} is broken.")
        return Image.new("RGB", (100, 100))

    def header_pixels(self) -> None:
        return None


def samples(counter: Counter, count: int | None = None, **how: object) -> Iterator[Sample]:
    numbers = itertools.count() if count is None else range(count)
    for number in numbers:
        fails = bool(how.get("every")) and number % int(str(how["every"])) == 0
        # Of four samples the first is slow, so later ones are ready before it.
        seconds = 0.004 if number % 4 == 0 else 0.0
        yield Sample(str(number), "Q?", "yes", "closed", (Source(f"i{number}", counter, seconds, fails),))


def threads_of_ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch") and thread.is_alive()]


def test_order_is_kept_and_images_are_decoded_once() -> None:
    counter = Counter()
    found = list(prefetch(samples(counter, 100), workers=3))
    assert [sample.id for sample in found] == [str(number) for number in range(100)]
    assert [image.key for sample in found for image in sample.images] == [f"i{number}" for number in range(100)]
    assert counter.loaded == 100
    assert found[5].images[0].load().size == (100, 100)
    assert counter.loaded == 100


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_memory_is_bounded_by_bytes(workers: int) -> None:
    counter = Counter()
    most = 0
    for used, _ in enumerate(prefetch(samples(counter, 60), workers=workers, max_bytes=120_000, ahead=40), start=1):
        time.sleep(0.002)  # a slow consumer: decoding runs into the bound
        most = max(most, counter.loaded - used)
    # Three images fill the budget; each worker may have been decoding one more.
    assert most <= 3 + workers


def test_an_endless_stream_is_read_lazily_and_can_be_left() -> None:
    counter = Counter()
    stream = prefetch(samples(counter), workers=2, ahead=8)
    assert [next(stream).id for _ in range(20)] == [str(number) for number in range(20)]
    stream.close()
    time.sleep(0.02)
    loaded = counter.loaded
    assert loaded <= 20 + 8 + 2
    time.sleep(0.02)
    assert counter.loaded == loaded
    assert not threads_of_ours()


def test_a_tiny_budget_still_moves() -> None:
    assert len(list(prefetch(samples(Counter(), 30), workers=3, max_bytes=1))) == 30


def test_a_broken_image_fails_where_it_is_used() -> None:
    found = list(prefetch(samples(Counter(), 9, every=3)))
    assert [sample.id for sample in found] == [str(number) for number in range(9)]
    with pytest.raises(ValueError, match="The image i3 is broken"):
        found[3].images[0].load()
    assert found[4].images[0].load().size == (100, 100)


def test_images_are_shrunk_in_their_ratio() -> None:
    (sample,) = prefetch(samples(Counter(), 1), max_pixels=400)
    assert sample.images[0].load().size == (20, 20)


def test_no_samples_and_no_workers() -> None:
    assert list(prefetch([])) == []
    with pytest.raises(ValueError, match="-1 workers"):
        next(prefetch([], workers=-1))


class Ledger:
    """Bytes of work under way and of results not yet let go, counted apart from the code under test."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.most = max(self.most, self.now)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_under_way_counts_before_it_is_done(workers: int) -> None:
    ledger = Ledger()
    sizes = [10 + 37 * number % 50 for number in range(80)]  # 10 to 59

    def work(size: int) -> int:
        ledger.add(size)
        time.sleep(0.001)
        return size

    for size in work_ahead(
        work, sizes, workers=workers, max_bytes=100, ahead=30, cost=lambda size: size, size=lambda size: size
    ):
        time.sleep(0.0005)
        ledger.add(-size)
    assert ledger.now == 0
    assert ledger.most <= 100 + max(sizes)
    assert workers == 1 or ledger.most > 60  # it did go ahead


def test_headers_tell_the_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    Image.new("L", (30, 20)).save(tmp_path / "b.png")
    sources = (FileImage("a.png", tmp_path), FileImage("b.png", tmp_path), FileImage("none.png", tmp_path))
    assert image_pixels(Sample("0", "Q?", "yes", "closed", sources)) == 60 * 40 + 30 * 20


def test_a_result_is_let_go_when_it_is_handed_out() -> None:
    class Result:
        pass

    stream = work_ahead(
        lambda number: Result(), range(3), workers=1, max_bytes=1, ahead=1, cost=lambda _: 0, size=lambda _: 1
    )
    first = weakref.ref(next(stream))
    assert first() is None
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_at_its_place_and_ends_it(workers: int) -> None:
    def work(number: int) -> int:
        if number == 5:
            raise KeyError("five")
        return number

    stream = work_ahead(work, range(20), workers=workers, max_bytes=100, ahead=8, cost=lambda _: 1, size=lambda _: 1)
    assert [next(stream) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="five"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not threads_of_ours()


def test_an_error_of_the_items_waits_for_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise ValueError("three")

    stream = work_ahead(abs, items(), workers=2, max_bytes=100, ahead=8, cost=abs, size=abs)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(stream)
    assert not threads_of_ours()


def test_no_thread_is_left_when_the_caller_fails_or_is_interrupted() -> None:
    def caller(error: type[BaseException]) -> None:
        waiting = work_ahead(
            np.zeros, itertools.repeat(8), workers=3, max_bytes=64, ahead=20, cost=lambda _: 64, size=np.size
        )
        with closing(waiting):
            for _ in waiting:
                assert threads_of_ours()
                raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            caller(error)
        assert not threads_of_ours()
