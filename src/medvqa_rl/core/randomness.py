"""Addressed randomness: every random number is a stable hash of its address, never the next number of a stream.

An address says what a number is for (seed, stream, step, sample, completion, position ...), so each number can be
drawn again alone: on another machine, in another batch, after a resume. Only integer arithmetic modulo 2**64 is used,
so the numbers are identical on every platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # the odd increment of splitmix64 (Steele, Lea and Flood, 2014)
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _update(digest: hashlib.blake2b, part: str | int) -> None:
    text = str(part).encode()
    digest.update((b"i" if isinstance(part, int) else b"s") + len(text).to_bytes(8, "little") + text)


def address(*parts: str | int) -> int:
    """Hash an address to 64 bits: BLAKE2b of its parts, each with its type and length, so that ``("a", "bc")`` and
    ``("ab", "c")`` differ.

    Example:
        >>> address("train", 1) == address("train", "1")
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        _update(digest, part)
    return int.from_bytes(digest.digest(), "little")


def addresses(*parts: str | int, last: Iterable[str | int]) -> list[int]:
    """``address(*parts, x)`` for every x in ``last``; the common parts are hashed once."""
    common = hashlib.blake2b(digest_size=8)
    for part in parts:
        _update(common, part)
    result = []
    for part in last:
        digest = common.copy()
        _update(digest, part)
        result.append(int.from_bytes(digest.digest(), "little"))
    return result


def integers(key: int, count: int, start: int = 0) -> NDArray[np.uint64]:
    """(count,) 64-bit integers: splitmix64 of ``key + (position + 1) * gamma`` for positions start, start + 1 ..."""
    with np.errstate(over="ignore"):
        z = np.arange(start + 1, start + count + 1, dtype=np.uint64)
        z = z * np.uint64(_GAMMA) + np.uint64(key & _MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        return z ^ (z >> np.uint64(31))


def uniforms(key: int, count: int, start: int = 0) -> NDArray[np.float64]:
    """(count,) float64 in [0, 1): the upper 53 bits of :func:`integers`, scaled exactly."""
    return (integers(key, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Draws:
    """Sequential draws under one address; the n-th draw depends only on the address and n."""

    def __init__(self, *parts: str | int) -> None:
        self._state = address(*parts)

    def bits(self) -> int:
        """The next 64-bit integer (splitmix64, the same numbers as :func:`integers`)."""
        self._state = (self._state + _GAMMA) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return z ^ (z >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def below(self, bound: int) -> int:
        """An integer in [0, bound); the bias of the modulus is below bound / 2**64."""
        return self.bits() % bound

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, each equally likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order (Fisher-Yates)."""
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result


def permutation(key: int, count: int) -> NDArray[np.int64]:
    """(count,) indices 0 .. count - 1 in random order: positions sorted by their hash."""
    return np.argsort(integers(key, count), kind="stable").astype(np.int64)
