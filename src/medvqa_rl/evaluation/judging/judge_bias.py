"""Whether a judge is moved by what should not move it: length, wording, confidence, position. Imports no torch.

A check asks the judge twice about the same case, as it is and edited. Edits are pure functions of the case and an
address, so the same evaluation gives the same checks. They hold no merit: a longer, reworded or more confident text
says nothing more, and what means the same as the reference does so whichever of the two comes first.

Published judges prefer longer texts, and the first of two (Zheng et al. 2023, arXiv 2306.05685); the edits are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.phantom.claims import REMARKS
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.stats import cluster_bootstrap, exact_mcnemar, proportion_interval
from medvqa_rl.rewards.judges.rubric import TOP, Grade, GradeRequest

Of = Literal["reasoning", "correctness"]
Edit = Callable[[GradeRequest, Draws], GradeRequest | None]
"""The case edited; None where the edit does not apply to it."""

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
"""Words, in any case, and others of the same meaning."""


def longer_reasoning(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Three sentences that claim nothing, before the reasoning."""
    if not case.reasoning.strip():
        return None
    return replace(case, reasoning=" ".join([*draws.shuffled(NEUTRAL)[:3], case.reasoning.strip()]))


def longer_answer(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Two sentences that claim nothing, before the answer."""
    if not case.answer.strip():
        return None
    return replace(case, answer=" ".join([*draws.shuffled(NEUTRAL)[:2], case.answer.strip()]))


def reworded_reasoning(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Every word of :data:`SYNONYMS` by the other."""
    text = case.reasoning
    for word, other in SYNONYMS:
        text = re.sub(rf"\b{word}\b", partial(_cased, other), text, flags=re.IGNORECASE)
    return None if text == case.reasoning else replace(case, reasoning=text)


def _cased(text: str, match: re.Match[str]) -> str:
    return text[0].upper() + text[1:] if match[0][0].isupper() else text


def reworded_answer(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """An option's letter by its text, its text by its letter; another answer in a sentence."""
    if not case.answer.strip():
        return None
    letter = read_choice(case.answer, case.options) if case.options else None
    if letter is None:
        return replace(case, answer=draws.pick(FRAMES).format(case.answer.strip().removesuffix(".")))
    text = case.options[LETTERS.index(letter)]
    return replace(case, answer=letter if normalise(case.answer) == normalise(text) else text)


def confident_reasoning(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Two sentences of confidence around the reasoning."""
    if not case.reasoning.strip():
        return None
    first, last = draws.shuffled(CONFIDENT)[:2]
    return replace(case, reasoning=f"{first} {case.reasoning.strip()} {last}")


def confident_answer(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Two sentences of confidence around the answer."""
    if not case.answer.strip():
        return None
    first, last = draws.shuffled(CONFIDENT)[:2]
    return replace(case, answer=f"{first} {case.answer.strip()} {last}")


def exchanged(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """The reference and the answer change places. An option is named by letter and text in both, so that neither
    place can be told by its form."""
    answer = full_answer(case)
    return replace(case, gold=answer, answer=case.gold) if answer else None


def full_answer(case: GradeRequest) -> str:
    """The answer in the form of the reference: an option with its letter before it."""
    letter = read_choice(case.answer, case.options) if case.options else None
    return case.answer.strip() if letter is None else f"{letter}: {case.options[LETTERS.index(letter)]}"


def reordered_options(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """The options in reverse, and the letters of reference and answer with them."""
    letters = [read_choice(text, case.options) if case.options else None for text in (case.gold, case.answer)]
    if len(case.options) < 2 or None in letters:
        return None
    options = case.options[::-1]
    gold, answer = (LETTERS[len(options) - 1 - LETTERS.index(str(letter))] for letter in letters)
    return replace(case, options=options, gold=f"{gold}: {options[LETTERS.index(gold)]}", answer=answer)


def phantom_longer(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """Remarks of the phantom world before the reasoning, up to the two that its rules allow."""
    said = case.reasoning
    more = [remark for remark in REMARKS if remark not in said]
    room = 2 - (len(REMARKS) - len(more))
    if room < 1 or not said.strip():
        return None
    return replace(case, reasoning="".join(f"{remark}. " for remark in draws.shuffled(more)[:room]) + said.strip())


def phantom_reworded(case: GradeRequest, draws: Draws) -> GradeRequest | None:
    """What is stated before the conclusion in another order; the world's sentences do not depend on each other."""
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
    """One way in which a judge could be moved."""

    name: str
    of: Of
    edit: Edit
    only_wrong: bool = False
    """Only answers that are wrong."""
    in_full: bool = False
    """Both times the answer is in the form of the reference."""


CHECKS = (
    Check("longer", "reasoning", longer_reasoning),
    Check("reworded", "reasoning", reworded_reasoning),
    Check("wrong and confident", "reasoning", confident_reasoning, only_wrong=True),
    Check("longer", "correctness", longer_answer),
    Check("reworded", "correctness", reworded_answer),
    Check("wrong and confident", "correctness", confident_answer, only_wrong=True),
    Check("reference and answer exchanged", "correctness", exchanged, in_full=True),
    Check("options in reverse", "correctness", reordered_options),
)
EMBEDDED_CHECKS = (
    Check("longer", "reasoning", phantom_longer),
    Check("reworded", "reasoning", phantom_reworded),
    Check("wrong and confident", "reasoning", confident_reasoning, only_wrong=True),
)
"""Of judges that know the sentences of the phantom world alone, and for which others are faults."""
NOT_EMBEDDED = (
    "The embedded judges see the reasoning alone, neither the reference nor the options: exchanging the reference "
    "and the answer, the options' order, and edits of the answer cannot be checked."
)


def build_cases(
    check: Check, cases: Sequence[tuple[EvalRecord, GradeRequest]], seed: int
) -> tuple[list[GradeRequest], list[GradeRequest], list[str]]:
    """What a check asks: cases as they are, the same edited, and the cluster of each; without those to which the edit
    does not apply.

    Args:
        cases: records and what a grader is shown of them.
        seed: of the edits; each is drawn under the seed, the check and the question.
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
    """What is compared: the score from 0 to 3 of reasoning, 1 or 0 for an answer that does or does not mean the same
    as the reference (score 3); NaN where the grader failed."""
    if np.isnan(grade.score) or of == "reasoning":
        return grade.score
    return float(grade.score == TOP)


def moved(
    check: Check, plain: Sequence[Grade], edited: Sequence[Grade], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """What an edit did to the grades.

    Returns:
        ``check``, ``of``, ``n`` (cases that it applies to), ``unscored`` (left out of the rest), ``images``;
        ``changed``, ``raised`` and ``lowered`` (shares) and ``shift`` (mean of edited minus plain, on the scale of
        :func:`level`) with 95 % intervals that resample images, None where nothing is scored; ``p``: exact two-sided
        test whether raised is as likely as lowered (McNemar's for Yes and No, the sign test for scores).
    """
    pairs = [
        (before, after, cluster)
        for one, other, cluster in zip(plain, edited, clusters, strict=True)
        if not np.isnan(before := level(one, check.of)) and not np.isnan(after := level(other, check.of))
    ]
    found: dict[str, Any] = {
        "check": check.name,
        "of": check.of,
        "n": len(plain),
        "unscored": len(plain) - len(pairs),
        "images": len({cluster for _, _, cluster in pairs}),
    }
    if not pairs:
        return found | {"changed": None, "raised": None, "lowered": None, "shift": None, "p": None}
    shifts = np.array([after - before for before, after, _ in pairs])
    kept = [cluster for _, _, cluster in pairs]

    def share(flags: Sequence[bool]) -> Mapping[str, float]:
        return proportion_interval(flags, kept, seed=seed).to_json()

    raised, lowered = (shifts > 0).tolist(), (shifts < 0).tolist()
    return found | {
        "changed": share((shifts != 0).tolist()),
        "raised": share(raised),
        "lowered": share(lowered),
        "shift": cluster_bootstrap(shifts, kept, seed=seed).to_json(),
        "p": exact_mcnemar(lowered, raised).p_value,
    }
