"""From the fields of a row to a question that can be asked, or a named reason why not. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS, AnswerType
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.reading.tables import Fields, Report, read_table

MAX_TEXT = 20_000
"""Characters of a question, option or answer; a longer one is not a question but damage."""

NUMBER = "number in place of text"
PREFIXES = 'option prefixes "A:" removed'
QUOTES = "stray quotes removed"


class Unusable(Exception):
    """A row cannot be used."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


Repairs = dict[str, str]
"""What was repaired in a row -> the value as it was."""


class Row(NamedTuple):
    """A usable row, before it is known where its images lie on this machine."""

    id: str
    question: str
    answer: str
    answer_type: AnswerType
    options: tuple[str, ...]
    images: tuple[str, ...]
    """Paths relative to the folder of the images."""
    together: str
    """What must stay in one split: the image, or its article, case or patient."""
    place: str
    """The split that the data set's owners put it in."""
    groups: dict[str, str]
    reasoning: str = ""
    description: str = ""


@dataclass
class Reading:
    """All usable rows of one or more files, and what was wrong with these and the others."""

    rows: list[Row] = field(default_factory=list)
    issues: list[RowIssue] = field(default_factory=list)
    total: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that belong to another data set in the same file, by reason; they count as neither good nor bad."""

    def extend(self, other: Reading) -> None:
        """Append what was read from another file."""
        self.rows += other.rows
        self.left_out += other.left_out
        self.issues += other.issues
        self.total += other.total


Parse = Callable[[int, Fields, Repairs], Row]
"""Reads one row; raises Unusable."""


def read_rows(
    path: Path, parse: Parse, *, file: str = "", required: tuple[str, ...] = (), columns: tuple[str, ...] = ()
) -> Reading:
    """Read every row of a table.

    A row that repeats another one (same images, question, options and answer) is dropped.

    Args:
        path: the table.
        parse: reads a row; what it repairs and refuses is reported.
        file: how reports name the file; its name unless given.
        required: columns that a CSV or parquet table must have.
        columns: columns of a text file without a header, separated by "|".

    Raises:
        ValueError: the table as a whole cannot be read.
    """
    report = Report(file or path.name)
    rows: list[Row] = []
    seen: dict[Hashable, int] = {}
    for number, fields in read_table(path, report, required=required, columns=columns):
        repairs: Repairs = {}
        try:
            row = parse(number, fields, repairs)
            first = seen.setdefault((row.images, row.question, row.options, row.answer, row.place), number)
            if first != number:
                raise Unusable("repeated row", f"the same as row {first}")
        except Unusable as problem:
            report.drop(number, problem.reason, problem.detail)
            continue
        rows.append(row)
        for reason, was in repairs.items():
            report.repair(number, reason, was)
    return Reading(rows, report.issues, report.total)


def is_missing(value: Any) -> bool:
    """No value: null, or the not-a-number that spreadsheets and parquet write for an empty cell."""
    return value is None or (isinstance(value, float) and value != value)


def text_of(fields: Fields, name: str, repairs: Repairs) -> str:
    """The text of a field that must not be empty, white space collapsed.

    Raises:
        Unusable: the field is missing, empty, not text or a number, or holds what no text holds.
    """
    text = optional_text(fields, name, repairs)
    if not text:
        raise Unusable(f"{'no' if is_missing(fields.get(name)) else 'empty'} {name}")
    return text


def optional_text(fields: Fields, name: str, repairs: Repairs) -> str:
    """The text of a field, white space collapsed; "" where there is none.

    Raises:
        Unusable: the field is not text or a number, or holds what no text holds.
    """
    value = fields.get(name)
    if is_missing(value):
        return ""
    return clean(value, name, repairs)


def clean(value: Any, name: str, repairs: Repairs) -> str:
    """A value as text, white space collapsed.

    Raises:
        Unusable: it is not text or a number, is endless, or holds NUL or half a character.
    """
    if isinstance(value, bool | int | float):
        try:
            value = str(value)
        except ValueError:  # an integer of thousands of digits
            raise Unusable(f"{name} is too long") from None
        repairs[NUMBER] = f"{name}: {value}"
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", f"a {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise Unusable(f"{name} is too long", f"{len(value):,} characters, at most {MAX_TEXT:,} are read")
    if "\0" in value:
        raise Unusable(f"NUL character in {name}", value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unusable(f"half a character in {name}", value) from None
    return " ".join(value.split())


def images_of(names: Sequence[str], folder: ImageFolder, repairs: Repairs) -> tuple[str, ...]:
    """The paths of a row's images on disk.

    Raises:
        Unusable: one is missing or empty, or its path leaves the folder.
    """
    paths = []
    for name in names:
        file, fragment = split_fragment(name)
        path, problem = folder.find(file)
        if problem:
            raise Unusable(problem, name)
        if path != file and not file.isascii():
            repairs["image name in another Unicode form"] = name
        paths.append(path if fragment is None else f"{path}#{fragment}")
    return tuple(paths)


_PREFIX = re.compile(r"^\(?([A-Z])\s*[:)]\s*(.*)$", re.DOTALL)


def strip_quotes(text: str) -> str:
    """Text without a quotation mark that has no partner: the first character, or the last one after a blank."""
    for mark in "\"'":
        if mark not in text:
            continue
        if text.count(mark) % 2 and text.startswith(mark):
            text = text[1:].lstrip()
        elif text.count(mark) % 2 and text.endswith(" " + mark):
            text = text[:-1].rstrip()
    return text


@dataclass(frozen=True)
class Options:
    """Options as they are shown, and what was written in front of them."""

    texts: tuple[str, ...]
    letters: tuple[str, ...]
    """The letter of each option: its prefix where it has one, otherwise that of its place."""

    def meant_by(self, letter: str) -> set[int]:
        """Options that a letter can mean: the one in its place, and those with it as prefix."""
        return {index for index, prefix in enumerate(self.letters) if letter in (prefix, LETTERS[index])}


def read_options(cells: Sequence[str], repairs: Repairs) -> Options:
    """Clean the cells of the options A, B, C ...

    Quotation marks around the whole list, or without a partner, are removed. Prefixes ("A:", "(A)") are removed
    where every option has one, or where it is the option's own letter.

    Raises:
        Unusable: fewer than two options or too many, or an empty one.
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
    all_have = all(matches)
    letters = []
    for index, match in enumerate(matches):
        own = LETTERS[index]
        letter = match[1] if match and (all_have or match[1] == own) else own
        if match and (all_have or match[1] == own):
            repairs[PREFIXES] = ""
            texts[index] = strip_quotes(match[2])
        letters.append(letter)
    if empty := [LETTERS[index] for index, text in enumerate(texts) if not text]:
        raise Unusable("empty option", ", ".join(empty))
    return Options(tuple(texts), tuple(letters))


