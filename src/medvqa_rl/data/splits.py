"""Assign images to splits and choose subsets of samples, both by hash, so that neither depends on the order or number
of rows. Imports no torch."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from medvqa_rl.core.randomness import addresses

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

K = TypeVar("K", bound=Hashable)


def splits_of(keys: Iterable[str], seed: int, *, val: float = 0.1, test: float = 0.1) -> dict[str, Split]:
    """Assign images, or other clusters such as patients, to splits.

    Args:
        keys: names of the images or clusters.
        seed: seed of the assignment.
        val: share of the keys for validation.
        test: share of the keys for testing; the rest is for training.
    """
    distinct = list(dict.fromkeys(keys))
    found: dict[str, Split] = {}
    for key, number in zip(distinct, addresses("split by image", seed, last=distinct)):
        position = (number >> 11) * 2.0**-53  # uniform in [0, 1)
        found[key] = "test" if position < test else "val" if position < test + val else "train"
    return found


def choose(ids: Sequence[str], num: int | None, seed: int) -> list[int]:
    """Indices of the ``num`` ids with the smallest hashes, in order; None keeps all.

    A smaller choice is a subset of every larger one with the same seed.
    """
    if num is None or num >= len(ids):
        return list(range(len(ids)))
    keys = addresses("choice", seed, last=ids)
    return sorted(heapq.nsmallest(num, range(len(ids)), key=keys.__getitem__))


def ids_hash(ids: Iterable[str]) -> str:
    """Identify a subset in print: SHA-256 of the sorted ids, one per line, cut to 16 hexadecimal digits."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def connected(pairs: Iterable[tuple[K, Hashable]]) -> dict[K, K]:
    """Connected components of images that share something, such as a case or a patient.

    Args:
        pairs: (image, what it belongs to); an image may occur in several pairs.

    Returns:
        Image -> the first image of its component.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    images: list[K] = []
    for image, link in pairs:
        images.append(image)
        parent[root(("link", link))] = root(("image", image))
    first: dict[Hashable, K] = {}
    return {image: first.setdefault(root(("image", image)), image) for image in images}
