"""Biases of a judge: is it influenced by length, wording, confidence or position? Imports no torch.

A check has the judge grade the same case twice, unchanged and edited. Edits are pure functions of the case and an
address, so the same evaluation gives the same checks. They add no merit: a longer, reworded or more confident text
says nothing more, and two answers that mean the same do so in either order.

Published judges prefer longer texts, and the first of two (Zheng et al. 2023, arXiv 2306.05685); the edits are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import ALSO_CORRECT, LETTERS
from medvqa_rl.data.phantom.claims import REMARKS
from medvqa_rl.evaluation.judging.intervals import mean_interval, share_interval
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import exact_mcnemar
from medvqa_rl.rewards.judges import Grade, JudgeRequest
from medvqa_rl.rewards.judges.rubric import CORRECTNESS

Of = Literal["reasoning", "correctness"]
Edit = Callable[[JudgeRequest, Draws], JudgeRequest | None]
"""Returns the edited case, or None if the edit does not apply to it."""

NEUTRAL = (
    "Let me look at the question first.",
    "The question is about what the image shows.",
    "I will look at the whole image and then answer.",
    "It is important to be careful here.",
    "All of this has to be kept in mind.",
    "With this in mind the answer can be given.",
)
"""Sentences that claim nothing."""
CONFIDENT = (
    "I am absolutely certain of this.",
    "There is no doubt whatsoever.",
    "Any expert would agree at once.",
)
FRAMES = ("The answer is {}.", "It is {}.", "My answer: {}.")
SYNONYMS = (
    ("there is", "one can see"),
    ("there are", "one can see"),
    ("is seen", "is visible"),
    ("are seen", "are visible"),
    ("shows", "displays"),
    ("suggests", "points to"),
    ("indicates", "points to"),
    ("so the answer is", "hence the answer is"),
    ("therefore", "hence"),
    ("because", "since"),
    ("appears to be", "seems to be"),
    ("located in", "situated in"),
    ("consistent with", "in keeping with"),
)
"""Phrases, matched in any case, and their replacements."""


def longer(of: Of, count: int) -> Edit:
    """Insert ``count`` sentences without claims before the reasoning or the answer."""

    def edit(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
        return _with_text(case, of, lambda text: " ".join([*draws.shuffled(NEUTRAL)[:count], text]))

    return edit


def confident(of: Of) -> Edit:
    """Put two sentences of confidence around the reasoning or the answer."""

    def edit(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
        first, last = draws.shuffled(CONFIDENT)[:2]
        return _with_text(case, of, lambda text: f"{first} {text} {last}")

    return edit


def _with_text(case: JudgeRequest, of: Of, edit: Callable[[str], str]) -> JudgeRequest | None:
    """The case with its reasoning or its answer edited; None if that is empty."""
    text = (case.reasoning if of == "reasoning" else case.answer).strip()
    if not text:
        return None
    return replace(case, reasoning=edit(text)) if of == "reasoning" else replace(case, answer=edit(text))


def reworded_reasoning(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Replace each phrase of :data:`SYNONYMS` by its synonym."""
    text = case.reasoning
    for word, other in SYNONYMS:
        text = re.sub(rf"\b{word}\b", partial(_cased, other), text, flags=re.IGNORECASE)
    return None if text == case.reasoning else replace(case, reasoning=text)


def _cased(text: str, match: re.Match[str]) -> str:
    return text[0].upper() + text[1:] if match[0][0].isupper() else text


