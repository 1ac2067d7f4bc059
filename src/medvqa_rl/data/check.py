"""Check a data set before training on it: gold answers, shared images, skew, image quality. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import compared, score_correctness
from medvqa_rl.core.prompts import as_asked, render_answer
from medvqa_rl.core.text import normalise, shown
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS, Dataset, ImageSource, Sample, Template, Wording
from medvqa_rl.data import load_splits
from medvqa_rl.data.findings import (
    DataReport,
    FaultCounter,
    SplitFacts,
    dropped_findings,
    overlap_findings,
    patient_findings,
    skew_findings,
    validation_findings,
)
from medvqa_rl.data.images.cost import ImageCost
from medvqa_rl.data.images.fingerprints import FLAT, ImageFacts, measure
from medvqa_rl.data.overlap import Overlap, find_overlap, twins
from medvqa_rl.data.splits import SPLITS
from medvqa_rl.data.stored import StoredDataset

if TYPE_CHECKING:
    from PIL.Image import Image

ENDLESS_LIMIT = 1000
"""Samples to check of an endless split by default."""

OTHER = ": "
"""Separates the name of a further data set from its split, as in ``slake_en: test``."""

Progress = Callable[[str, int, int], None]
"""Called with a label, the number done and the total."""


def load_with_further(config: DataConfig, further: Sequence[DataConfig]) -> dict[str, Dataset]:
    """Load the splits of a data set and of further ones, whose splits are named like ``slake_en: test``.

    Raises:
        ValueError: a data set cannot be found or read.
    """
    found = load_splits(config)
    names = [data.name for data in further]
    for number, data in enumerate(further, start=1):
        label = data.name if names.count(data.name) == 1 else f"{data.name} {number}"
        found |= {f"{label}{OTHER}{split}": dataset for split, dataset in load_splits(data).items()}
    return found


def official_overlap(config: DataConfig) -> dict[str, int]:
    """Count the test images that the official split shares with its training and validation images, by name.

    Useful with ``data.split: image``, because published results are on the official split.

    Returns:
        A note and the count; empty if the official data has no test split, or only a test split.

    Raises:
        ValueError: the data cannot be read.
    """
    whole = {"split": "official", "num_train": None, "num_val": None, "num_test": None}
    images = {
        split: {image.key for index in range(len(dataset)) for image in dataset[index].images}
        for split, dataset in load_splits(config.model_copy(update=whole)).items()
    }
    test = images.pop("test", set())
    if not test or not images:
        return {}
    shared = len(test & set().union(*images.values()))
    return {f"official split, not used here: of its {len(test):,} test images, also in train or val": shared}


def check_data(
    datasets: Mapping[str, Dataset],
    *,
    cost: ImageCost,
    template: Template = "think_answer",
    wording: Wording = DEFAULT_WORDING,
    limit: int | None = None,
    decode: bool = True,
    workers: int = 2,
    progress: Progress = lambda what, done, total: None,
) -> DataReport:
    """Check every sample of every split, and every distinct image once.

    Args:
        datasets: samples by split. Images are compared between all pairs of splits. The splits of further data
            sets are named like ``slake_en: test``. Across data sets, images are compared by pixels and perceptual hash
            but not by name, and only between different splits: two training splits may share images.
        cost: what images cost the model.
        template: prompt template; gold answers are rendered in its format.
        wording: its tags.
        limit: maximum number of samples per split. Defaults to all, or ``ENDLESS_LIMIT`` for an endless split.
        decode: decode the images. If False, they are compared by name only and their sizes are unknown.
        workers: decoding threads.
        progress: called as the check proceeds.
    """
    start = time.perf_counter()
    faults = FaultCounter()
    splits = [
        _read_split(split, dataset, template, wording, limit, faults, progress) for split, dataset in datasets.items()
    ]
    facts = _measure_images(splits, workers, faults, progress) if decode else {}
    for split in splits:
        _add_image_facts(split, facts, cost)
        for names in twins(split.images, facts):
            faults.add("one image, several names", f"{split.split}: {' = '.join(names)}", len(names) - 1)
    for key, measured in facts.items():
        if _tokens(measured, cost) is None:
            faults.add("image too narrow", f"{key} ({measured.width} x {measured.height})")
    overlaps = tuple(
        find_overlap((first.split, first.images), (second.split, second.images), facts)
        for first, second in _pairs_to_compare(splits)
    )
    stored = [dataset for dataset in datasets.values() if isinstance(dataset, StoredDataset)]
    issues = tuple(dict.fromkeys(issue for dataset in stored for issue in dataset.issues))
    findings = [
        *faults.findings(),
        *overlap_findings(overlaps),
        *patient_findings(_patients(datasets)),
        *validation_findings(splits),
        *skew_findings(splits),
        *dropped_findings(issues),
    ]
    return DataReport(
        splits=tuple(splits),
        overlaps=overlaps,
        leaked=_leaked(splits, overlaps),
        findings=tuple(sorted(findings, key=lambda finding: finding.level != "wrong")),
        notes={
            f"{split}: {note}": count
            for split, dataset in datasets.items()
            for note, count in dataset.notes.items()
            if not note.startswith(("dropped: ", "repaired: "))
        },
        issues=issues,
        cost=cost,
        seconds=time.perf_counter() - start,
    )


def _patients(datasets: Mapping[str, Dataset]) -> dict[str, dict[str, str]]:
    """For each split of the data set itself, patient -> the id of the patient's first sample."""
    found: dict[str, dict[str, str]] = {}
    for split, dataset in datasets.items():
        if isinstance(dataset, StoredDataset) and OTHER not in split:
            found[split] = {}
            for index, patient in enumerate(dataset.patients):
                if patient and patient not in found[split]:
                    found[split][patient] = dataset[index].id
    return found


