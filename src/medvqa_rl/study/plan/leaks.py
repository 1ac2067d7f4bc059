"""Images that an arm is trained on and tested on too: by name within a data set, by pixels across data sets.

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
"""Longest time that one comparison by pixels may take."""


class Pair(NamedTuple):
    """What an arm is trained on and what it is tested on."""

    arm: str
    trained: DataConfig
    test: str
    tested: DataConfig


def _distinct(pairs: Iterable[Pair]) -> list[Pair]:
    """The first pair of each two data sets."""
    return list({(pair.trained, pair.tested): pair for pair in reversed(list(pairs))}.values())[::-1]


def _images(dataset: Dataset) -> dict[str, ImageSource]:
    return {image.key: image for index in range(len(dataset)) for image in dataset[index].images}


def _refuse(pair: Pair, tested: Dataset, trained: Dataset, shared: str, count: int) -> ValueError:
    return ValueError(
        f"The test set {pair.test} ({tested.name}) shares {count} images with the training set of {pair.arm} "
        f"({trained.name}), such as {shared}, so it would measure memory: choose data.split=image, or another test "
        "set."
    )


def check_names(pairs: Iterable[Pair]) -> None:
    """Load both sides of every pair, and refuse test sets that share an image's name with what is trained on.

    Raises:
        ValueError: they do, or data cannot be used.
    """
    for pair in _distinct(pairs):
        trained, tested = load_dataset(pair.trained, "train"), load_dataset(pair.tested, "test")
        # Endless samples are drawn at addresses that begin with the name of the split; names of two data sets are
        # equal by chance.
        if trained.is_endless or pair.trained.name != pair.tested.name:
            continue
        if shared := _images(trained).keys() & _images(tested).keys():
            raise _refuse(pair, tested, trained, min(shared), len(shared))


def compare_pixels(pairs: Iterable[Pair], *, seconds: float = SECONDS) -> Iterator[str]:
    """Compare training and test images of different data sets by their pixels, as far as the time allows.

    Yields:
        For each two data sets a sentence that says how many images were compared.

    Raises:
        ValueError: an image is in both.
    """
    for pair in _distinct(pairs):
        if pair.trained.name == pair.tested.name or "phantom" in (pair.trained.name, pair.tested.name):
            continue
        until = time.monotonic() + seconds
        trained, tested = load_dataset(pair.trained, "train"), load_dataset(pair.tested, "test")
        known, num_tested = _pixels(_images(tested), until)
        ours, num_trained = _pixels(_images(trained), until)
        if shared := known.keys() & ours.keys():
            first = min(shared)
            raise _refuse(pair, tested, trained, f"{known[first]} = {ours[first]}", len(shared))
        total = len(_images(tested)), len(_images(trained))
        text = (
            f"{pair.test} ({tested.name}): {num_tested:,} of its {total[0]:,} images and {num_trained:,} of the "
            f"{total[1]:,} training images of {pair.arm} ({trained.name}) compared by pixels, none is in both."
        )
        if (num_tested, num_trained) != total:
            text += f" The time of {seconds:g} s was up: `medvqa-rl data check --data` compares all."
        yield text


def _pixels(images: dict[str, ImageSource], until: float) -> tuple[dict[bytes, str], int]:
    """Hash of the pixels -> key, of the images that were decoded in time, and how many were looked at.

    An image that cannot be decoded is looked at and equal to none; whoever loads it says so.
    """
    found: dict[bytes, str] = {}
    count = 0
    for source, facts in measure(images.values()):
        count += 1
        if not isinstance(facts, str):
            found.setdefault(facts.pixels, source.key)
        if time.monotonic() > until:
            break
    return found, count
