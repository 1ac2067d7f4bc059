"""Find images that training and test sets share: by name within a data set, by pixels across data sets.

Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from medvqa_rl.config import DataConfig
from medvqa_rl.core.types import Dataset, ImageSource
from medvqa_rl.data import load_dataset
from medvqa_rl.data.images.fingerprints import measure

SECONDS = 60.0
"""Time limit of one comparison by pixels."""


class Pair(NamedTuple):
    """Training data and test data of an arm."""

    arm: str
    trained: DataConfig
    test: str
    tested: DataConfig


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """Keep the first pair of every two data sets."""
    return list({(pair.trained, pair.tested): pair for pair in reversed(list(pairs))}.values())[::-1]


def _images(dataset: Dataset) -> dict[str, ImageSource]:
    return {image.key: image for index in range(len(dataset)) for image in dataset[index].images}


def _leak(pair: Pair, tested: Dataset, trained: Dataset, shared: str, count: int) -> ValueError:
    return ValueError(
        f"The test set {pair.test} ({tested.name}) shares {count} images with the training set of {pair.arm} "
        f"({trained.name}), such as {shared}, so it would measure memorisation: choose data.split=image, or another "
        "test set."
    )


def check_names(pairs: Iterable[Pair]) -> None:
    """Check that no test set shares an image name with training data from the same data set.

    Raises:
        ValueError: one does, or data cannot be used.
    """
    for pair in _distinct(pairs):
        trained, tested = load_dataset(pair.trained, "train"), load_dataset(pair.tested, "test")
        # Phantom samples are drawn at addresses that begin with the split's name; between two data sets equal names
        # mean nothing.
        if trained.is_endless or pair.trained.name == "phantom" or pair.trained.name != pair.tested.name:
            continue
        if shared := _images(trained).keys() & _images(tested).keys():
            raise _leak(pair, tested, trained, min(shared), len(shared))


def compare_pixels(pairs: Iterable[Pair], *, seconds: float = SECONDS) -> Iterator[str]:
    """Compare training and test images of different data sets by pixels, within a time limit.

    Args:
        pairs: training and test data.
        seconds: limit for each two data sets.

    Yields:
        A sentence for each two data sets with the number of compared images.

    Raises:
        ValueError: an image is in both.
    """
    for pair in _distinct(pairs):
        if pair.trained.name == pair.tested.name or "phantom" in (pair.trained.name, pair.tested.name):
            continue
        deadline = time.monotonic() + seconds
        trained, tested = load_dataset(pair.trained, "train"), load_dataset(pair.tested, "test")
        test_hashes, num_tested = _pixels(_images(tested), deadline)
        train_hashes, num_trained = _pixels(_images(trained), deadline)
        if shared := test_hashes.keys() & train_hashes.keys():
            first = min(shared)
            raise _leak(pair, tested, trained, f"{test_hashes[first]} = {train_hashes[first]}", len(shared))
        total = len(_images(tested)), len(_images(trained))
        text = (
            f"{pair.test} ({tested.name}): {num_tested:,} of its {total[0]:,} images and {num_trained:,} of the "
            f"{total[1]:,} training images of {pair.arm} ({trained.name}) compared by pixels, none is in both."
        )
        if (num_tested, num_trained) != total:
            text += f" Stopped after {seconds:g} s: `medvqa-rl data check --data` compares all."
        yield text


def _pixels(images: dict[str, ImageSource], deadline: float) -> tuple[dict[bytes, str], int]:
    """Hash images by pixels until the deadline; those that cannot be decoded count, but have no hash.

    Returns:
        Hash -> key, and the number of images that were read.
    """
    found: dict[bytes, str] = {}
    count = 0
    for source, facts in measure(images.values()):
        count += 1
        if not isinstance(facts, str):
            found.setdefault(facts.pixels, source.key)
        if time.monotonic() > deadline:
            break
    return found, count
