"""Grades by an embedded judge, which can say Yes or No to reasoning and nothing else. Imports no torch.

It writes no sentences, does not read the answer and sees no image. What can be told honestly from it and from the
text: whether the reasoning is coherent (the judge's Yes), and whether the reasoning concludes with the answer that is
then given. The reference answer is not used, for the correctness reward pays for it already; nor is the oracle of the
phantom world, which knows the image.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import NO_REASONING, Grade, GradeRequest

Conclusion = Literal["agrees", "differs", "none"]

LEVELS: dict[tuple[bool, Conclusion], tuple[int, str]] = {
    (True, "agrees"): (3, "Coherent, and it concludes with the answer given."),
    (True, "none"): (2, "Coherent, but it draws no conclusion."),
    (True, "differs"): (1, "Coherent, but it concludes with another answer than the one given."),
    (False, "agrees"): (1, "Not coherent, though it concludes with the answer given."),
    (False, "none"): (0, "Not coherent, and it draws no conclusion."),
    (False, "differs"): (0, "Not coherent, and it concludes with another answer than the one given."),
}
"""(the judge says Yes, the conclusion) -> score and reason. Without reasoning the score is 0."""

RUBRIC_HASH = hashlib.sha256(repr(LEVELS).encode()).hexdigest()[:16]

_CONCLUSION = re.compile(r"\bthe answer is:?\s+(.+?)\s*(?:\.(?=\s|$)|$)", re.IGNORECASE | re.MULTILINE)
_WITH_LETTER = re.compile(r"(.+?)\s+([A-Z])")


def conclusion(reasoning: str) -> str | None:
    """What stands behind the last "the answer is", to the end of its sentence; None where there is none."""
    found = _CONCLUSION.findall(reasoning)
    return found[-1] if found else None


def compare_conclusion(request: GradeRequest) -> Conclusion:
    """Whether the reasoning concludes with the answer that is given.

    For choice questions both must name the same option: by letter, by text, or by its text followed by its letter
    ("cyst B"). Otherwise both must be equal after :func:`normalise`. No answer agrees with nothing.
    """
    found = conclusion(request.reasoning)
    if found is None:
        return "none"
    if request.options:
        given = read_choice(request.answer, request.options)
        return "agrees" if given is not None and _option(found, request.options) == given else "differs"
    answer = normalise(request.answer)
    return "agrees" if answer and normalise(found) == answer else "differs"


def _option(text: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that a conclusion names."""
    letter = read_choice(text, options)
    match = _WITH_LETTER.fullmatch(text)
    if letter is None and match is not None:
        index = LETTERS.index(match[2])
        is_that = index < len(options) and normalise(options[index]) == normalise(match[1])
        letter = match[2] if is_that else None
    return letter


class EmbeddedGrader:
    """Grades reasoning by :data:`LEVELS`."""

    def __init__(self, judge: Judge) -> None:
        """
        Args:
            judge: says whether reasoning is coherent.
        """
        self._judge = judge

    @property
    def identity(self) -> JudgeIdentity:
        return replace(self._judge.identity, prompt_hash=RUBRIC_HASH)

    @property
    def counters(self) -> Mapping[str, float]:
        return self._judge.counters

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request; failed where the judge fails."""
        verdicts = self._judge.judge(
            [JudgeRequest(request.question, request.options, request.reasoning) for request in requests]
        )
        grades: list[Grade] = []
        for request, verdict in zip(requests, verdicts, strict=True):
            if math.isnan(verdict.value):
                grades.append(Grade.failed(verdict.reason))
            elif not request.reasoning.strip():
                grades.append(NO_REASONING)
            else:
                score, reason = LEVELS[verdict.value == 1, compare_conclusion(request)]
                grades.append(Grade(float(score), reason))
        return grades
