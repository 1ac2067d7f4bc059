"""Neutralising control strings in data, and the one normalisation of answers. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_SPECIAL = re.compile(r"<(\|[A-Za-z0-9_]+\|)>|<(/?(?:describe|think|answer))>", re.IGNORECASE)


def neutralise(text: str) -> tuple[str, int]:
    """Neutralise special-token and tag strings in the text of a data set.

    ``<|image_pad|>`` becomes ``(|image_pad|)`` and ``</think>`` becomes ``(/think)``: still readable, but no tokenizer
    maps them to control tokens, and a question cannot close the reasoning of its answer.

    Returns:
        The text and the number of strings replaced.
    """
    return _SPECIAL.subn(lambda match: f"({match[1] or match[2]})", text)


_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_EDGES = re.compile(r"^[\s.,;:!?\"'()\[\]*`]+|[\s.,;:!?\"'()\[\]*`]+$")


def normalise(text: str) -> str:
    """Normalise an answer for comparison.

    Neutralises special-token strings as in the prompt, lowercases, strips white space and punctuation around words,
    drops articles and turns number words up to ten into digits. Words are compared whole, never as substrings, so
    "abnormal" is not "no". An answer that consists of articles only keeps them ("A" is the letter of an option).
    """
    words = [_EDGES.sub("", word) for word in neutralise(text)[0].lower().split()]
    words = [_NUMBERS.get(word, word) for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def as_written(text: str) -> str:
    """Fold case, white space and outer punctuation only: "A. fumigatus" keeps its A."""
    return _EDGES.sub("", " ".join(neutralise(text)[0].lower().split()))


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no once normalised."""
    return normalise(answer) in ("yes", "no")


def first_few(items: Iterable[object], limit: int = 8) -> str:
    """The first items, separated by commas, and how many more there are: ``3, 5, 8 and 12 more``."""
    texts = list(map(str, items))
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def format_p(value: float | None) -> str:
    """A p-value with three decimals, ``< 0.001`` below that; empty for None and NaN."""
    if value is None or math.isnan(value):
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_points(value: float | None, sign: str = "") -> str:
    """A share in percent, or a difference of shares in percentage points, with one decimal; empty for None and NaN.

    Args:
        sign: ``"+"`` shows the sign of positive numbers too.
    """
    return "" if value is None or math.isnan(value) else f"{100 * value:{sign}.1f}"


def format_range(low: float | None, high: float | None, sign: str = "") -> str:
    """Both bounds of an interval, formatted by :func:`format_points`; empty if there is none."""
    bounds = format_points(low, sign), format_points(high, sign)
    return " to ".join(bounds) if all(bounds) else ""
