"""A question under attack: its answers, a wrong one, and the other questions whose texts an attack can borrow.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from medvqa_rl.core.answers import is_correct, token_f1
from medvqa_rl.core.prompts import SECTIONS, as_asked
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.text import is_yes_no, normalise
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS, Sample, Template, Wording


@dataclass(frozen=True)
class Borrowed:
    """The reasoning of another question with its answer, which is wrong here."""

    reasoning: str
    answer: str
    """In the form in which this question is answered."""


@dataclass(frozen=True)
class Target:
    """A question as its prompt asks it, with what the attacks on it write."""

    sample: Sample
    """After :func:`as_asked`."""
    wrong: str
    """A plain wrong answer: a letter for choice questions, text otherwise."""
    template: Template = "think_answer"
    wording: Wording = DEFAULT_WORDING
    borrowed: Sequence[Borrowed] = ()
    """First those whose answer is a wrong option here or of the same type; of these, the most similar questions."""
    others: Sequence[str] = ()
    """Answers to other questions, wrong here, all different."""
    seed: int = 0

    def text_of(self, answer: str) -> str:
        """An answer in words: the option's text for a letter."""
        return self.sample.options[LETTERS.index(answer)] if self.sample.answer_type == "choice" else answer

    def compose(self, think: str, answer: str) -> str:
        """A completion in the requested format. Where no reasoning is asked for, it stands before the answer, in the
        answer's section."""
        sections = SECTIONS[self.template]
        if "think" not in sections:
            think, answer = "", f"{think} {answer}".strip()
        if not sections:
            return answer
        texts = {"describe": "The image is described by what follows.", "think": think, "answer": answer}
        return "".join(texts[name].join(self.wording.tag(name)) for name in sections)


def make_target(
    original: Sample, pool: Sequence[Sample], *, template: Template, wording: Wording, seed: int
) -> Target | None:
    """Choose a wrong answer to a question, and what to borrow from others.

    A pure function of its arguments. Choice questions get one of the wrong options; closed and open ones the answer to
    another question, similar if possible, that the scorer calls wrong and that shares the fewest words with the gold
    answer.

    Args:
        original: as the data set stores it.
        pool: other questions of the data set; may contain this one.
        template: of the prompt.
        wording: of the prompt.
        seed: of the choices.

    Returns:
        None if no wrong answer is known.
    """
    sample = as_asked(original, template)
    draws = Draws("reward attack", seed, sample.id)
    donors = [as_asked(donor, template) for donor in draws.shuffled(pool) if donor.id != sample.id]
    donors.sort(key=lambda donor: -token_f1(donor.question, sample.question))
    given = [*original.options, *(donor.answer_text for donor in donors if donor.answer_type == sample.answer_type)]
    texts = list(dict.fromkeys(text.strip() for text in given if _is_wrong(sample, text)))
    if sample.answer_type == "choice":
        golds = _gold_options(sample)
        letters = [letter for letter, text in zip(LETTERS, sample.options) if normalise(text) not in golds]
        wrong = draws.pick(letters) if letters else None
    else:
        if is_yes_no(sample.answer):
            texts = list(dict.fromkeys([*(text for text in ("no", "yes") if _is_wrong(sample, text)), *texts]))
        wrong = min(texts, key=lambda text: token_f1(text, *sample.answers), default=None)
    if wrong is None:
        return None
    borrowed = [found for donor in donors if (found := _borrow(sample, donor)) is not None]
    answers = {*LETTERS[: len(sample.options)]} or {*texts}
    borrowed.sort(key=lambda item: item.answer not in answers)
    return Target(sample, wrong, template, wording, borrowed, texts, seed)


def _is_wrong(sample: Sample, text: str) -> bool:
    """Whether a text is an answer, and a wrong one: not that of a right option under another letter either."""
    return bool(normalise(text)) and not is_correct(sample, text) and normalise(text) not in _gold_options(sample)


def _gold_options(sample: Sample) -> list[str]:
    """The texts of the right options, normalised; none without options."""
    return [normalise(sample.options[LETTERS.index(letter)]) for letter in sample.answers if sample.options]


def _borrow(sample: Sample, donor: Sample) -> Borrowed | None:
    """The reasoning of another question and its answer as an answer to this one; None if it has no reasoning, or if
    its answer is right here."""
    text = donor.answer_text
    if not donor.reasoning.strip() or not _is_wrong(sample, text):
        return None
    letters = [letter for letter, option in zip(LETTERS, sample.options) if normalise(option) == normalise(text)]
    answer = letters[0] if letters else text.strip()
    named = f"{text} {letters[0]}" if letters else text
    return Borrowed(_renamed(donor, text, named), answer)


def with_answer(target: Target, answer: str) -> str:
    """The reference reasoning with another answer in place of the gold answer; empty without a reference."""
    text = target.text_of(answer)
    named = f"{text} {answer}" if target.sample.answer_type == "choice" else text
    return _renamed(target.sample, text, named)


def _renamed(sample: Sample, text: str, named: str) -> str:
    """A sample's reasoning with another answer in place of its own.

    Args:
        text: the other answer.
        named: the other answer with its letter, where the reasoning has one.
    """
    own, reasoning = sample.answer_text, sample.reasoning.strip()
    letter = rf"(?P<letter> {sample.answer}(?!\w))?" if sample.answer_type == "choice" else "(?P<letter>(?!))?"
    found = [*re.finditer(rf"(?<!\w){re.escape(own)}(?!\w){letter}", reasoning, re.IGNORECASE)] if own else []
    if is_yes_no(own):  # "no" is a word of many sentences: only the conclusion names the answer
        found = found[-1:]
    for match in reversed(found):
        new = named if match["letter"] else text
        reasoning = reasoning[: match.start()] + new + reasoning[match.end() :]
    return reasoning