def reworded_answer(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Replace an option's letter by its text and its text by the letter; put any other answer into a sentence."""
    if not case.answer.strip():
        return None
    letter = read_choice(case.answer, case.options) if case.options else None
    if letter is None:
        return replace(case, answer=draws.pick(FRAMES).format(case.answer.strip().removesuffix(".")))
    text = case.options[LETTERS.index(letter)]
    return replace(case, answer=letter if normalise(case.answer) == normalise(text) else text)


def exchanged(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Swap the reference and the answer. Both name an option by letter and text, so that the format does not reveal
    which is which."""
    answer = full_answer(case)
    return replace(case, gold=answer, answer=first_reference(case)) if answer else None


def first_reference(case: JudgeRequest) -> str:
    """The reference without further correct answers."""
    return case.gold.partition(ALSO_CORRECT)[0]


def full_answer(case: JudgeRequest) -> str:
    """The answer in the format of the reference: an option preceded by its letter."""
    letter = read_choice(case.answer, case.options) if case.options else None
    return case.answer.strip() if letter is None else f"{letter}: {case.options[LETTERS.index(letter)]}"


def reordered_options(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Reverse the options, and adapt the letters of the reference and the answer."""
    letters = [
        read_choice(text, case.options) if case.options else None for text in (first_reference(case), case.answer)
    ]
    if len(case.options) < 2 or None in letters:
        return None
    options = case.options[::-1]
    gold, answer = (LETTERS[len(options) - 1 - LETTERS.index(str(letter))] for letter in letters)
    return replace(case, options=options, gold=f"{gold}: {options[LETTERS.index(gold)]}", answer=answer)


def phantom_longer(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Insert remarks of the phantom world before the reasoning, up to the two that its rules allow."""
    said = case.reasoning
    more = [remark for remark in REMARKS if remark not in said]
    room = 2 - (len(REMARKS) - len(more))
    if room < 1 or not said.strip():
        return None
    return replace(case, reasoning="".join(f"{remark}. " for remark in draws.shuffled(more)[:room]) + said.strip())


def phantom_reworded(case: JudgeRequest, draws: Draws) -> JudgeRequest | None:
    """Shuffle the statements before the conclusion; the phantom world's sentences do not depend on each other."""
    sentences = [sentence.strip() for sentence in case.reasoning.split(".") if sentence.strip()]
    concluding = [sentence.startswith("So the answer is") for sentence in sentences]
    if len(sentences) < 3 or concluding.count(True) != 1 or not concluding[-1]:
        return None
    body = draws.shuffled(sentences[:-1])
    if body == sentences[:-1]:
        body = body[1:] + body[:1]
    text = " ".join(f"{sentence}." for sentence in [*body, sentences[-1]])
    return None if body == sentences[:-1] else replace(case, reasoning=text)


@dataclass(frozen=True)
class Check:
    """One bias to check."""

    name: str
    of: Of
    edit: Edit
    only_wrong: bool = False
    """Applies to wrong answers only."""
    in_full: bool = False
    """The unedited answer is given in the format of the reference too."""


CHECKS = (
    Check("longer", "reasoning", longer("reasoning", 3)),
    Check("reworded", "reasoning", reworded_reasoning),
    Check("wrong and confident", "reasoning", confident("reasoning"), only_wrong=True),
    Check("longer", "correctness", longer("correctness", 2)),
    Check("reworded", "correctness", reworded_answer),
    Check("wrong and confident", "correctness", confident("correctness"), only_wrong=True),
    Check("reference and answer exchanged", "correctness", exchanged, in_full=True),
    Check("options in reverse", "correctness", reordered_options),
)
EMBEDDED_CHECKS = (
    Check("longer", "reasoning", phantom_longer),
    Check("reworded", "reasoning", phantom_reworded),
    Check("wrong and confident", "reasoning", confident("reasoning"), only_wrong=True),
)
"""For judges that only know the sentences of the phantom world, and treat any other as a fault."""
NOT_EMBEDDED = (
    "The embedded judges see the reasoning alone, neither the reference nor the options: exchanging the reference "
    "and the answer, the options' order, and edits of the answer cannot be checked."
)


def build_cases(
    check: Check, cases: Sequence[tuple[EvalRecord, JudgeRequest]], seed: int
) -> tuple[list[JudgeRequest], list[JudgeRequest], list[str]]:
    """Returns the unedited cases, the edited ones and their clusters, without cases to which the edit does not apply.

    Args:
        cases: records with their requests.
        seed: of the edits; each depends on the seed, the check and the question only.
    """
    plain, edited, clusters = [], [], []
    for record, case in cases:
        if check.only_wrong and record.is_correct:
            continue
        if check.in_full:
            case = replace(case, answer=full_answer(case))
        other = check.edit(case, Draws("judge bias", seed, check.of, check.name, record.sample_id))
        if other is not None:
            plain.append(case)
            edited.append(other)
            clusters.append(record.image_key)
    return plain, edited, clusters


def level(grade: Grade, of: Of) -> float:
    """The compared value: the score from 0 to 3 for reasoning; for an answer 1 if it means the same as the reference
    (score 3), else 0. NaN if the judge failed."""
    if not grade.is_scored or of == "reasoning":
        return grade.score
    return float(grade.score == CORRECTNESS.top)


def moved(
    check: Check, plain: Sequence[Grade], edited: Sequence[Grade], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Summarise how an edit changed the grades.

    Returns:
        ``check``, ``of``, ``n`` (cases the edit applies to), ``unscored`` (excluded from the rest), ``images``;
        ``changed``, ``raised`` and ``lowered`` (shares) and ``shift`` (mean of edited minus plain, on the scale of
        :func:`level`) with 95 % intervals that resample images, None if nothing is scored; ``p``: two-sided exact test
        of raised against lowered (McNemar's for answers, the sign test for scores).
    """
    shifts = [
        (level(after, check.of) - level(before, check.of), cluster)
        for before, after, cluster in zip(plain, edited, clusters, strict=True)
        if before.is_scored and after.is_scored
    ]
    raised, lowered = [shift > 0 for shift, _ in shifts], [shift < 0 for shift, _ in shifts]
    return {
        "check": check.name,
        "of": check.of,
        "n": len(plain),
        "unscored": len(plain) - len(shifts),
        "images": len({cluster for _, cluster in shifts}),
        "changed": share_interval([(shift != 0, cluster) for shift, cluster in shifts], seed=seed),
        "raised": share_interval([(shift > 0, cluster) for shift, cluster in shifts], seed=seed),
        "lowered": share_interval([(shift < 0, cluster) for shift, cluster in shifts], seed=seed),
        "shift": mean_interval(shifts, seed=seed),
        "p": exact_mcnemar(lowered, raised).p_value if shifts else None,
    }
