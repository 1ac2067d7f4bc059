"""The answer parser and the correctness scorer. Imports no torch.

Rewards, metrics, judges, the data check and reports all use these functions, so they cannot disagree.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from medvqa_rl.core.prompts import ALL_TAGS, SECTIONS, as_asked
from medvqa_rl.core.text import as_written, normalise, parts, without_invisible
from medvqa_rl.core.types import (
    DEFAULT_WORDING,
    LETTERS,
    AnswersAs,
    Completion,
    Group,
    Sample,
    Tag,
    Template,
    Wording,
)


@dataclass(frozen=True)
class ParsedAnswer:
    """A parsed completion."""

    think: str | None
    """Text of the think section, stripped; None if it is not asked for, missing, unclosed or not unique."""
    answer: str | None
    """Text of the unique, non-empty answer section, stripped; None means ``no_answer``."""
    is_well_formed: bool
    """Whether each tag occurs exactly once, in order, with only white space outside and no empty section."""
    description: str | None = None
    """Text of the describe section, stripped; None as for ``think``."""


def _section(text: str, tag: Tag) -> str | None:
    """Return the stripped text between two tags that occur exactly once and in order; None if it shows nothing."""
    opening, closing = tag
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    found = text[start:end].strip() if start <= end else ""
    return found if without_invisible(found).strip() else None


def parse_completion(
    text: str, template: Template = "think_answer", wording: Wording = DEFAULT_WORDING
) -> ParsedAnswer:
    """Parse a completion.

    The answer is read from a unique, non-empty answer section even if the rest is malformed; two answer sections, or
    none, give no answer. With the ``direct`` template the whole text is the answer, except for reasoning before it.
    """
    names = SECTIONS[template]
    if not names:
        opening, closing = wording.think
        if text.lstrip().startswith(opening):
            text = text.partition(closing)[2]
        answer = text.strip() or None
        return ParsedAnswer(None, answer, answer is not None)
    tags = {name: wording.tag(name) for name in names}
    found = {name: _section(text, tag) for name, tag in tags.items()}
    return ParsedAnswer(
        found.get("think"),
        found["answer"],
        all(found.values()) and _has_only(tags.values(), text),
        found.get("describe"),
    )


def answer_span(
    text: str, template: Template = "think_answer", wording: Wording = DEFAULT_WORDING
) -> tuple[int, int] | None:
    """Where in a completion its parsed answer begins and ends; None without one. ``text[begin:end]`` is the answer of
    :func:`parse_completion`."""
    answer = parse_completion(text, template, wording).answer
    if answer is None:
        return None
    if SECTIONS[template]:
        opening = wording.answer[0]
        begin = text.index(answer, text.index(opening) + len(opening))
    else:
        begin = len(text.rstrip()) - len(answer)
    return begin, begin + len(answer)


Decode = Callable[[Sequence[int]], str]
"""Token ids to text, as completions are decoded."""


def token_span(token_ids: Sequence[int], start: int, end: int, decode: Decode) -> tuple[int, int]:
    """The tokens that write characters ``start`` to ``end`` of a completion, as a half-open range.

    A token that writes a part of the range, or a part of one of its characters, belongs to it. Prefixes of the tokens
    are decoded, so this holds for every tokenizer.
    """

    @cache
    def text(count: int) -> str:
        return decode(token_ids[:count])

    def length(count: int) -> int:
        return len(text(count).rstrip(_PARTIAL))

    counts = range(len(token_ids) + 1)
    first = max(bisect_right(counts, start, key=length) - 1, 0)
    while first and text(first).endswith(_PARTIAL):
        first -= 1
    return first, min(bisect_left(counts, end, key=length), len(token_ids))


_PARTIAL = "\ufffd"
"""What the first bytes of a character decode to."""


def _has_only(tags: Iterable[Tag], text: str) -> bool:
    """Whether a text is these sections, in this order, with only white space around them."""
    for opening, end in tags:
        before, _, inside = text.partition(opening)
        _, closing, text = inside.partition(end)
        if before.strip() or not closing:
            return False
    return not text.strip()


def without_tags(text: str, tags: Sequence[str] = ALL_TAGS) -> str:
    """Return the text with every tag replaced by a space, stripped."""
    for tag in tags:
        text = text.replace(tag, " ")
    return text.strip()


# A letter, a closing bracket, a separator, text. A bracket, or a separator with punctuation, makes the letter a label.
_LETTER = re.compile(r"^([a-z])([)\]}】]?)(\s*[.:,)\]}】、]+\s*|\s+-+\s+|-+\s*|\s+|$)(.*)$")
_LABEL = re.compile(r"[.:,)\]}】、]|\s-")
_TEXT_THEN_LETTER = re.compile(r"^(.+?)\s*[(\[]([a-z])$")
_LEAD_IN = re.compile(
    r"^(?:(?:so )?(?:the )?(?:(?:correct|right|best|final) )?(?:answer|option|choice)\b(?: is\b)?[\s:=-]*)+(?=\S)"
)


def read_choice(answer: str, options: tuple[str, ...]) -> str | None:
    """Return the letter of the option that an answer names, by letter ("B", "B.", "(B)", "B: text") or by its text.

    Markup and typography around the letter are ignored ("**B**", "\\boxed{B}"), and so is a lead-in ("Option B", "The
    answer is (B)."). A single letter is always the letter of an option, because the prompt asks for it, even if the
    options are letters themselves (blood groups). A letter and a text that disagree, several letters, a text shared by
    two options, or a letter beyond the options names none.

    Returns:
        The letter, or None.
    """
    text = as_written(answer)
    named = _named_option(text, options)
    if named is None and (lead_in := _LEAD_IN.match(text)):
        named = _named_option(as_written(text[lead_in.end() :]), options)
    return named


def _named_option(answer: str, options: tuple[str, ...]) -> str | None:
    """:func:`read_choice` without lead-ins, of an answer as :func:`as_written` returns it."""
    reading = normalise
    if match := _LETTER.match(answer):
        letter, closing, separator, text = match.groups()
        index, text = LETTERS.index(letter.upper()), normalise(text)
        if index < len(options) and (not text or text == normalise(options[index])):
            return LETTERS[index]
        if closing or _LABEL.search(separator):
            reading = as_written  # do not drop the A of "A: lung" as an article; an option may be "A. fumigatus"
    if match := _TEXT_THEN_LETTER.match(answer):
        index = LETTERS.index(match[2].upper())
        if index < len(options) and normalise(match[1]) == normalise(options[index]):
            return LETTERS[index]
    if not (said := reading(answer)):
        return None
    named = [letter for letter, option in zip(LETTERS, options) if reading(option) == said]
    return named[0] if len(named) == 1 else None


def compared(answer: str, answers_as: AnswersAs = "text") -> str:
    """The form in which answers that are no choice are compared: normalised, a set's parts sorted."""
    return ", ".join(sorted(parts(answer))) if answers_as == "set" else normalise(answer)


def is_correct(sample: Sample, answer: str | None) -> bool:
    """Whether a parsed answer is one of the correct ones.

    Choice questions: the answer names a gold option, by letter or by text (:func:`read_choice`). Closed and open
    questions: answer and gold answer are equal after :func:`compared`, never as substrings; if normalisation leaves
    nothing of the gold answer ("?"), they must be equal as written.

    Args:
        sample: the question with its gold answer.
        answer: the parsed answer; None (no answer) is wrong.
    """
    if answer is None:
        return False
    if sample.answer_type == "choice":
        return read_choice(answer, sample.options) in sample.answers
    given = compared(answer, sample.answers_as)
    return any(
        given == gold if (gold := compared(text, sample.answers_as)) else answer.strip() == text.strip()
        for text in sample.answers
    )


def score_correctness(
    sample: Sample, text: str, template: Template = "think_answer", wording: Wording = DEFAULT_WORDING
) -> float:
    """Return 1.0 if the answer of a completion is correct, else 0.0; no parsable answer is 0.0."""
    return float(is_correct(as_asked(sample, template), parse_completion(text, template, wording).answer))


def token_f1(prediction: str | None, *golds: str) -> float:
    """Token F1 of an answer and the most similar gold answer: 2 * precision * recall / (precision + recall).

    Tokens are the words of the normalised texts, counted with multiplicity (SQuAD, Rajpurkar et al. 2016, with this
    package's normalisation). Two texts without words score 1; one text without words, or no answer, scores 0.
    """
    if prediction is None:
        return 0.0
    words = normalise(prediction).split()
    return max(_word_f1(words, normalise(gold).split()) for gold in golds)


def _word_f1(words: list[str], gold_words: list[str]) -> float:
    if not words or not gold_words:
        return float(words == gold_words)
    shared = (Counter(words) & Counter(gold_words)).total()
    return 2 * shared / (len(words) + len(gold_words))


def answer_f1(answer: str | None, golds: Iterable[str], answers_as: AnswersAs) -> float:
    """:func:`token_f1` of a parsed answer, in which the words between the parts of a set do not count."""
    given = None if answer is None else compared(answer, answers_as)
    return token_f1(given, *(compared(gold, answers_as) for gold in golds))


@dataclass(frozen=True)
class Read:
    """A completion and what it says, parsed once and passed on to rewards, judges and records."""

    sample: Sample
    """The question as the prompt asked it (:func:`as_asked`)."""
    template: Template
    completion: Completion
    count_tokens: Callable[[str], int] | None = None
    """Counts tokens as the policy's tokenizer does."""
    wording: Wording = DEFAULT_WORDING

    @cached_property
    def parsed(self) -> ParsedAnswer:
        return parse_completion(self.completion.text, self.template, self.wording)

    @property
    def text(self) -> str:
        """The completion without its tags."""
        return without_tags(self.completion.text, self.wording.tags)

    @cached_property
    def is_right(self) -> bool:
        """Whether the answer is correct (:func:`is_correct`)."""
        return is_correct(self.sample, self.parsed.answer)

    @cached_property
    def think_tokens(self) -> int:
        """Tokens of the reasoning; 0 if its tags are missing or unclosed."""
        assert self.count_tokens is not None, "counting tokens needs the policy's tokenizer: pass count_tokens"
        return 0 if self.parsed.think is None else self.count_tokens(self.parsed.think)


def read_group(group: Group, count_tokens: Callable[[str], int] | None = None) -> list[Read]:
    """The G completions of a group, each to be parsed at most once."""
    sample = as_asked(group.sample, group.template)
    return [Read(sample, group.template, completion, count_tokens, group.wording) for completion in group.completions]
