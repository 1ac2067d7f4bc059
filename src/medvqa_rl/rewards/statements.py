"""The statements of a reasoning: where each begins and ends, and which say the same. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from medvqa_rl.core.text import normalise


class Statement(NamedTuple):
    """A sentence, or a line without a full stop, within a text."""

    text: str
    start: int
    """Where it begins in the text, in characters."""
    end: int


_END = re.compile(r"""[.!?]+["')\]*_]*(?=\s|$)|[\u3002\uff01\uff1f]+|\n""")
"""A full stop ends a sentence before white space only: "2.5 cm" is one number. CJK stops always do."""
_LABEL = re.compile(r"\s*(?:(?:[-*\u2022#]+|(?:step\s+)?\(?\d{1,3}[.):]+)(?:\s+|$))+", re.IGNORECASE)
"""Bullets and numbers of a list, which belong to the statement that follows."""


def split_statements(text: str) -> list[Statement]:
    """Divide a text into its sentences, in order, without the numbers and bullets of lists.

    A sentence ends with a full stop, question or exclamation mark before white space, with a CJK full stop, or with
    its line. Pieces without a letter say nothing and are left out. Abbreviations before white space ("e.g. ") end a
    sentence too, which is wrong but the same for every completion.
    """
    found: list[Statement] = []
    start = 0
    for end in [*(match.end() for match in _END.finditer(text)), len(text)]:
        label = _LABEL.match(text, start, end)
        first = label.end() if label else start
        piece = text[first:end]
        if any(character.isalpha() for character in piece):
            begin = first + len(piece) - len(piece.lstrip())
            found.append(Statement(piece.strip(), begin, begin + len(piece.strip())))
        start = end
    return found


def distinct(statements: Sequence[Statement]) -> list[Statement]:
    """Drop the statements that repeat an earlier one, up to typography, punctuation and the order of words.

    A paraphrase in other words is another statement.
    """
    first: dict[tuple[str, ...], Statement] = {}
    for statement in statements:
        first.setdefault(tuple(sorted(normalise(statement.text).split())), statement)
    return list(first.values())
