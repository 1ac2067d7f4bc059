"""Decoding ahead: the same samples in the same order, within the bound on memory.

Run: pytest tests/data/test_prefetch.py
"""

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from PIL import Image

from medvqa_rl.data.prefetch import prefetch
from medvqa_rl.types import Sample


@dataclass
class Counter:
    """What is decoded and not yet used."""

    loaded: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Source:
    """An image of 100 x 100 pixels, 30,000 bytes, that takes its time."""

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


def samples(counter: Counter, count: int | None = None, **how: object) -> Iterator[Sample]:
    numbers = itertools.count() if count is None else range(count)
    for number in numbers:
        fails = bool(how.get("every")) and number % int(str(how["every"])) == 0
        # Of four samples the first is slow, so later ones are ready before it.
        seconds = 0.004 if number % 4 == 0 else 0.0
        yield Sample(str(number), "Q?", "yes", "closed", (Source(f"i{number}", counter, seconds, fails),))


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
    for used, _ in enumerate(prefetch(samples(counter, 60), workers=workers, max_bytes=90_000, ahead=40), start=1):
        time.sleep(0.002)  # a slow consumer: decoding runs into the bound
        most = max(most, counter.loaded - used)
    # Three images fill the budget; each worker may have been decoding one more.
    assert most <= 3 + workers


def test_an_endless_stream_is_read_lazily_and_can_be_left() -> None:
    counter = Counter()
    stream = prefetch(samples(counter), workers=2, ahead=8)
    assert [next(stream).id for _ in range(20)] == [str(number) for number in range(20)]
    stream.close()  # type: ignore[attr-defined]
    time.sleep(0.02)
    loaded = counter.loaded
    assert loaded <= 20 + 8 + 2
    time.sleep(0.02)
    assert counter.loaded == loaded
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch") and thread.is_alive()]


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
    with pytest.raises(ValueError, match="0 workers"):
        next(prefetch([], workers=0))