def _read_split(
    split: str,
    dataset: Dataset,
    template: Template,
    wording: Wording,
    limit: int | None,
    faults: FaultCounter,
    progress: Progress,
) -> SplitFacts:
    """Check the samples of a split without decoding their images."""
    facts = SplitFacts(split, dataset.name, dataset.fingerprint, 0 if dataset.is_endless else len(dataset))
    total = min(len(dataset), limit or (ENDLESS_LIMIT if dataset.is_endless else len(dataset)))
    other = split.rpartition(OTHER)[0]
    ids: set[str] = set()
    golds: dict[tuple[str, ...], set[str]] = {}
    for index in range(total):
        sample = dataset[index]
        if other:
            sample = replace(sample, images=tuple(_OtherImage(image, other) for image in sample.images))
        where = f"{split}: {sample.id}"
        if sample.id in ids:
            faults.add("repeated id", where)
        ids.add(sample.id)
        is_valid = sample.answer_type != "choice" or set(sample.answers) <= {*LETTERS[: len(sample.options)]}
        if not is_valid or not _is_gold_correct(sample, template, wording):
            faults.add("gold answer scores below 1", f"{where} ({shown(sample.answer)})")
        elif not _is_gold_unique(sample):
            faults.add("gold option not unique", f"{where} ({shown(sample.answer_text)})")
        question = (sample.image_key, normalise(sample.question), *map(normalise, sample.options))
        correct = {compared(answer, sample.answers_as) for answer in sample.answers}
        earlier = golds.setdefault(question, set())
        if earlier:
            kind = "repeated question" if correct & earlier else "contradiction"
            faults.add(kind, f"{where} ({shown(sample.question)})")
        earlier |= correct
        _count(facts, sample, sample.answer_text if is_valid else "")
        if (index + 1) % 500 == 0 or index + 1 == total:
            progress(f"{split} questions", index + 1, total)
    return facts


@dataclass(frozen=True)
class _OtherImage:
    """An image of a further data set, whose key includes the data set so that names do not clash."""

    source: ImageSource
    dataset: str

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.source.key}"

    def load(self) -> Image:
        return self.source.load()

    def header_pixels(self) -> int | None:
        return self.source.header_pixels()


