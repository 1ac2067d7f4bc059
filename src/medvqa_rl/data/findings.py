"""The report of a data check: facts of each split, and findings with their severity. Imports no torch."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np
from scipy.stats import chisquare

from medvqa_rl.core.types import LETTERS, ImageSource
from medvqa_rl.data.images.cost import ImageCost
from medvqa_rl.data.images.fingerprints import FLAT
from medvqa_rl.data.overlap import Overlap
from medvqa_rl.data.reading.issues import RowIssue

Level = Literal["wrong", "look"]
"""wrong: results would be misleading; look: possibly fine, should be reviewed."""

EXAMPLES = 8
"""Maximum number of examples per finding."""

LISTED = 200
"""Maximum number of faulty samples and images that are listed."""

MIN_VALIDATION = 30
"""A smaller validation split is a finding."""

SKEW_P = 0.001
"""Answer letters count as skewed if the p-value of a chi-squared test against equal frequencies is below this."""

FAULTS: dict[str, tuple[Level, str]] = {
    "gold answer scores below 1": (
        "wrong",
        "The scorer rejects the gold answer in the requested format, so no answer can score 1: fix the rows.",
    ),
    "gold option not unique": (
        "wrong",
        "Another option has the same text as the gold one, so a correct answer can be scored as wrong: fix the rows.",
    ),
    "repeated id": (
        "wrong",
        "Two samples of a split have the same id, so their results cannot be told apart: rename one.",
    ),
    "unreadable image": ("wrong", "The image cannot be decoded: replace the file, or remove its rows."),
    "constant image": ("wrong", "The image has a single colour and shows nothing: replace it."),
    "image too narrow": ("wrong", "One side is more than 200 times the other, which many models refuse: crop it."),
    "flat image": (
        "look",
        f"The grey levels have a standard deviation below {FLAT:g} of 255, so the image is almost uniform.",
    ),
    "contradiction": ("look", "A question about one image has different gold answers within a split."),
    "repeated question": ("look", "A question about one image is repeated with the same gold answer."),
    "one image, several names": ("look", "Images in a split have identical pixels but different names."),
}
"""Faults of single samples and images -> severity and explanation."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault and where it occurs."""

    level: Level
    what: str
    """Its name in a few words."""
    count: int
    text: str
    """What it means and how to fix it."""
    examples: tuple[str, ...] = ()


class FaultCounter:
    """Counts faults by kind and lists the first of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Record a fault, one of ``FAULTS``."""
        self._counts[kind] += count
        examples = self._examples.setdefault(kind, [])
        if len(examples) < LISTED:
            examples.append(example)

    def findings(self) -> Iterator[Finding]:
        """One finding for each kind that occurred."""
        for kind, (level, text) in FAULTS.items():
            if count := self._counts[kind]:
                yield Finding(level, kind, count, text, tuple(self._examples[kind]))


