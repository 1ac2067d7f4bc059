"""Options and gold answer of multiple-choice rows. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.reading.rows import Repairs, Unusable

QUOTES = "stray quotes removed"

_PREFIX = re.compile(r"^\(?([A-Z])\s*[:)]\s*(.*)$", re.DOTALL)


def strip_quotes(text: str) -> str:
    """Remove a quotation mark without a partner: the first character, or the last one after a blank."""
    for mark in "\"'":
        if text.count(mark) % 2 and text.startswith(mark):
            text = text[1:].lstrip()
        elif text.count(mark) % 2 and text.endswith(" " + mark):
            text = text[:-1].rstrip()
    return text


@dataclass(frozen=True)
class Options:
    """Cleaned options and the letters written in front of them."""

    texts: tuple[str, ...]
    letters: tuple[str, ...]
    """The prefix of each option, or the letter of its position."""

    def named_by(self, letter: str) -> set[int]:
        """Indices of the options that a letter can refer to, by position or by prefix."""
        return {index for index, prefix in enumerate(self.letters) if letter in (prefix, LETTERS[index])}


def read_options(cells: Sequence[str], repairs: Repairs) -> Options:
    """Clean the options A, B, C ...

    Removes quotation marks around the whole list and unpaired ones. Removes prefixes ("A:", "(A)") if every option has
    one, or if the prefix is the option's own letter.

    Raises:
        Unusable: fewer than two options, more than 26, or an empty one.
    """
    if not 2 <= len(cells) <= len(LETTERS):
        raise Unusable("wrong number of options", str(len(cells)))
    texts = list(cells)
    for mark in "\"'":
        first, last = texts[0], texts[-1]
        if first.startswith(mark) and last.endswith(mark) and first.count(mark) % 2 and last.count(mark) % 2:
            texts[0], texts[-1] = first[1:].lstrip(), last[:-1].rstrip()
    texts = [strip_quotes(text) for text in texts]
    if texts != list(cells):
        repairs[QUOTES] = " | ".join(cells)
    allowed = LETTERS[: len(texts)]
    matches = [match if (match := _PREFIX.match(text)) and match[1] in allowed else None for text in texts]
    all_have_prefix = all(matches)
    letters = list(allowed)
    for index, match in enumerate(matches):
        if match and (all_have_prefix or match[1] == letters[index]):
            repairs['option prefixes "A:" removed'] = ""
            letters[index], texts[index] = match[1], strip_quotes(match[2])
    if empty := [letter for letter, text in zip(LETTERS, texts) if not text]:
        raise Unusable("empty option", ", ".join(empty))
    return Options(tuple(texts), tuple(letters))


def as_letter(text: str) -> str:
    """The letter that a text consists of, punctuation ignored, or "" if it is no single letter."""
    letter = text.strip(" .:()").upper()
    return letter if len(letter) == 1 and letter in LETTERS else ""


def find_gold(options: Options, letter: str | None, text: str, repairs: Repairs) -> str:
    """Return the letter, by position, of the one option that both the gold letter and the gold text refer to.

    Args:
        options: from :func:`read_options`.
        letter: the gold letter as given, or None if the data set has none. Anything but a letter is ignored, and
            reported as a repair.
        text: the gold text as given, or "" if the data set has none.

    Raises:
        Unusable: letter and text refer to no option, to different ones, or to more than one.
    """
    given = as_letter(letter or "")
    found = options.named_by(given) if given else set(range(len(options.texts)))
    if not found or not (given or text):
        raise Unusable("label outside the options", letter or "")
    if letter is not None and not given:
        repairs["label taken from the answer's text"] = letter
    if text:
        named = _named_by_text(options.texts, text, repairs)
        if not named:
            raise Unusable("answer is none of the options", text)
        found &= named
        if not found:
            raise Unusable("label and answer name different options", f"{letter}; {text}")
    if len(found) > 1:
        raise Unusable("answer is more than one of the options", text or given)
    (index,) = found
    if any(prefix != position for prefix, position in zip(options.letters, LETTERS)):
        repairs["option letters out of order, places count"] = ", ".join(options.letters)
    gold = normalise(options.texts[index])
    if [normalise(option) for option in options.texts].count(gold) > 1:
        raise Unusable("gold option given twice", options.texts[index])
    return LETTERS[index]


def _named_by_text(options: tuple[str, ...], text: str, repairs: Repairs) -> set[int]:
    """Indices of the options equal to the gold text, ignoring case and white space.

    Compares the text first as it is, then without its prefix, and then with every "A:" to "D:" removed from both
    sides, because PMC-VQA's answers lack these letters even in the middle of a text.
    """
    cleaned = strip_quotes(text)
    if cleaned != text:
        repairs.setdefault(QUOTES, text)
    match = _PREFIX.match(cleaned)
    for wanted in (cleaned, match[2] if match else ""):
        if found := {index for index, option in enumerate(options) if wanted and _key(option) == _key(wanted)}:
            return found
    wanted = _without_letters(cleaned)
    found = {index for index, option in enumerate(options) if wanted and _without_letters(option) == wanted}
    if found:
        repairs["letters missing from the answer's text"] = text
    return found


def _key(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:'\"")


def _without_letters(text: str) -> str:
    return _key(re.sub(r"\b[A-D]\s*:", " ", text))
