"""Parse the claims in phantom reasoning and check whether they are true and coherent.

There are two oracles. :func:`faithfulness` compares claims with the scene, so it depends on the image.
:func:`is_coherent` uses only the text and the rules of the phantom world; it labels data for judges, which read only
text.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from medvqa_rl.data.phantom.world import (
    ALL_KINDS,
    ALL_ORGANS,
    COUNTS,
    KINDS,
    LEVELS,
    MODALITIES,
    MODALITY_OF,
    ORGANS,
    SIDES,
    SIZES,
    Finding,
    Scene,
)

Topic = Literal["modality", "organ", "finding", "absent", "clear", "none"]


class Claim(NamedTuple):
    """One checkable statement."""

    topic: Topic
    value: str
    """The modality, organ, kind or place; empty for the topic none (no finding at all)."""
    finding: Finding | None = None
    """Count, size and place of a claimed finding."""


def _one_of(words: tuple[str, ...]) -> str:
    return "(" + "|".join(words) + ")"


_KIND = _one_of(ALL_KINDS)
_PATTERNS: tuple[tuple[Topic, re.Pattern[str]], ...] = (
    ("modality", re.compile(rf"The modality is {_one_of(MODALITIES)}")),
    ("organ", re.compile(rf"The organ is {_one_of(ALL_ORGANS)}")),
    (
        "finding",
        re.compile(
            rf"There is an? {_KIND}: "
            rf"count {_one_of(COUNTS)}, size {_one_of(SIZES)}, {_one_of(LEVELS)} {_one_of(SIDES)}"
        ),
    ),
    ("absent", re.compile(rf"No {_KIND} is seen")),
    ("clear", re.compile(rf"The {_one_of(SIDES + LEVELS)} part is clear")),
    ("none", re.compile(r"No finding is seen")),
)
_CONCLUSION = re.compile(r"So the answer is ([\w ]+?)(?: [A-H])?")
REMARKS = ("The image is sharp", "The view is complete", "The quality is good")
"""Sentences without claims about the scene; more than two in a text count as padding."""


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in text.split(".") if sentence.strip()]


def _read(sentence: str) -> Claim | None:
    for topic, pattern in _PATTERNS:
        match = pattern.fullmatch(sentence)
        if match is None:
            continue
        if topic == "finding":
            kind, count, size, level, side = match.groups()
            return Claim(topic, kind, Finding(kind, side, level, size, COUNTS.index(count) + 1))
        return Claim(topic, match[1] if pattern.groups else "")
    return None


def claims(text: str) -> list[Claim]:
    """Checkable statements of a reasoning text, in order; conclusions and remarks are skipped."""
    return [claim for sentence in _sentences(text) if (claim := _read(sentence)) is not None]


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether a claim holds for the scene; a finding must match in kind, count, size and place."""
    if claim.topic == "modality":
        return claim.value == scene.modality
    if claim.topic == "organ":
        return claim.value == scene.organ
    if claim.topic == "finding":
        return claim.finding in scene.findings
    if claim.topic == "absent":
        return scene.find(claim.value) is None
    if claim.topic == "clear":
        return all(claim.value not in (finding.side, finding.level) for finding in scene.findings)
    return not scene.findings


def faithfulness(text: str, scene: Scene) -> float | None:
    """Share of claims in the text that hold for the scene, in [0, 1]; None if the text has no claims."""
    found = claims(text)
    return sum(is_true(claim, scene) for claim in found) / len(found) if found else None


def distinct_truths(text: str, scene: Scene) -> int:
    """Number of different claims in the text that hold for the scene: how much it says that is so."""
    return len({claim for claim in claims(text) if is_true(claim, scene)})


FLAWS = (
    "no claim",
    "no sentence of the world",
    "repetition",
    "padding",
    "unfounded conclusion",
    "two modalities",
    "two organs",
    "one kind twice",
    "three kinds",
    "impossible together",
    "seen and not seen",
    "findings and none",
    "clear and not clear",
    "count of four",
)
"""Flaws of a reasoning text that can be found without the image."""


def is_coherent(text: str) -> bool:
    """Whether a reasoning text makes sense without the image.

    A coherent text makes at least one claim and only uses sentences of the phantom world. Its modality, organ and
    kinds of finding are compatible, no claim contradicts another, and the conclusion was stated before. No sentence
    occurs twice, and there are at most two remarks.
    """
    return not flaws(text)


def flaws(text: str) -> list[str]:
    """List the :data:`FLAWS` of a reasoning text; empty if it is coherent."""
    sentences = _sentences(text)
    found: list[Claim] = []
    is_foreign = is_unfounded = False
    for sentence in sentences:
        claim, conclusion = _read(sentence), _CONCLUSION.fullmatch(sentence)
        if claim is not None:
            found.append(claim)
        elif conclusion is not None:
            is_unfounded |= not _follows(conclusion[1], found)
        else:
            is_foreign |= sentence not in REMARKS
    has = {
        "no claim": not found,
        "no sentence of the world": is_foreign,
        "repetition": len(set(sentences)) < len(sentences),
        "padding": sum(sentence in REMARKS for sentence in sentences) > 2,
        "unfounded conclusion": is_unfounded,
        **_conflicts(found),
    }
    return [flaw for flaw in FLAWS if has[flaw]]


def _follows(answer: str, found: list[Claim]) -> bool:
    """Whether a conclusion was stated before. Yes, no and equal depend on the question and need any claim."""
    if answer in ("yes", "no", "equal"):
        return bool(found)
    stated = set()
    for claim in found:
        if claim.topic in ("modality", "organ", "finding"):
            stated.add(claim.value)
        if claim.finding is not None:
            finding = claim.finding
            stated |= {finding.side, finding.level, finding.place, finding.size, finding.count_word}
    return answer in stated


def _conflicts(found: list[Claim]) -> dict[str, bool]:
    """Check for each flaw that involves several claims whether it is present."""
    modalities = {claim.value for claim in found if claim.topic == "modality"}
    organs = {claim.value for claim in found if claim.topic == "organ"}
    findings = [claim.finding for claim in found if claim.finding is not None]
    kinds = [finding.kind for finding in findings]
    absent = {claim.value for claim in found if claim.topic == "absent"}
    clear = {claim.value for claim in found if claim.topic == "clear"}
    possible = set(modalities or MODALITIES) & ({MODALITY_OF[organ] for organ in organs} or set(ORGANS))
    return {
        "two modalities": len(modalities) > 1,
        "two organs": len(organs) > 1,
        "one kind twice": len(set(kinds)) < len(kinds),
        "three kinds": len(kinds) > 2,
        "impossible together": not any(set(kinds) | absent <= set(KINDS[modality]) for modality in possible),
        "seen and not seen": bool(absent & set(kinds)),
        "findings and none": any(claim.topic == "none" for claim in found) and bool(kinds),
        "clear and not clear": any({finding.side, finding.level} & clear for finding in findings),
        "count of four": any(finding.count == 4 for finding in findings),
    }