def _is_gold_correct(sample: Sample, template: Template, wording: Wording) -> bool:
    """Whether the scorer accepts every correct answer in the requested format."""
    asked = as_asked(sample, template)
    completions = [render_answer("seen", answer, template, wording) for answer in asked.answers]
    return all(score_correctness(asked, completion, template, wording) == 1.0 for completion in completions)


def _is_gold_unique(sample: Sample) -> bool:
    """Whether no other option equals the gold one after normalisation."""
    if sample.answer_type != "choice":
        return True
    return [normalise(option) for option in sample.options].count(normalise(sample.answer_text)) == 1


def _count(facts: SplitFacts, sample: Sample, answer: str) -> None:
    """Add a sample to the statistics; ``answer`` is empty if its gold letter is not one of its options."""
    facts.seen += 1
    facts.types[sample.answer_type] += 1
    if len(facts.golds) < 2 and answer:
        facts.golds.add(compared(answer, sample.answers_as))
    facts.question_words.append(len(sample.question.split()))
    facts.answer_words.append(len(answer.split()))
    if sample.answer_type == "choice" and answer:
        facts.letters[len(sample.options), sample.answer] += 1
    elif sample.answer_type == "closed":
        facts.answers[compared(sample.answer, sample.answers_as)] += 1
    for image in sample.images:
        facts.images.setdefault(image.key, image)
    facts.image_uses.append(tuple(image.key for image in sample.images))


def _measure_images(
    splits: Sequence[SplitFacts], workers: int, faults: FaultCounter, progress: Progress
) -> dict[str, ImageFacts]:
    """Decode every distinct image once and return its measurements by key."""
    facts: dict[str, ImageFacts] = {}
    sources = {key: source for split in splits for key, source in split.images.items()}
    for done, (source, measured) in enumerate(measure(sources.values(), workers=workers), 1):
        progress("images", done, len(sources))
        if isinstance(measured, str):
            faults.add("unreadable image", measured)
            continue
        facts[source.key] = measured
        if measured.is_constant:
            faults.add("constant image", source.key)
        elif measured.spread < FLAT:
            faults.add("flat image", source.key)
    return facts


def _add_image_facts(split: SplitFacts, facts: Mapping[str, ImageFacts], cost: ImageCost) -> None:
    """Add sizes and image tokens to the statistics of a split."""
    known = {key: facts[key] for key in split.images if key in facts}
    split.widths = [measured.width for measured in known.values()]
    split.heights = [measured.height for measured in known.values()]
    tokens = {key: count for key, measured in known.items() if (count := _tokens(measured, cost)) is not None}
    split.image_tokens = [sum(tokens[key] for key in keys) for keys in split.image_uses if tokens.keys() >= {*keys}]


def _tokens(measured: ImageFacts, cost: ImageCost) -> int | None:
    """Image tokens of an image, or None if the model refuses it because it is too narrow."""
    try:
        return cost.tokens(measured.width, measured.height)
    except ValueError:
        return None


def _pairs_to_compare(splits: Sequence[SplitFacts]) -> list[tuple[SplitFacts, SplitFacts]]:
    """The pairs of splits that must not share images, in the order train, val, test."""
    pairs = []
    for first, second in combinations(splits, 2):
        (dataset_1, _, kind_1), (dataset_2, _, kind_2) = (each.split.rpartition(OTHER) for each in (first, second))
        if dataset_1 == dataset_2:
            pairs.append((first, second))
        elif kind_1 != kind_2:
            in_order = SPLITS.index(kind_1) < SPLITS.index(kind_2)
            pairs.append((first, second) if in_order else (second, first))
    return pairs


def _leaked(splits: Sequence[SplitFacts], overlaps: Sequence[Overlap]) -> tuple[int, int] | None:
    """Return the number of test images that are also in train or val, and the number of test images."""
    own = {split.split: split for split in splits if OTHER not in split.split}
    if "test" not in own or len(own) < 2:
        return None
    seen = {
        pair.second
        for overlap in overlaps
        if overlap.second == "test" and overlap.first in own
        for pair in overlap.pairs
        if pair.how in ("name", "pixels")
    }
    return len(seen), len(own["test"].images)