@dataclass
class SplitFacts:
    """Statistics of one split."""

    split: str
    """Name of the split; ``slake_en: test`` for a further data set."""
    name: str
    fingerprint: str
    num_rows: int
    """Number of samples; 0 if the split is endless."""
    seen: int = 0
    """Number of samples checked."""
    types: Counter[str] = field(default_factory=Counter)
    """Answer type -> questions."""
    letters: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(number of options, gold letter) -> choice questions."""
    answers: Counter[str] = field(default_factory=Counter)
    """Normalised gold answer -> closed questions."""
    golds: set[str] = field(default_factory=set)
    """Two different gold answers as normalised text, or the only one."""
    question_words: array[int] = field(default_factory=lambda: array("I"))
    answer_words: array[int] = field(default_factory=lambda: array("I"))
    images: dict[str, ImageSource] = field(default_factory=dict)
    """Distinct images by key."""
    image_uses: list[tuple[str, ...]] = field(default_factory=list)
    """Image keys of every sample."""
    widths: list[int] = field(default_factory=list)
    """Widths of the distinct images in pixels."""
    heights: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    """Image tokens of every question, except questions with an unreadable image."""

    @property
    def majority_letter(self) -> tuple[str, float]:
        """The most frequent gold letter of choice questions, and the accuracy of always giving it."""
        counts: Counter[str] = Counter()
        for (_, letter), count in self.letters.items():
            counts[letter] += count
        return _majority(counts)

    @property
    def majority_answer(self) -> tuple[str, float]:
        """The most frequent gold answer of closed questions, and the accuracy of always giving it."""
        return _majority(self.answers)


def _majority(counts: Counter[str]) -> tuple[str, float]:
    if not counts:
        return "", float("nan")
    value, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
    return value, count / counts.total()


@dataclass(frozen=True)
class DataReport:
    """The result of a check."""

    splits: tuple[SplitFacts, ...]
    overlaps: tuple[Overlap, ...]
    leaked: tuple[int, int] | None
    """(test images that are in train or val by name or pixels, all test images); None without a test split."""
    findings: tuple[Finding, ...]
    notes: Mapping[str, int]
    """Notes from loading, except counts of dropped and repaired rows."""
    issues: tuple[RowIssue, ...]
    cost: ImageCost
    seconds: float

    def is_wrong(self, *, strict: bool = False) -> bool:
        """Whether any finding is wrong; with ``strict``, whether there is any finding."""
        return any(strict or finding.level == "wrong" for finding in self.findings)


def overlap_findings(overlaps: Sequence[Overlap]) -> Iterator[Finding]:
    """Findings about splits that share images."""
    for overlap in overlaps:
        first, second = overlap.first, overlap.second
        if count := overlap.count("name", "pixels"):
            renamed = overlap.count("pixels")
            shared = [pair for pair in overlap.pairs if pair.how != "hash"]
            yield Finding(
                "wrong",
                f"images in {first} and {second}",
                count,
                f"{count:,} of the {overlap.num_second:,} images of {second} are also in {first}"
                f"{f', {renamed:,} of them under another name' if renamed else ''}, so results on {second} partly "
                "measure memorisation: split by image.",
                tuple(
                    pair.second if pair.first == pair.second else f"{pair.second} = {pair.first}"
                    for pair in shared[:EXAMPLES]
                ),
            )
        if count := overlap.count("hash"):
            near = sorted((pair for pair in overlap.pairs if pair.how == "hash"), key=lambda pair: pair.bits)
            yield Finding(
                "look",
                f"near duplicates in {first} and {second}",
                count,
                f"{count:,} of the {overlap.num_second:,} images of {second} have almost the same perceptual hash as "
                f"an image of {first}: they may be copies, neighbouring slices, or merely similar.",
                tuple(f"{pair.second} ~ {pair.first} ({pair.bits} bits)" for pair in near[:EXAMPLES]),
            )


def patient_findings(patients: Mapping[str, Mapping[str, str]]) -> Iterator[Finding]:
    """Findings about patients in two splits. Names samples, not patients.

    Args:
        patients: for each split, patient -> the id of the patient's first sample.
    """
    for (first, one), (second, other) in combinations(patients.items(), 2):
        shared = [patient for patient in other if patient in one]
        if shared:
            yield Finding(
                "wrong",
                f"patients in {first} and {second}",
                len(shared),
                f"{len(shared):,} of the {len(other):,} patients of {second} are also in {first}, so results on "
                f"{second} partly measure memorisation: divide the table with `medvqa-rl data split`, which keeps "
                "patients together.",
                tuple(f"{other[patient]} is of the patient of {one[patient]}" for patient in shared[:EXAMPLES]),
            )


def validation_findings(splits: Sequence[SplitFacts]) -> Iterator[Finding]:
    """Findings about a validation split that cannot tell checkpoints apart."""
    for split in splits:
        if split.split != "val":
            continue
        if split.seen < MIN_VALIDATION:
            half = 100 * 1.96 * 0.5 / max(1, split.seen) ** 0.5
            yield Finding(
                "look",
                "few validation questions",
                split.seen,
                f"With {split.seen:,} questions the accuracy of a checkpoint is known to about {half:.0f} percentage "
                f"points, so the best one is chosen by chance: use at least {MIN_VALIDATION} (`medvqa-rl data split "
                "--val`).",
            )
        if len(split.golds) == 1:
            yield Finding(
                "look",
                "one validation answer",
                split.seen,
                "All validation questions have the same gold answer, so a model that always gives it is the best: "
                "divide the table again with another seed.",
                tuple(split.golds),
            )


def skew_findings(splits: Sequence[SplitFacts]) -> Iterator[Finding]:
    """Findings about gold letters that are not evenly distributed."""
    for split in splits:
        for options in sorted({number for number, _ in split.letters}):
            letters = LETTERS[:options]
            counts = [split.letters[options, letter] for letter in letters]
            total = sum(counts)
            if options > 1 and total >= 5 * options and float(chisquare(counts).pvalue) < SKEW_P:
                best = int(np.argmax(counts))
                yield Finding(
                    "look",
                    f"answer letters of {split.split}",
                    total,
                    f"{letters[best]} is correct in {100 * counts[best] / total:.1f} % of {total:,} questions with "
                    f"{options} options, where chance is {100 / options:.1f} %. Report the accuracy of always "
                    "giving this letter next to the model's accuracy. Questions per letter: "
                    + ", ".join(f"{letter} {count:,}" for letter, count in zip(letters, counts))
                    + ".",
                )


def dropped_findings(issues: Sequence[RowIssue]) -> Iterator[Finding]:
    """A finding about the rows that loading dropped."""
    dropped = [issue for issue in issues if issue.action == "dropped"]
    reasons = Counter(issue.reason for issue in dropped)
    if dropped:
        yield Finding(
            "look",
            "rows dropped",
            len(dropped),
            f"Loading dropped {len(dropped):,} rows: "
            + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            + ".",
            tuple(f"{issue.file} row {issue.number}: {issue.reason}" for issue in dropped[:EXAMPLES]),
        )
