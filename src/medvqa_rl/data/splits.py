"""Which split an image belongs to, and which samples a limit keeps: both by hash, so that neither depends on the order
or the number of rows. Imports no torch."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from medvqa_rl.core.randomness import addresses
from medvqa_rl.core.types import Sample
from medvqa_rl.data.reading.issues import RowIssue

Split = Literal["train", "val", "test"]

K = TypeVar("K", bound=Hashable)


class NoSuchSplit(ValueError):
    """A data set has no split of this name; the message says which it has."""


def split_of(image_key: str, seed: int, *, val: float = 0.1, test: float = 0.1) -> Split:
    """The split of an image and of every question about it.

    Args:
        image_key: names the image, or what must stay together, such as a patient.
        seed: another seed, another split.
        val: share of the images for validation.
        test: share of the images for testing; the rest is for training.
    """
    return splits_of([image_key], seed, val=val, test=test)[image_key]


def splits_of(image_keys: Iterable[str], seed: int, *, val: float = 0.1, test: float = 0.1) -> dict[str, Split]:
    """:func:`split_of` of many images, each hashed once."""
    keys = list(dict.fromkeys(image_keys))
    places = addresses("split by image", seed, last=keys)
    found: dict[str, Split] = {}
    for key, number in zip(keys, places):
        place = (number >> 11) * 2.0**-53  # in [0, 1), a function of seed and key alone
        found[key] = "test" if place < test else "val" if place < test + val else "train"
    return found


def choose(ids: Sequence[str], num: int | None, seed: int) -> list[int]:
    """Indices of at most num of the ids, in their order; None keeps all.

    The ids with the smallest hashes are kept, so a smaller choice is part of every larger one with the same seed.
    """
    if num is None or num >= len(ids):
        return list(range(len(ids)))
    keys = addresses("choice", seed, last=ids)
    return sorted(heapq.nsmallest(num, range(len(ids)), key=keys.__getitem__))


def ids_hash(ids: Iterable[str]) -> str:
    """SHA-256 of the ids, sorted and one per line; 16 hexadecimal digits. Names a subset in print."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16]


def connected(pairs: Iterable[tuple[K, Hashable]]) -> dict[K, K]:
    """Put together what shares something: images of one case, or of one patient.

    Args:
        pairs: (image, something it belongs to); an image may come several times.

    Returns:
        For every image a representative, the same for all that are linked, directly or through others.
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


@dataclass(frozen=True)
class StoredDataset:
    """The samples of one split: what they say is in memory, their images stay on disk."""

    name: str
    samples: Sequence[Sample]
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts by reason: what ``issues`` lists, and what is worth knowing about the whole split."""
    issues: tuple[RowIssue, ...] = ()
    """Every row that was dropped or repaired, in all files that were read."""
    is_endless: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids, questions, options, gold answers, image names and descriptions in order; 16 hexadecimal
        digits."""
        digest = hashlib.sha256()
        for sample in self.samples:
            parts = (sample.id, sample.answer_type, sample.question, sample.answer, sample.image_key, *sample.options)
            digest.update(repr(parts).encode())
            digest.update(sample.description.encode())
        return digest.hexdigest()[:16]
