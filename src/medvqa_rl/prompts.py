"""What the model is asked and how its answer is read: the templates and the only answer parser.

The function that reads ``<think>..</think><answer>..</answer>`` serves rewards, metrics, judges and reports, so
they cannot disagree. A prompt is built from the question, the options and the images alone, never from the gold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from medvqa_rl.types import LETTERS, Sample

Template = Literal["think_answer", "direct"]

INSTRUCTIONS: dict[Template, str] = {
    "think_answer": "Think in <think></think>, then answer in <answer></answer>.",
    "direct": "Answer with the answer only.",
}
CHOICE_HINT = "Answer with the letter."


def read_templates(text: str) -> tuple[Template, ...]:
    """Names of templates separated by commas.

    Raises:
        ValueError: one is unknown or named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in INSTRUCTIONS:
            raise ValueError(f"There is no prompt {name!r}: choose from {', '.join(INSTRUCTIONS)}, with commas.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"The prompts {text!r} must name each prompt once, from {', '.join(INSTRUCTIONS)}.")
    return tuple(template for name in names for template in INSTRUCTIONS if template == name)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SPECIAL = re.compile(r"<(\|[A-Za-z0-9_]+\|)>|<(/?(?:think|answer))>", re.IGNORECASE)


def neutralise(text: str) -> tuple[str, int]:
    """Make special-token and tag strings inside a data set's text harmless.

    ``<|image_pad|>`` becomes ``(|image_pad|)`` and ``</think>`` becomes ``(/think)``: readable, and no tokenizer
    maps them to control tokens, nor can a question close the reasoning of its answer.

    Returns:
        The text and the number of strings replaced.
    """
    return _SPECIAL.subn(lambda match: f"({match[1] or match[2]})", text)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt before tokenizing."""

    messages: list[dict[str, Any]]
    """Chat messages in the form of Hugging Face processors: one user turn, images first."""
    neutralised: int
    """Special-token strings replaced in the question and the options."""


def render_prompt(sample: Sample, template: Template = "think_answer") -> RenderedPrompt:
    """Ask the sample's question in the named form. Depends on question, options and images only."""
    question, count = neutralise(sample.question.strip())
    lines = [question]
    for letter, option in zip(LETTERS, sample.options):
        text, replaced = neutralise(option.strip())
        count += replaced
        lines.append(f"{letter}: {text}")
    if sample.options:
        lines.append(CHOICE_HINT)
    lines.append(INSTRUCTIONS[template])
    content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    content.append({"type": "text", "text": "\n".join(lines)})
    return RenderedPrompt([{"role": "user", "content": content}], count)


def render_answer(think: str, answer: str, template: Template = "think_answer") -> str:
    """A completion in the requested form, as supervised fine-tuning and the gold check write it."""
    think, answer = neutralise(think.strip())[0], neutralise(answer.strip())[0]
    return f"<think>{think}</think><answer>{answer}</answer>" if template == "think_answer" else answer


@dataclass(frozen=True)
class ParsedAnswer:
    """What a completion says."""

    think: str | None
    """Text of the think section, stripped; None when it is missing, unclosed or not unique."""
    answer: str | None
    """Text of the unique, non-empty answer section, stripped; None is ``no_answer``."""
    is_well_formed: bool
    """Each of the four tags exactly once, in order, nothing but white space outside, both sections non-empty."""


def _section(text: str, opening: str, closing: str) -> str | None:
    """The stripped text between two tags that each occur exactly once, in order, and hold something."""
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() or None if start <= end else None


def parse_completion(text: str, template: Template = "think_answer") -> ParsedAnswer:
    """Read a completion. The answer is taken from a unique, non-empty answer section even if the rest is malformed;
    two answer sections, or none, is no answer. With the ``direct`` template the whole text is the answer."""
    if template == "direct":
        answer = text.strip() or None
        return ParsedAnswer(None, answer, answer is not None)
    think, answer = _section(text, *TAGS[:2]), _section(text, *TAGS[2:])
    order = [text.find(tag) for tag in TAGS]
    is_well_formed = (
        think is not None
        and answer is not None
        and order == sorted(order)
        and not text[: order[0]].strip()
        and not text[order[1] + len(TAGS[1]) : order[2]].strip()
        and not text[order[3] + len(TAGS[3]) :].strip()
    )
    return ParsedAnswer(think, answer, is_well_formed)


def without_tags(text: str) -> str:
    """A completion's words: every tag is replaced by a space, the rest stays as it is, stripped."""
    for tag in TAGS:
        text = text.replace(tag, " ")
    return text.strip()


_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_EDGES = re.compile(r"^[\s.,;:!?\"'()\[\]*`]+|[\s.,;:!?\"'()\[\]*`]+$")


def normalise(text: str) -> str:
    """The one normalisation of answers: special-token strings neutralised as in the prompt, lower case, white space
    and edge punctuation of words removed, leading articles dropped, number words up to ten as digits. Words are
    compared whole, never as substrings, so "abnormal" is not "no". An answer of nothing but articles keeps them
    ("A" is an option's letter)."""
    words = [_EDGES.sub("", word) for word in neutralise(text)[0].lower().split()]
    words = [_NUMBERS.get(word, word) for word in words if word]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def _literal(text: str) -> str:
    """An option's text as written, but for case, white space and punctuation around it: "A. fumigatus" keeps its A."""
    return _EDGES.sub("", " ".join(neutralise(text)[0].lower().split()))


# Opening bracket, letter, closing bracket, separator, text. A separator with punctuation marks the letter as a label.
_LETTER = re.compile(r"^(\(?)([A-Za-z])(\)?)(\s*[.:,)]+\s*|\s+[-–—]+\s+|-+\s*|\s+|$)(.*)$", re.DOTALL)
_LABEL = re.compile(r"[.:,)]|\s[-–—]")


def read_choice(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that an answer names, by letter ("B", "B.", "(B)", "B: text") or by its text.

    A lone letter is the option's letter, for that is what the prompt asks for, even where the options' texts are
    letters themselves (blood groups). Letter and text that disagree, a text that two options share, a letter beyond
    the options, or anything else names none.

    Returns:
        The letter, or None.
    """
    answer = answer.strip()
    reading = normalise
    if match := _LETTER.match(answer):
        opening, letter, closing, separator, text = match.groups()
        index, text = LETTERS.index(letter.upper()), normalise(text)
        if index < len(options) and (not text or text == normalise(options[index])):
            return LETTERS[index]
        if opening or closing or _LABEL.search(separator):
            reading = _literal  # "A: lung" must not lose its A as an article, but an option may be "A. fumigatus"
    named = [letter for letter, option in zip(LETTERS, options) if reading(option) == reading(answer)]
    return named[0] if len(named) == 1 and reading(answer) else None
