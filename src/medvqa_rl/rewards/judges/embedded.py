"""Grades of reasoning from an embedded judge, which can only say Yes or No. Imports no torch.

An embedded judge writes no sentences, does not read the answer and sees no image. The score combines what can be
determined without those: whether the reasoning is coherent (the judge's Yes), and whether it concludes with the answer
that is then given. It does not use the reference answer, which the correctness reward already covers, nor the oracle
of the phantom world, which knows the image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from medvqa_rl.core.answers import read_choice
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.rewards.judges.protocol import Grade, Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import NO_REASONING

Conclusion = Literal["agrees", "differs", "none"]

LEVELS: dict[tuple[bool, Conclusion], tuple[int, str]] = {
    (True, "agrees"): (3, "Coherent, and it concludes with the answer given."),
    (True, "none"): (2, "Coherent, but it draws no conclusion."),
    (True, "differs"): (1, "Coherent, but it concludes with another answer than the one given."),
    (False, "agrees"): (1, "Not coherent, though it concludes with the answer given."),
    (False, "none"): (0, "Not coherent, and it draws no conclusion."),
    (False, "differs"): (0, "Not coherent, and it concludes with another answer than the one given."),
}
"""(judge says Yes, conclusion) -> score and reason. Without reasoning the score is 0."""

LEVELS_HASH = hashlib.sha256(repr(LEVELS).encode()).hexdigest()[:16]

_CONCLUSION = re.compile(r"\bthe answer is:?\s+(.+?)\s*(?:\.(?=\s|$)|$)", re.IGNORECASE | re.MULTILINE)
_WITH_LETTER = re.compile(r"(.+?)\s+([A-Z])")


def conclusion(reasoning: str) -> str | None:
    """What follows the last "the answer is", up to the end of its sentence; None if there is none."""
    found = _CONCLUSION.findall(reasoning)
    return found[-1] if found else None


def compare_conclusion(request: JudgeRequest) -> Conclusion:
    """Compare the conclusion of the reasoning with the answer given.

    For choice questions both must name the same option: by letter, by text, or by text followed by its letter
    ("cyst B"). Otherwise both must be equal after :func:`normalise`. Nothing agrees with a missing answer.
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


class EmbeddedJudge:
    """Grades reasoning by :data:`LEVELS`."""

    def __init__(self, coherence: Judge) -> None:
        """
        Args:
            coherence: says whether reasoning is coherent.
        """
        self._coherence = coherence

    @property
    def identity(self) -> JudgeIdentity:
        return replace(self._coherence.identity, prompt_hash=LEVELS_HASH)

    @property
    def counters(self) -> Mapping[str, float]:
        return self._coherence.counters

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; a grade fails where the judge of coherence fails."""
        return [
            _combine(request, verdict)
            for request, verdict in zip(requests, self._coherence.grade(requests), strict=True)
        ]


def _combine(request: JudgeRequest, verdict: Grade) -> Grade:
    if not verdict.is_scored:
        return verdict
    if not request.reasoning.strip():
        return NO_REASONING
    score, reason = LEVELS[verdict.score == 1, compare_conclusion(request)]
    return Grade(float(score), reason)
