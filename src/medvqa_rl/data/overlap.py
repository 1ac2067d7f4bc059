"""Images that two splits share: by name, by equal pixels or by perceptual hash. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from medvqa_rl.data.images.fingerprints import NEAR, ImageFacts, as_words, near_pairs
from medvqa_rl.data.images.windowing import split_fragment

How = Literal["name", "pixels", "hash"]
"""name: the same key, or a frame or slice of the same file; pixels: equal pixels under another name; hash: a nearly
equal perceptual hash."""


@dataclass(frozen=True)
class SharedImage:
    """An image of one split that another split has too."""

    first: str
    """Its key in the first split."""
    second: str
    """Its key in the second split."""
    how: How
    bits: int = 0
    """Differing bits of the perceptual hashes, of 255."""


@dataclass(frozen=True)
class Overlap:
    """The images that two splits share."""

    first: str
    """Name of the first split."""
    second: str
    num_first: int
    """Images in the first split."""
    num_second: int
    pairs: tuple[SharedImage, ...]

    def count(self, *how: How) -> int:
        """Number of images of the second split that the first split shares in any of these ways."""
        return len({pair.second for pair in self.pairs if pair.how in how})


def find_overlap(
    first: tuple[str, Collection[str]],
    second: tuple[str, Collection[str]],
    facts: Mapping[str, ImageFacts],
    *,
    most: int = NEAR,
) -> Overlap:
    """Find the images of the second split that are in the first one: by name, else by pixels, else by perceptual hash.

    Args:
        first: name of a split and the keys of its images.
        second: the same for the other split.
        facts: measurements of the images by key; images without are compared by name only.
        most: largest number of differing bits in the perceptual hashes of near duplicates.
    """
    (first_name, first_keys), (second_name, second_keys) = first, second
    known = set(first_keys)
    backwards = list(reversed(list(first_keys)))  # so that the first of several equal images wins
    by_file = {split_fragment(key)[0]: key for key in backwards}
    by_pixels = {facts[key].pixels: key for key in backwards if key in facts}
    by_hash: dict[bytes, str] = {}
    for key in first_keys:
        if key in facts and facts[key].look:
            by_hash.setdefault(facts[key].look, key)
    pairs: list[SharedImage] = []
    unmatched: list[str] = []
    for key in second_keys:
        if key in known:
            pairs.append(SharedImage(key, key, "name"))
        elif other := by_file.get(split_fragment(key)[0]):
            pairs.append(SharedImage(other, key, "name"))
        elif key not in facts:
            continue
        elif other := by_pixels.get(facts[key].pixels):
            pairs.append(SharedImage(other, key, "pixels"))
        elif facts[key].look:
            unmatched.append(key)
    hashes = list(by_hash)
    nearest: dict[int, tuple[int, int]] = {}
    for row, column, bits in near_pairs(as_words(facts[key].look for key in unmatched), as_words(hashes), most):
        nearest[row] = min(nearest.get(row, (bits, column)), (bits, column))
    for row, (bits, column) in nearest.items():
        pairs.append(SharedImage(by_hash[hashes[column]], unmatched[row], "hash", bits))
    return Overlap(first_name, second_name, len(known), len(set(second_keys)), tuple(pairs))


def twins(keys: Iterable[str], facts: Mapping[str, ImageFacts]) -> list[tuple[str, ...]]:
    """Groups of two or more keys whose images have equal pixels."""
    groups: dict[bytes, list[str]] = {}
    for key in keys:
        if key in facts:
            groups.setdefault(facts[key].pixels, []).append(key)
    return [tuple(group) for group in groups.values() if len(group) > 1]
