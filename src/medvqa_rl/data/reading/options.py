"""Options and gold answer of multiple-choice rows. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from unicodedata import normalize

from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.text import as_written, normalise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.reading.rows import Repairs, Unusable

QUOTES = "stray quotes removed"
PREFIXES = 'option prefixes "A:" removed'

_PREFIX = re.compile(r"^\(?([A-Z])\s*[:)]\s*(.*)$", re.DOTALL)

_OPTION_COLUMN = re.compile(
    r"(?P<kind>option|choice|op|answer|antwort|auswahl|réponse|reponse|choix|opción|opcion|respuesta|选项|答案)s?"
    r"[\s_.-]*(?P<mark>[a-z]|\d\d?)",
    re.IGNORECASE,
)

_LABELLED = re.compile(
    r"(?:option|choice)?\s*(?P<opening>[(\[（【]?)\s*(?P<letter>[A-ZＡ-Ｚ])\s*"
    r"(?P<separator>[.:)\]、．：）】]+|\s[-–—](?=\s))\s*(?P<text>\S.*)",
    re.DOTALL | re.IGNORECASE,
)


def without_labels(options: Sequence[str]) -> tuple[str, ...] | None:
    """The options without the letters in front of them ("A. left", "b) left", "(C) left"), or None.

    None unless every option has its own letter, in order, all in one case, and a text behind it.
    """
    found = [_LABELLED.fullmatch(option) for option in options]
    matches = [match for match in found if match]
    letters = [normalize("NFKC", match["letter"]) for match in matches]
    in_order = "".join(letters)
    if in_order not in (LETTERS[: len(options)], LETTERS[: len(options)].lower()):
        return None
    return tuple(match["text"] for match in matches)


@cache
def option_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns with one option each, in order: "option_a", "Choice B", "opc", "Option 1", or "A", "B" ...

    Empty unless they start with A or 1, follow each other and are at least two. Names differ in one way only.
    """
    found: dict[str, dict[str, str]] = {}
    for column in columns:
        if match := _OPTION_COLUMN.fullmatch(column.strip()):
            found.setdefault(match["kind"].lower(), {})[match["mark"].upper()] = column
        elif column in LETTERS:
            found.setdefault("", {})[column] = column
    for marks in found.values():
        for expected in (LETTERS, [str(number) for number in range(1, len(LETTERS) + 1)]):
            named = tuple(marks[mark] for mark in takewhile(marks.__contains__, expected))
            if len(named) > 1:
                return named
    return ()


def strip_quotes(text: str) -> str:
    """Remove a quotation mark without a partner: the first character, or the last one after a blank."""
    for mark in "\"'":
        if text.count(mark) % 2 and text.startswith(mark):
            text = text[1:].lstrip()
        elif text.count(mark) % 2 and text.endswith(" " + mark):
            text = text[:-1].rstrip()
    return text


_MARK = re.compile(
    r"(?:^|(?<=[\s,;:.?!]))(?P<opening>[(\[（【]?)(?P<letter>[A-Za-z])(?P<closing>[)\]）】:：、]|\.(?=\s))\s*(?=\S)"
)
_LEAD_IN = re.compile(
    r"(?:^|\s)(?:(?:answer )?(?:options|choices)|optionen|antwortmöglichkeiten|choix|opciones|选项)\s*[:：]?\s*$",
    re.IGNORECASE,
)


def split_options(question: str) -> tuple[str, tuple[str, ...]] | None:
    """Split a text such as "Which side? A. left B. right" into the question and its options, or None.

    The letters begin with A, follow each other and are marked in one way ("A.", "A)", "(A)", "A:"); none occurs twice.
    """
    marks: dict[tuple[str, str, bool], list[re.Match[str]]] = {}
    for match in _MARK.finditer(question):
        marks.setdefault((match["opening"], match["closing"], match["letter"].isupper()), []).append(match)
    found = [chain for same in marks.values() if (chain := _chain(same))]
    if len(found) != 1:
        return None
    (chain,) = found
    ends = [*(match.start() for match in chain[1:]), len(question)]
    texts = tuple(question[match.end() : end].strip(" \t\r\n,;，；") for match, end in zip(chain, ends))
    stem = _LEAD_IN.sub("", question[: chain[0].start()]).strip()
    return (stem, texts) if stem and all(texts) else None


def _chain(marks: Sequence[re.Match[str]]) -> Sequence[re.Match[str]]:
    """The marks from the last A on if they are A, B ... in order and at least two; else none."""
    letters = "".join(match["letter"].upper() for match in marks)
    start = letters.rfind("AB")
    if start < 0 or letters[start:] != LETTERS[: len(letters) - start]:
        return ()
    return marks[start:]


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

    Removes quotation marks around the whole list and unpaired ones. Removes letters in front of the options: see
    :func:`without_labels`; "A:" and "(A)" also if every option has any of them, or if it is the option's own letter.

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
    if labelled := without_labels(texts):
        repairs[PREFIXES] = ""
        texts = [strip_quotes(text) for text in labelled]
        return Options(tuple(texts), tuple(allowed))
    matches = [match if (match := _PREFIX.match(text)) and match[1] in allowed else None for text in texts]
    all_have_prefix = all(matches)
    letters = list(allowed)
    for index, match in enumerate(matches):
        if match and (all_have_prefix or match[1] == letters[index]):
            repairs[PREFIXES] = ""
            letters[index], texts[index] = match[1], strip_quotes(match[2])
    if empty := [letter for letter, text in zip(LETTERS, texts) if not text]:
        raise Unusable("empty option", ", ".join(empty))
    return Options(tuple(texts), tuple(letters))


def as_letter(text: str) -> str:
    """The letter that a text consists of, punctuation ignored, or "" if it is no single letter."""
    letter = as_written(text).upper()
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
        named = _named_by_text(options, text, repairs, has_label=bool(given))
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


def _named_by_text(options: Options, text: str, repairs: Repairs, *, has_label: bool) -> set[int]:
    """Indices of the options equal to the gold text, ignoring case and white space.

    Compares the text first as it is, then without its prefix, which must be the option's, then (unless the
    prefix is all that says which option it is) with every "A:" to "D:" removed from both sides, because PMC-VQA's
    answers lack these letters even in the middle of a text, and last
    as the answer of a model is read (:func:`medvqa_rl.core.answers.read_choice`).
    """
    cleaned = strip_quotes(text)
    if cleaned != text:
        repairs.setdefault(QUOTES, text)
    match = _PREFIX.match(cleaned)
    if found := _indices(options.texts, cleaned, _key):
        return found
    if match and (found := _indices(options.texts, match[2], _key) & options.named_by(match[1])):
        return found
    if (has_label or not match) and (found := _indices(options.texts, cleaned, _without_letters)):
        repairs["letters missing from the answer's text"] = text
        return found
    letter = read_choice(cleaned, options.texts)
    return set() if letter is None else {LETTERS.index(letter)}


def _indices(options: Sequence[str], wanted: str, key: Callable[[str], str]) -> set[int]:
    """Indices of the options whose key is that of the wanted text, unless it is empty."""
    return {index for index, option in enumerate(options) if key(wanted) and key(option) == key(wanted)}


def _key(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:'\"")


def _without_letters(text: str) -> str:
    return _key(re.sub(r"\b[A-D]\s*:", " ", text))