def _key(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:'\"")


def _without_letters(text: str) -> str:
    return _key(re.sub(r"\b[A-D]\s*:", " ", text))


def find_gold(options: Options, letter: str | None, text: str, repairs: Repairs) -> str:
    """The letter, by place, of the one option that everything written about the answer agrees on.

    Args:
        options: as :func:`read_options` cleaned them.
        letter: the answer's letter as it was given; anything else counts as not given, and is reported. None where
            the form of the data has no letter beside the text.
        text: the answer's text as it was given; "" where there is none.

    Raises:
        Unusable: letter and text name no option, different ones, or more than one.
    """
    everything = set(range(len(options.texts)))
    given = (letter or "").strip(" .:()").upper()
    by_letter = everything
    if letter is None:
        assert text, "neither letter nor text"
    elif len(given) == 1 and given in LETTERS:
        by_letter = options.meant_by(given)
        if not by_letter:
            raise Unusable("label outside the options", letter)
    elif not text:
        raise Unusable("label outside the options", letter)
    else:
        repairs["label taken from the answer's text"] = letter
    found = by_letter
    if text:
        named = _named(options.texts, text, repairs)
        if not named:
            raise Unusable("answer is none of the options", text)
        found = by_letter & named
        if not found:
            raise Unusable("label and answer name different options", f"{letter}; {text}")
    if len(found) > 1:
        raise Unusable("answer is more than one of the options", text or given)
    (index,) = found
    if any(prefix != own for prefix, own in zip(options.letters, LETTERS)):
        repairs["option letters out of order, places count"] = ", ".join(options.letters)
    gold = normalise(options.texts[index])
    if any(normalise(other) == gold for i, other in enumerate(options.texts) if i != index):
        raise Unusable("gold option given twice", options.texts[index])
    return LETTERS[index]


def _named(options: tuple[str, ...], text: str, repairs: Repairs) -> set[int]:
    """The options that an answer's text is equal to, case and white space aside.

    Tried in turn: the text itself, the text without a prefix, and both without any "A:" to "D:" inside, because
    PMC-VQA's answers lost those letters wherever they stood.
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
