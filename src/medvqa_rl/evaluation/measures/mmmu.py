"""The rules of the MMMU benchmark's evaluation code, which other harnesses took over with changes. Imports no torch.

Source: https://github.com/MMMU-Benchmark/MMMU at 51ce7f3e829c16bb44bc5445782686b4c3508794, ``eval/eval_utils.py``, as
lmms-eval (02bc1c056e173018e36803b70ae900ad69180ac5, ``lmms_eval/tasks/mmmu/utils.py``) repeats it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from medvqa_rl.core.text import shown
from medvqa_rl.core.types import LETTERS
from medvqa_rl.evaluation.measures.harness_texts import Verdict

_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,000
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def choice(response: str, options: Sequence[str], gold: str, *, letters: Literal["words", "ends"]) -> Verdict:
    """Score a choice question.

    Punctuation at both ends is removed. The candidates are the letters that occur as ``(B)``, else as a word, else, in
    a response of more than five words, those whose option's text it contains. Of several, the one that occurs last
    counts. Without any, one is drawn at random, so the credit is its expectation.

    Args:
        response: what the model wrote.
        options: the texts of the options.
        gold: the letter of the right one.
        letters: ``words`` finds a letter between blanks. ``ends`` finds it before a blank, so at the end of a word too
            (the A of "DNA"), else before a full stop.
    """
    text = response
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    names = LETTERS[: len(options)]
    forms = ["({})", " {} "] if letters == "words" else ["({})", "{} ", "{}."]
    for form in forms:
        if found := [letter for letter in names if form.format(letter) in text]:
            place = "({})" if form == "({})" else " {} "
            return _last(found, [text.rfind(place.format(letter)) for letter in found], gold)
    if len(text.split()) > 5:
        texts = {letter: option.lower() for letter, option in zip(names, options)}
        if found := [letter for letter in names if texts[letter] in text.lower()]:
            return _last(found, [text.lower().rfind(texts[letter]) for letter in found], gold)
    return Verdict(1 / len(options), f"No option is found in {shown(response)}: one of {len(options)} is drawn.")


def _last(found: Sequence[str], positions: Sequence[int], gold: str) -> Verdict:
    """The candidate with the highest position, the first of equals."""
    picked = found[positions.index(max(positions))]
    among = f", the last of {', '.join(found)}" if len(found) > 1 else ""
    return Verdict(float(picked == gold), f"It reads {picked}{among}; the gold letter is {gold}.")


def open_answer(response: str, golds: Sequence[str]) -> Verdict:
    """Score an open question: right if a gold answer occurs inside a key part of the response, or equals a number in
    one.

    Key parts are what follows the last cue ("is ", "so ", "answer " ...) of a line, the shortest over the cues; the
    whole response if no line has any. Numbers are compared to two decimals.
    """
    parts = _key_parts(response)
    read = [value for part in [*parts, *_numbers(parts)] for value in _values(part)]
    wanted = [value for gold in golds for value in _values(gold)]
    texts, numbers = ([value for value in wanted if isinstance(value, kind)] for kind in (str, float))
    for value in read:
        if isinstance(value, float) and value in numbers:
            return Verdict(1.0, f"The number {value:g} in it is the gold answer.")
        if isinstance(value, str) and (inside := [text for text in texts if isinstance(text, str) and text in value]):
            return Verdict(1.0, f"The gold answer {shown(inside[0])} is inside {shown(value)}.")
    return Verdict(0.0, f"No gold answer is inside {', '.join(shown(part) for part in parts)}.")


def _key_parts(response: str) -> list[str]:
    text = response.strip().strip(".").lower()
    lines = text.split("\n")  # sentences are split at capitals, of which none is left
    found = []
    for number, line in enumerate(lines, start=1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        tails = [line.rsplit(cue, 1)[1].strip() for cue in cues if cue in line]
        part = ""
        for tail in tails:  # an empty one is replaced by whatever follows
            part = tail if not part or len(tail) < len(part) else part
        if part and part not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(part)
    return found or [text]


def _numbers(parts: Sequence[str]) -> list[str]:
    return [number for part in parts for pattern in _NUMBERS for number in re.findall(pattern, part)]


def _values(text: str) -> list[str | float]:
    """A number to two decimals, else the text in lower case; a single character only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
