"""Reasoning texts of the phantom world with their labels, for training and measuring judges. Imports no torch.

A text is a reference reasoning, an edited one that is meant to stay coherent, or a damaged one. Its label is always
:func:`is_coherent` of the final text: damage that happens to leave a text coherent makes a hard positive, and some
reference reasonings are flawed already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.claims import REMARKS, is_coherent
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.phantom.questions import describe, draw_sample
from medvqa_rl.data.phantom.world import (
    ALL_KINDS,
    ALL_ORGANS,
    COUNTS,
    KINDS,
    LEVELS,
    MODALITIES,
    ORGANS,
    SIDES,
    SIZES,
    Finding,
    Scene,
)

Mixture = Literal["broad", "damaged"]
"""Sources of the texts. broad: 25 % references, 30 % edited, 45 % damaged. damaged: 15 % references, 25 % edited, 60 %
damaged, a quarter of them twice."""

_STRAY = ("The patient is well", "Compare with an earlier image", "It looks normal", "I am not sure", "Wait")
"""Sentences that do not belong to the phantom world."""
_WORDS = ("the", "is", "of", "There", "No", "a", "So", "answer", "seen", "part", "clear", ":", ",", *SIZES, *SIDES)
_ANSWERS = (*MODALITIES, *ALL_ORGANS, *ALL_KINDS, *SIDES, *LEVELS, *SIZES, *COUNTS, "yes", "no", "equal")


class Reasoning(NamedTuple):
    """A text and the question that it answers."""

    sample: Sample
    text: str
    kind: str
    """Source of the text: ``reference``, ``coherent`` (edited, meant to stay coherent) or a key of :data:`DAMAGES`."""

    @property
    def is_coherent(self) -> bool:
        return is_coherent(self.text)


def draw_reasoning(seed: int, split: str, index: int, mixture: Mixture = "broad") -> Reasoning:
    """The index-th text of a split: a pure function of its arguments."""
    draws = Draws("phantom reasoning", seed, split, index, mixture)
    sample = draw_sample(seed=seed, split=f"reasonings {split}", index=index)
    image = sample.images[0]
    assert isinstance(image, PhantomImage)
    sentences = [sentence.strip() for sentence in sample.reasoning.split(".") if sentence.strip()]
    manner = draws.uniform()
    references, coherent = (0.25, 0.55) if mixture == "broad" else (0.15, 0.4)
    if manner < references:
        return Reasoning(sample, sample.reasoning, "reference")
    sentences = _enrich(sentences, image.scene, draws)
    if manner < coherent:
        return Reasoning(sample, _join(sentences), "coherent")
    name = draws.pick(_DRAWN)
    text = DAMAGES[name](sentences, image.scene, draws)
    if mixture == "damaged" and draws.chance(0.25):
        again = [sentence.strip() for sentence in text.split(".") if sentence.strip()]
        text = DAMAGES[draws.pick(_DRAWN)](again, image.scene, draws)
    return Reasoning(sample, text, name)


def _join(sentences: list[str]) -> str:
    return "".join(f" {sentence}." for sentence in sentences).strip()


def _article(kind: str) -> str:
    return "an" if kind[0] in "aeiou" else "a"


def _enrich(sentences: list[str], scene: Scene, draws: Draws) -> list[str]:
    """Add true sentences before the conclusion; sometimes shuffle them or replace the conclusion."""
    body, conclusion = sentences[:-1], sentences[-1]
    more = [f"The modality is {scene.modality}", f"The organ is {scene.organ}", *REMARKS]
    more += [describe(finding).removesuffix(".") for finding in scene.findings] or ["No finding is seen"]
    more += [f"No {kind} is seen" for kind in KINDS[scene.modality] if scene.find(kind) is None]
    taken = {word for finding in scene.findings for word in (finding.side, finding.level)}
    more += [f"The {word} part is clear" for word in SIDES + LEVELS if word not in taken]
    for sentence in draws.shuffled(more)[: draws.pick((0, 1, 2, 3, 5))]:
        if sentence not in body:
            body.insert(draws.below(len(body) + 1), sentence)
    if draws.chance(0.15):
        body = draws.shuffled(body)
    if draws.chance(0.25):
        finding = draws.pick(scene.findings) if scene.findings else None
        words = [scene.modality, scene.organ, "yes", "no"]
        words += [finding.kind, finding.place, finding.size, finding.count_word, finding.side] if finding else []
        conclusion = f"So the answer is {draws.pick(words)}{draws.pick(('', ' A', ' B', ' C', ' D'))}"
    return [*body, conclusion]


def _swap_word(words: tuple[str, ...]) -> Callable[[list[str], Scene, Draws], str]:
    """Return a damage that replaces one word from a list by another word from the list."""

    def damage(sentences: list[str], scene: Scene, draws: Draws) -> str:
        tokens = _join(sentences).split(" ")
        positions = [position for position, token in enumerate(tokens) if token.strip(".,:") in words]
        if not positions:
            return _insert(f"No {draws.pick(ALL_KINDS)} is seen")(sentences, scene, draws)
        position = draws.pick(positions)
        word = tokens[position].strip(".,:")
        tokens[position] = tokens[position].replace(word, draws.pick([other for other in words if other != word]))
        return " ".join(tokens)

    return damage


def _insert(sentence: str) -> Callable[[list[str], Scene, Draws], str]:
    """Return a damage that inserts a sentence at a random position."""

    def damage(sentences: list[str], scene: Scene, draws: Draws) -> str:
        position = draws.below(len(sentences) + 1)
        return _join([*sentences[:position], sentence, *sentences[position:]])

    return damage


def _contradict(sentences: list[str], scene: Scene, draws: Draws) -> str:
    """Deny a finding of the scene; if the scene has none, state one."""
    finding = draws.pick(scene.findings) if scene.findings else None
    if finding is None:
        stated = Finding(
            draws.pick(KINDS[scene.modality]), draws.pick(SIDES), draws.pick(LEVELS), draws.pick(SIZES), 1
        )
        return _insert(describe(stated).removesuffix("."))(sentences, scene, draws)
    denials = [
        f"No {finding.kind} is seen",
        "No finding is seen",
        f"The {finding.side} part is clear",
        f"The {finding.level} part is clear",
    ]
    return _insert(draws.pick(denials))(sentences, scene, draws)


def _misplace(sentences: list[str], scene: Scene, draws: Draws) -> str:
    """Insert a finding that the modality cannot show, or another modality or organ."""
    foreign = [kind for kind in ALL_KINDS if kind not in KINDS[scene.modality]]
    other = draws.pick([modality for modality in MODALITIES if modality != scene.modality])
    kind = draws.pick(foreign)
    choices = [
        f"No {kind} is seen",
        f"There is {_article(kind)} {kind}: count {draws.pick(COUNTS)}, size {draws.pick(SIZES)}, "
        f"{draws.pick(LEVELS)} {draws.pick(SIDES)}",
        f"The modality is {other}",
        f"The organ is {draws.pick(ORGANS[other])}",
    ]
    return _insert(draws.pick(choices))(sentences, scene, draws)


def _conclude_wrongly(sentences: list[str], scene: Scene, draws: Draws) -> str:
    letter = draws.pick(("", " A", " B", " C", " D"))
    return _join([*sentences[:-1], f"So the answer is {draws.pick(_ANSWERS)}{letter}"])


def _repeat(sentences: list[str], scene: Scene, draws: Draws) -> str:
    return _insert(draws.pick(sentences))(sentences, scene, draws)


def _pad(sentences: list[str], scene: Scene, draws: Draws) -> str:
    """Insert all remarks, or repeat the whole text up to 24 sentences or twice its length."""
    if draws.chance(0.6):
        body = [sentence for sentence in sentences[:-1] if sentence not in REMARKS]
        for remark in REMARKS:
            body.insert(draws.below(len(body) + 1), remark)
        return _join([*body, sentences[-1]])
    return _join((sentences * 20)[: draws.pick((len(sentences) + 1, 2 * len(sentences), 12, 24))])


def _shuffle(sentences: list[str], scene: Scene, draws: Draws) -> str:
    return _join(draws.shuffled(sentences))


def _truncate(sentences: list[str], scene: Scene, draws: Draws) -> str:
    text = _join(sentences)
    return text[: 1 + draws.below(len(text))].strip()


def _garble(sentences: list[str], scene: Scene, draws: Draws) -> str:
    """Drop, replace, insert or corrupt one to three words."""
    tokens = _join(sentences).split(" ")
    for _ in range(draws.pick((1, 1, 1, 2, 3))):
        place = draws.below(len(tokens))
        manner = draws.below(4)
        if manner == 0 and len(tokens) > 1:
            del tokens[place]
        elif manner == 1:
            tokens[place] = draws.pick(_WORDS)
        elif manner == 2:
            tokens.insert(place, draws.pick(_WORDS))
        else:
            cut = draws.below(len(tokens[place]) + 1)
            tokens[place] = tokens[place][:cut] + draws.pick(("", "x", "ing", ".", ",", "\n", "ent"))
    return " ".join(tokens).strip()


def _stray(sentences: list[str], scene: Scene, draws: Draws) -> str:
    return _insert(draws.pick(_STRAY))(sentences, scene, draws)


def _mix(sentences: list[str], scene: Scene, draws: Draws) -> str:
    """Insert a sentence from the reasoning for another image."""
    other = draw_sample(seed=draws.below(1 << 30), split="reasonings mixed", index=0).reasoning
    strangers = [sentence.strip() for sentence in other.split(".") if sentence.strip()]
    return _insert(draws.pick(strangers))(sentences, scene, draws)


DAMAGES: dict[str, Callable[[list[str], Scene, Draws], str]] = {
    "swapped kind": _swap_word(ALL_KINDS),
    "swapped organ": _swap_word(ALL_ORGANS),
    "swapped word": _swap_word((*MODALITIES, *SIDES, *LEVELS, *SIZES, *COUNTS)),
    "contradiction": _contradict,
    "impossible": _misplace,
    "wrong conclusion": _conclude_wrongly,
    "repetition": _repeat,
    "padding": _pad,
    "shuffled": _shuffle,
    "truncated": _truncate,
    "garbled": _garble,
    "stray": _stray,
    "mixed": _mix,
}
"""Ways to damage a reasoning; each receives the sentences without full stops, with the conclusion last."""

_DRAWN = (*DAMAGES, *("contradiction", "repetition") * 3, "mixed", "wrong conclusion", "swapped kind")
"""Names to draw from. Damages that leave every sentence intact are harder to detect and are drawn more often."""
