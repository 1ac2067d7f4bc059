"""What a check of data sets found: facts of each split, and findings with their level. Imports no torch."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from medvqa_rl.core.types import ImageSource
from medvqa_rl.data.images.budget import ImageBudget
from medvqa_rl.data.overlap import Overlap
from medvqa_rl.data.reading.issues import RowIssue

Level = Literal["wrong", "look"]
"""wrong: results would not mean what they seem to mean; look: may be all right, look at it."""

OTHER = ": "
"""Between the name of a further data set and its split: ``slake_en: test``."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault with the places where it was found."""

    level: Level
    what: str
    """A few words."""
    count: int
    text: str
    """What it means and what to do."""
    examples: tuple[str, ...] = ()


@dataclass
class SplitFacts:
    """What is in a split."""

    split: str
    name: str
    fingerprint: str
    num_rows: int
    """Samples of the split; those of an endless one are not counted but 0."""
    seen: int = 0
    """Samples looked at."""
    types: Counter[str] = field(default_factory=Counter)
    letters: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(number of options, gold letter) -> choice questions."""
    answers: Counter[str] = field(default_factory=Counter)
    """Normalised gold answers of closed questions."""
    question_words: array[int] = field(default_factory=lambda: array("I"))
    answer_words: array[int] = field(default_factory=lambda: array("I"))
    images: dict[str, ImageSource] = field(default_factory=dict)
    """Distinct images by key."""
    image_uses: list[tuple[str, ...]] = field(default_factory=list)
    """Keys of the images of every sample."""
    widths: list[int] = field(default_factory=list)
    """Of distinct images in pixels."""
    heights: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    """Per question, over all its images; questions with an image that cannot be read are left out."""

    @property
    def majority_letter(self) -> tuple[str, float]:
        """The commonest gold letter of the choice questions, and the accuracy of always giving it."""
        counts: Counter[str] = Counter()
        for (_, letter), count in self.letters.items():
            counts[letter] += count
        return commonest(counts)

    @property
    def majority_answer(self) -> tuple[str, float]:
        """The commonest gold answer of the closed questions, and the accuracy of always giving it."""
        return commonest(self.answers)


@dataclass(frozen=True)
class DataReport:
    """Everything that a check found."""

    splits: tuple[SplitFacts, ...]
    overlaps: tuple[Overlap, ...]
    leaked: tuple[int, int] | None
    """(test images that are in train or val by name or pixels, test images); None without a test split."""
    findings: tuple[Finding, ...]
    notes: Mapping[str, int]
    """What loading said about the splits, other than dropped and repaired rows."""
    issues: tuple[RowIssue, ...]
    budget: ImageBudget
    seconds: float

    def is_wrong(self, *, strict: bool = False) -> bool:
        """Whether anything is wrong; strict counts what is only to be looked at too."""
        return any(strict or finding.level == "wrong" for finding in self.findings)


def commonest(counts: Counter[str]) -> tuple[str, float]:
    if not counts:
        return "", float("nan")
    value, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return value, count / counts.total()


class Faults:
    """Faults by kind: how many, and the first few places."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, kind: str, place: str, count: int = 1) -> None:
        self.counts[kind] += count
        places = self.places.setdefault(kind, [])
        if len(places) < 8:
            places.append(place)
