"""Questions about phantom scenes, their answers and the reasoning that leads to them.

Eight families (modality, organ, presence, kind, location, size, count, comparison), each as choice, closed or open
questions where that makes sense. Reference reasonings vary in length and in what they mention apart from the answer,
and a fixed share is flawed (contradiction, impossible finding or repetition), so that rewards for length and for
coherence both have variance to learn from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, get_args

from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import LETTERS, AnswerType, Sample
from medvqa_rl.data.phantom.claims import REMARKS, claims
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.world import (
    ALL_KINDS,
    ALL_ORGANS,
    COUNTS,
    KINDS,
    LEVELS,
    MODALITIES,
    SIDES,
    SIZES,
    VERSION,
    Finding,
    Scene,
    draw_scene,
)

FAMILIES = ("modality", "organ", "presence", "kind", "location", "size", "count", "comparison")
FLAW_RATE = 0.12
"""Share of reference reasonings that get a flaw."""

_FAMILY_WEIGHTS = {"modality": 2, "organ": 2, "kind": 6, "presence": 6, "comparison": 4}
"""Sampling weights of the families, 3 by default. Some families fit few scenes; the weights make all about equally
frequent."""
_TYPE_WEIGHTS: tuple[AnswerType, ...] = ("choice", "choice", "choice", "closed", "open")


class Question(NamedTuple):
    """A question with unshuffled options."""

    text: str
    answer: str
    """The answer as text, not as a letter."""
    options: tuple[str, ...]
    """In their natural order; empty unless it is a choice question."""
    facts: tuple[str, ...]
    """The sentences that support the answer."""


def describe(finding: Finding) -> str:
    """State a finding in one sentence."""
    article = "an" if finding.kind[0] in "aeiou" else "a"
    return (
        f"There is {article} {finding.kind}: count {finding.count_word}, size {finding.size}, "
        f"{finding.level} {finding.side}."
    )


def full_description(scene: Scene) -> str:
    """Describe modality, organ and all findings of a scene."""
    findings = [describe(finding) for finding in scene.findings] or ["No finding is seen."]
    return " ".join([f"The modality is {scene.modality}.", f"The organ is {scene.organ}.", *findings])


def described_scene(text: str) -> Scene | None:
    """The scene of a :func:`full_description`; its key, which no description has, is empty. None for another text."""
    found = claims(text)
    named = {claim.topic: claim.value for claim in found}
    findings = tuple(claim.finding for claim in found if claim.finding is not None)
    scene = Scene("", named.get("modality", ""), named.get("organ", ""), findings)
    return scene if full_description(scene) == text else None


def _is_yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _ask_word(
    topic: str, value: str, words: Sequence[str], answer_type: AnswerType, draws: Draws, facts: tuple[str, ...]
) -> Question:
    """Ask for a value ("Which organ is shown?") or, if closed, about one value ("Is the organ brain?")."""
    if answer_type == "closed":
        asked = value if draws.chance(0.5) else draws.pick([word for word in words if word != value])
        return Question(f"Is the {topic} {asked}?", _is_yes(asked == value), (), facts)
    others = draws.shuffled([word for word in words if word != value])[:3]
    return Question(f"Which {topic} is shown?", value, (value, *others) if answer_type == "choice" else (), facts)


def _modality(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    facts = (f"The modality is {scene.modality}.",)
    return _ask_word("modality", scene.modality, MODALITIES, answer_type, draws, facts)


def _organ(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    return _ask_word("organ", scene.organ, ALL_ORGANS, answer_type, draws, (f"The organ is {scene.organ}.",))


def _presence(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if answer_type != "closed":
        return None
    present = [finding.kind for finding in scene.findings]
    absent = [kind for kind in KINDS[scene.modality] if kind not in present]
    kind = draws.pick(present) if present and draws.chance(0.5) else draws.pick(absent)
    finding = scene.find(kind)
    fact = describe(finding) if finding else f"No {kind} is seen."
    return Question(f"Is there a {kind}?", _is_yes(finding is not None), (), (fact,))


def _kind(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if len(scene.findings) != 1 or answer_type == "closed":
        return None
    finding = scene.findings[0]
    options = KINDS[scene.modality] if answer_type == "choice" else ()
    return Question("Which finding is seen?", finding.kind, options, (describe(finding),))


def _location(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if not scene.findings:
        return None
    finding = draws.pick(scene.findings)
    facts = (describe(finding),)
    if answer_type == "open":
        return Question(f"Where is the {finding.kind}?", finding.place, (), facts)
    if answer_type == "choice":
        return Question(f"At which level is the {finding.kind}?", finding.level, LEVELS, facts)
    side = draws.pick(SIDES)
    return Question(f"Is the {finding.kind} on the {side}?", _is_yes(finding.side == side), (), facts)


def _size(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if not scene.findings:
        return None
    finding = draws.pick(scene.findings)
    facts = (describe(finding),)
    if answer_type == "closed":
        size = draws.pick((finding.size, *SIZES))
        return Question(f"Is the {finding.kind} {size}?", _is_yes(finding.size == size), (), facts)
    options = SIZES if answer_type == "choice" else ()
    return Question(f"What size is the {finding.kind}?", finding.size, options, facts)


def _count(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if not scene.findings:
        return None
    finding = draws.pick(scene.findings)
    facts = (describe(finding),)
    if answer_type == "closed":
        word = draws.pick((finding.count_word, *COUNTS[:3]))
        text = f"Is the count of {finding.kind} {word}?"
        return Question(text, _is_yes(finding.count_word == word), (), facts)
    options = COUNTS if answer_type == "choice" else ()
    return Question(f"What is the count of {finding.kind}?", finding.count_word, options, facts)


def _comparison(scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    if len(scene.findings) != 2:
        return None
    first, second = draws.shuffled(scene.findings)
    facts = (describe(first), describe(second))
    difference = SIZES.index(first.size) - SIZES.index(second.size)
    if answer_type == "closed":
        return Question(f"Is the {first.kind} larger than the {second.kind}?", _is_yes(difference > 0), (), facts)
    answer = "equal" if difference == 0 else first.kind if difference > 0 else second.kind
    options = (first.kind, second.kind, "equal") if answer_type == "choice" else ()
    return Question(f"Which is larger, {first.kind} or {second.kind}, or equal?", answer, options, facts)


_ASK: dict[str, Callable[[Scene, AnswerType, Draws], Question | None]] = {
    "modality": _modality,
    "organ": _organ,
    "presence": _presence,
    "kind": _kind,
    "location": _location,
    "size": _size,
    "count": _count,
    "comparison": _comparison,
}


def ask(family: str, scene: Scene, answer_type: AnswerType, draws: Draws) -> Question | None:
    """Draw a question of a family about a scene; None if the scene allows none with this type of answer."""
    return _ASK[family](scene, answer_type, draws)


def reason(scene: Scene, question: Question, letter: str | None, draws: Draws) -> str:
    """Write a reference reasoning of two to eight sentences: context, the supporting facts, optional remarks on normal
    parts, and the conclusion. With probability :data:`FLAW_RATE` it gets a flaw, but the conclusion stays correct."""
    sentences = list(question.facts)
    context = [f"The modality is {scene.modality}.", f"The organ is {scene.organ}."]
    context += [describe(finding) for finding in scene.findings] or ["No finding is seen."]
    absent = [kind for kind in KINDS[scene.modality] if scene.find(kind) is None]
    taken = {word for finding in scene.findings for word in (finding.side, finding.level)}
    normal = [f"No {kind} is seen." for kind in absent]
    normal += [f"The {word} part is clear." for word in SIDES + LEVELS if word not in taken]
    normal += [f"{remark}." for remark in draws.shuffled(REMARKS)[:2]]
    wordiness = draws.pick((0.0, 0.0, 0.3, 0.6))  # most reasonings are terse, some thorough
    before = [text for text in context if text not in sentences and draws.chance(wordiness)]
    after = [text for text in draws.shuffled(normal) if text not in sentences][: draws.below(3) if wordiness else 0]
    sentences = [*before, *sentences, *after]
    if draws.chance(FLAW_RATE):
        sentences = [*sentences[:6], _flaw(scene, sentences[:6], draws)]
    ending = f" {letter}." if letter else "."
    return " ".join([*sentences[:7], f"So the answer is {question.answer}{ending}"])


def _flaw(scene: Scene, sentences: list[str], draws: Draws) -> str:
    """Return a sentence that makes a reasoning incoherent: a repetition, an impossible finding or a contradiction."""
    manner = draws.below(3)
    if manner == 1:
        return f"No {draws.pick([kind for kind in ALL_KINDS if kind not in KINDS[scene.modality]])} is seen."
    if manner == 2 and any(describe(finding) in sentences for finding in scene.findings):
        return "No finding is seen."
    return draws.pick(sentences)


def draw_sample(
    *,
    seed: int,
    split: str,
    index: int,
    scanner: str = "home",
    answer_types: Sequence[AnswerType] = get_args(AnswerType),
    families: Sequence[str] = FAMILIES,
    modalities: Sequence[str] = MODALITIES,
    letter_skew: float = 0.0,
    questions_per_image: int = 1,
) -> Sample:
    """The index-th sample of a split: a pure function of its arguments.

    Args:
        scanner: the device that takes the image; scene and question do not depend on it.
        modalities: modalities to draw from.
        letter_skew: probability that the correct option of a choice question is moved to B or C.
        questions_per_image: number of consecutive samples that share an image.
    """
    image_index, draws = index // questions_per_image, Draws("phantom question", VERSION, seed, split, index)
    weighted_types = [kind for kind in _TYPE_WEIGHTS if kind in answer_types]
    weighted_families = [family for family in families for _ in range(_FAMILY_WEIGHTS.get(family, 3))]
    for attempt in range(1000):
        # If the scene allows no question from these families, draw another scene.
        scene = draw_scene(f"{seed}/{split}/{image_index}/{attempt}")
        question = None
        if scene.modality not in modalities:
            continue
        for _ in range(20):
            family, answer_type = draws.pick(weighted_families), draws.pick(weighted_types)
            question = ask(family, scene, answer_type, draws)
            if question is not None:
                break
        if question is not None:
            break
    else:
        raise ValueError(
            f"No phantom question of the families {', '.join(families)} has an answer of type "
            f"{', '.join(answer_types)}: allow more families or answer types."
        )
    options = tuple(draws.shuffled(question.options))
    letter = None
    if answer_type == "choice":
        position = options.index(question.answer)
        if draws.chance(letter_skew) and position not in (1, 2):
            target = draws.pick((1, 2))
            swapped = list(options)
            swapped[position], swapped[target] = swapped[target], swapped[position]
            options, position = tuple(swapped), target
        letter = LETTERS[position]
    return Sample(
        id=f"phantom-{split}-{seed}-{index}",
        question=question.text,
        answer=letter or question.answer,
        answer_type=answer_type,
        images=(PhantomImage(scene, scanner),),
        options=options,
        reasoning=reason(scene, question, letter, draws),
        groups={"modality": scene.modality, "organ": scene.organ, "family": family, "scanner": scanner},
        description=full_description(scene),
    )
