"""Images that two splits share, by name, by pixels or by looks. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from medvqa_rl.data.images.fingerprints import NEAR, ImageFacts, as_words, near_pairs
from medvqa_rl.data.images.windowing import split_fragment

How = Literal["name", "pixels", "looks"]
"""name: the same key, or another frame or slice of the same file; pixels: other names but equal pixels; looks: other
pixels but nearly equal perceptual hashes."""


@dataclass(frozen=True)
class SharedImage:
    """An image of one split that is in another split too."""

    first: str
    """Its key in the first split."""
    second: str
    """Its key in the second split; the same for ``name``."""
    how: How
    bits: int = 0
    """Differing bits of the perceptual hashes, of 255."""


@dataclass(frozen=True)
class Overlap:
    """What two splits share."""

    first: str
    """Name of a split."""
    second: str
    num_first: int
    """Images in the first split."""
    num_second: int
    pairs: tuple[SharedImage, ...]

    def count(self, *how: How) -> int:
        """Images of the second split that are in the first one in any of these ways."""
        return len({pair.second for pair in self.pairs if pair.how in how})


def find_overlap(
    first: tuple[str, Collection[str]],
    second: tuple[str, Collection[str]],
    facts: Mapping[str, ImageFacts],
    *,
    most: int = NEAR,
) -> Overlap:
    """Images of the second split that are in the first one: by name, else by equal pixels, else by looks.

    Args:
        first: name of a split and the keys of its images.
        second: the same of another split.
        facts: measures of the images by key; those without are compared by name only.
        most: bits in which the perceptual hashes of near duplicates may differ.
    """
    (first_name, first_keys), (second_name, second_keys) = first, second
    known = set(first_keys)
    files = {split_fragment(key)[0]: key for key in reversed(list(first_keys))}
    pairs: list[SharedImage] = []
    rest: list[str] = []
    for key in second_keys:
        if key in known:
            pairs.append(SharedImage(key, key, "name"))
        elif slice_of := files.get(split_fragment(key)[0]):
            pairs.append(SharedImage(slice_of, key, "name"))
        elif key in facts:
            rest.append(key)
    by_pixels = {facts[key].pixels: key for key in reversed(list(first_keys)) if key in facts}
    unmatched: list[str] = []
    for key in rest:
        if twin := by_pixels.get(facts[key].pixels):
            pairs.append(SharedImage(twin, key, "pixels"))
        elif facts[key].look:
            unmatched.append(key)
    looks: dict[bytes, str] = {}
    for key in first_keys:
        if key in facts and facts[key].look:
            looks.setdefault(facts[key].look, key)
    nearest: dict[int, tuple[int, int]] = {}
    columns = list(looks)
    rows = as_words(facts[key].look for key in unmatched)
    for row, column, bits in near_pairs(rows, as_words(columns), most):
        nearest[row] = min(nearest.get(row, (bits, column)), (bits, column))
    for row, (bits, column) in nearest.items():
        pairs.append(SharedImage(looks[columns[column]], unmatched[row], "looks", bits))
    return Overlap(first_name, second_name, len(known), len(set(second_keys)), tuple(pairs))


def twins(keys: Iterable[str], facts: Mapping[str, ImageFacts]) -> list[tuple[str, ...]]:
    """Groups of keys whose images have equal pixels; only groups of two or more."""
    groups: dict[bytes, list[str]] = {}
    for key in keys:
        if key in facts:
            groups.setdefault(facts[key].pixels, []).append(key)
    return [tuple(group) for group in groups.values() if len(group) > 1]
