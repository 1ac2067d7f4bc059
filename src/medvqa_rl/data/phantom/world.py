"""Scenes of the phantom world: the ground truth from which images, questions and claims are derived.

Six modalities, eleven organs and sixteen kinds of findings. Each modality shows only some kinds, which
coherent reasoning respects.
"""

from __future__ import annotations

from dataclasses import dataclass

from medvqa_rl.core.randomness import Draws

VERSION = 1
"""Part of every fingerprint. Increase it when scenes, images or questions change."""

ORGANS: dict[str, tuple[str, ...]] = {
    "radiograph": ("chest", "knee"),
    "MRI": ("brain", "spine"),
    "CT": ("abdomen", "lungs"),
    "fundus": ("retina",),
    "ultrasound": ("kidney", "thyroid"),
    "histology": ("colon", "skin"),
}
"""The organs or regions that each modality can show."""

KINDS: dict[str, tuple[str, ...]] = {
    "radiograph": ("nodule", "opacity", "calcification", "fracture"),
    "MRI": ("tumor", "infarct", "cyst", "plaque"),
    "CT": ("cyst", "nodule", "calcification", "abscess"),
    "fundus": ("hemorrhage", "exudate", "drusen", "scar"),
    "ultrasound": ("cyst", "stone", "nodule", "abscess"),
    "histology": ("granuloma", "necrosis", "tumor", "cyst"),
}
"""The kinds of finding that each modality can show."""

MODALITIES = tuple(ORGANS)
ALL_ORGANS = tuple(organ for organs in ORGANS.values() for organ in organs)
ALL_KINDS = tuple(dict.fromkeys(kind for kinds in KINDS.values() for kind in kinds))
SIDES = ("left", "right")
"""Sides of the image, from the viewer's perspective."""
LEVELS = ("upper", "middle", "lower")
SIZES = ("small", "medium", "large")
COUNTS = ("one", "two", "three", "four")
"""Lesion counts. At most three lesions are drawn; four is only a distractor option."""

MODALITY_OF = {organ: modality for modality, organs in ORGANS.items() for organ in organs}


@dataclass(frozen=True)
class Finding:
    """Lesions of one kind, side by side in one of the six cells of the image."""

    kind: str
    side: str
    level: str
    size: str
    count: int

    @property
    def count_word(self) -> str:
        return COUNTS[self.count - 1]

    @property
    def place(self) -> str:
        return f"{self.level} {self.side}"


@dataclass(frozen=True)
class Scene:
    """The content of one image."""

    key: str
    """Seeds the scene; also the name of the image."""
    modality: str
    organ: str
    findings: tuple[Finding, ...]

    def find(self, kind: str) -> Finding | None:
        """Return the finding of this kind, or None."""
        return next((finding for finding in self.findings if finding.kind == kind), None)


def draw_scene(key: str) -> Scene:
    """Draw the scene for a key.

    It has no finding (probability 1/7), one (3/7) or two (3/7), of different kinds and in different cells, listed in
    reading order.
    """
    draws = Draws("phantom scene", VERSION, key)
    modality = draws.pick(MODALITIES)
    organ = draws.pick(ORGANS[modality])
    number = draws.pick((0, 1, 1, 1, 2, 2, 2))
    kinds = draws.shuffled(KINDS[modality])[:number]
    cells = [(side, level) for level in LEVELS for side in SIDES]
    taken = draws.shuffled(cells)[:number]
    findings = []
    for kind, (side, level) in zip(kinds, sorted(taken, key=cells.index)):
        size = draws.pick(SIZES)
        count = 1 if size == "large" else draws.pick((1, 1, 2, 3))  # a cell holds one large lesion only
        findings.append(Finding(kind, side, level, size, count))
    return Scene(key, modality, organ, tuple(findings))
