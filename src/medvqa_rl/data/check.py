"""Checks of a data set before anything is trained on it: gold answers, leaks, skew, images, cost. Imports no torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import chisquare

from medvqa_rl.config import Config, DataConfig
from medvqa_rl.core.answers import score_correctness
from medvqa_rl.core.prompts import as_asked, render_answer
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS, Dataset, ImageSource, Sample, Template
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.data.findings import OTHER, DataReport, Faults, Finding, Level, SplitFacts
from medvqa_rl.data.images.budget import ImageBudget
from medvqa_rl.data.images.fingerprints import FLAT, ImageFacts, measure
from medvqa_rl.data.overlap import Overlap, find_overlap, twins
from medvqa_rl.data.reading.issues import RowIssue
from medvqa_rl.data.splits import NoSuchSplit, StoredDataset

if TYPE_CHECKING:
    from PIL.Image import Image

if TYPE_CHECKING:
    from PIL.Image import Image


ENDLESS_LIMIT = 1000
"""Samples looked at of each split that never ends, unless told otherwise."""


Progress = Callable[[str, int, int], None]
"""Takes what is counted, how many are done and how many there are."""


@dataclass(frozen=True)
class _OfAnother:
    """An image of a further data set: an equal name does not make it the same image as one of the first set."""

    source: ImageSource
    dataset: str

    @property
    def key(self) -> str:
        return f"{self.dataset}/{self.source.key}"

    def load(self) -> Image:
        return self.source.load()

    def header_pixels(self) -> int | None:
        return self.source.header_pixels()


TEXTS: dict[str, tuple[Level, str]] = {
    "gold answer scores below 1": (
        "wrong",
        "The scorer does not accept the gold answer in the requested form, so no model can be right: mend the rows.",
    ),
    "gold option not unique": (
        "wrong",
        "Another option has the same text as the gold one, so the right answer can be marked wrong: mend the rows.",
    ),
    "repeated id": ("wrong", "Two samples of a split have the same id, so results cannot be told apart: rename one."),
    "unreadable image": ("wrong", "The image cannot be decoded: replace the files, or leave their rows out."),
    "constant image": ("wrong", "The image has one colour everywhere and shows nothing: replace it."),
    "image too narrow": ("wrong", "One side is more than 200 times the other, which Qwen2-VL refuses: crop it."),
    "flat image": (
        "look",
        f"The grey levels have a standard deviation below {FLAT:g} of 255, so there is next to nothing to see.",
    ),
    "contradiction": ("look", "The same question about the same image has several gold answers within a split."),
    "repeated question": ("look", "The same question about the same image occurs again with the same answer."),
    "one image, several names": ("look", "Images of one split have equal pixels under several names."),
}
"""What each kind of fault means."""


def check_data(
    datasets: Mapping[str, Dataset],
    *,
    budget: ImageBudget,
    template: Template = "think_answer",
    limit: int | None = None,
    decode: bool = True,
    workers: int = 2,
    progress: Progress = lambda what, done, total: None,
) -> DataReport:
    """Look at every sample of every split, and at every distinct image once.

    Args:
        datasets: split name -> its samples; overlap is sought between all pairs of splits. Those of further data sets
            are named ``slake_en: test``: their images are compared by pixels and looks, not by name, and with splits
            of another kind only, because two training sets may share what they like.
        budget: how the model resizes images.
        template: form in which gold answers are rendered.
        limit: samples per split to look at; None is all, or ``ENDLESS_LIMIT`` where a split never ends.
        decode: decode the images; without, they are compared by name and their sizes stay unknown.
        workers: threads that decode.
        progress: is told how far the check is.
    """
    start = time.perf_counter()
    faults = Faults()
    splits = [_read_split(split, dataset, template, limit, faults, progress) for split, dataset in datasets.items()]
    facts: dict[str, ImageFacts] = {}
    if decode:
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
    costs: dict[str, int] = {}
    for key, measured in facts.items():
        try:
            costs[key] = budget.tokens(measured.width, measured.height)
        except ValueError:
            faults.add("image too narrow", f"{key} ({measured.width} x {measured.height})")
    for split in splits:
        known = [facts[key] for key in split.images if key in facts]
        split.widths, split.heights = [each.width for each in known], [each.height for each in known]
        split.image_tokens = [
            sum(map(costs.__getitem__, keys)) for keys in split.image_uses if costs.keys() >= {*keys}
        ]
        for group in twins(split.images, facts):
            faults.add("one image, several names", f"{split.split}: {' = '.join(group)}", len(group) - 1)
    overlaps = tuple(
        find_overlap((first.split, first.images), (second.split, second.images), facts)
        for first, second in _pairs(splits)
    )
    findings = [
        Finding(level, kind, faults.counts[kind], text, tuple(faults.places[kind]))
        for kind, (level, text) in TEXTS.items()
        if faults.counts[kind]
    ]
    issues = tuple(dict.fromkeys(_issues(datasets)))
    findings += [*_leaks(overlaps), *_skew(splits), *_dropped(issues)]
    findings.sort(key=lambda finding: finding.level != "wrong")
    return DataReport(
        splits=tuple(splits),
        overlaps=overlaps,
        leaked=_leaked(splits, overlaps),
        findings=tuple(findings),
        notes={
            f"{split}: {note}": count
            for split, dataset in datasets.items()
            for note, count in dataset.notes.items()
            if not note.startswith(("dropped: ", "repaired: "))
        },
        issues=issues,
        budget=budget,
        seconds=time.perf_counter() - start,
    )


def _pairs(splits: Sequence[SplitFacts]) -> list[tuple[SplitFacts, SplitFacts]]:
    """Splits that must share nothing; what is learned from comes first, what is measured on second."""
    found = []
    for number, second in enumerate(splits):
        for first in splits[:number]:
            (set_1, _, kind_1), (set_2, _, kind_2) = (each.split.rpartition(OTHER) for each in (first, second))
            if set_1 == set_2:
                found.append((first, second))
            elif kind_1 != kind_2:
                is_in_order = SPLITS.index(kind_1) < SPLITS.index(kind_2)
                found.append((first, second) if is_in_order else (second, first))
    return found


def _read_split(
    split: str, dataset: Dataset, template: Template, limit: int | None, faults: Faults, progress: Progress
) -> SplitFacts:
    """Look at the samples of a split, their images still undecoded."""
    facts = SplitFacts(split, dataset.name, dataset.fingerprint, 0 if dataset.is_endless else len(dataset))
    total = min(len(dataset), limit or (ENDLESS_LIMIT if dataset.is_endless else len(dataset)))
    ids: set[str] = set()
    golds: dict[tuple[str, ...], set[str]] = {}
    for index in range(total):
        sample = dataset[index]
        if of := split.rpartition(OTHER)[0]:
            sample = replace(sample, images=tuple(_OfAnother(image, of) for image in sample.images))
        place = f"{split}: {sample.id}"
        if sample.id in ids:
            faults.add("repeated id", place)
        ids.add(sample.id)
        is_option = sample.answer_type != "choice" or sample.answer in list(LETTERS[: len(sample.options)])
        asked = as_asked(sample, template) if is_option else sample
        if not is_option or score_correctness(asked, render_answer("seen", asked.answer, template), template) != 1.0:
            faults.add("gold answer scores below 1", f"{place} ({sample.answer!r})")
        elif not _is_gold_unique(sample):
            faults.add("gold option not unique", f"{place} ({sample.answer_text!r})")
        question = (sample.image_key, normalise(sample.question), *map(normalise, sample.options))
        gold = normalise(sample.answer)
        others = golds.setdefault(question, set())
        if others:
            kind = "repeated question" if gold in others else "contradiction"
            faults.add(kind, f"{place} ({sample.question!r})")
        others.add(gold)
        _count(facts, sample, sample.answer_text if is_option else "")
        if (index + 1) % 500 == 0 or index + 1 == total:
            progress(f"{split} questions", index + 1, total)
    return facts


def _is_gold_unique(sample: Sample) -> bool:
    """Whether no other option reads like the gold one."""
    if sample.answer_type != "choice":
        return True
    texts = [normalise(option) for option in sample.options]
    return texts.count(texts[LETTERS.index(sample.answer)]) == 1


def _count(facts: SplitFacts, sample: Sample, answer: str) -> None:
    facts.seen += 1
    facts.types[sample.answer_type] += 1
    facts.question_words.append(len(sample.question.split()))
    facts.answer_words.append(len(answer.split()))
    if sample.answer_type == "choice" and answer:
        facts.letters[len(sample.options), sample.answer] += 1
    elif sample.answer_type == "closed":
        facts.answers[normalise(sample.answer)] += 1
    for image in sample.images:
        facts.images.setdefault(image.key, image)
    facts.image_uses.append(tuple(image.key for image in sample.images))


def _leaks(overlaps: Sequence[Overlap]) -> list[Finding]:
    """Findings about splits that share images."""
    findings: list[Finding] = []
    for overlap in overlaps:
        pair = f"{overlap.first} and {overlap.second}"
        if count := overlap.count("name", "pixels"):
            renamed = overlap.count("pixels")
            findings.append(
                Finding(
                    "wrong",
                    f"images in {pair}",
                    count,
                    f"{count:,} of the {overlap.num_second:,} images of {overlap.second} are in {overlap.first} too"
                    f"{f', {renamed:,} of them under another name' if renamed else ''}: what is measured on "
                    f"{overlap.second} is partly memory. Split by image.",
                    tuple(
                        pair.second if pair.first == pair.second else f"{pair.second} = {pair.first}"
                        for pair in overlap.pairs
                        if pair.how != "looks"
                    )[:8],
                )
            )
        if count := overlap.count("looks"):
            near = sorted((pair for pair in overlap.pairs if pair.how == "looks"), key=lambda pair: pair.bits)
            findings.append(
                Finding(
                    "look",
                    f"look-alikes in {pair}",
                    count,
                    f"{count:,} of the {overlap.num_second:,} images of {overlap.second} look like one of "
                    f"{overlap.first}: copies, neighbouring slices, or only alike.",
                    tuple(f"{pair.second} ~ {pair.first} ({pair.bits} bits)" for pair in near[:8]),
                )
            )
    return findings


def _leaked(splits: Sequence[SplitFacts], overlaps: Sequence[Overlap]) -> tuple[int, int] | None:
    """Test images that training or validation has seen, and all test images."""
    test = next((split for split in splits if split.split == "test"), None)
    if test is None or sum(OTHER not in split.split for split in splits) < 2:
        return None
    seen = {
        pair.second
        for overlap in overlaps
        if overlap.second == "test" and OTHER not in overlap.first
        for pair in overlap.pairs
        if pair.how in ("name", "pixels")
    }
    return len(seen), len(test.images)


def _skew(splits: Sequence[SplitFacts]) -> list[Finding]:
    """Findings about gold letters that are not evenly spread."""
    findings: list[Finding] = []
    for split in splits:
        for options in sorted({number for number, _ in split.letters}):
            letters = LETTERS[:options]
            counts = [split.letters[options, letter] for letter in letters]
            if options > 1 and sum(counts) >= 5 * options and float(chisquare(counts).pvalue) < SKEW_P:
                best = int(np.argmax(counts))
                share = counts[best] / sum(counts)
                findings.append(
                    Finding(
                        "look",
                        f"answer letters of {split.split}",
                        sum(counts),
                        f"Of {sum(counts):,} questions with {options} options {100 * share:.1f} % have the answer "
                        f"{letters[best]}, where chance is {100 / options:.1f} %: always saying {letters[best]} "
                        "scores that much. Report it beside the accuracy. Questions per letter: "
                        + ", ".join(f"{letter} {count:,}" for letter, count in zip(letters, counts))
                        + ".",
                    )
                )
    return findings


def _issues(datasets: Mapping[str, Dataset]) -> list[RowIssue]:
    return [issue for dataset in datasets.values() if isinstance(dataset, StoredDataset) for issue in dataset.issues]


def _dropped(issues: Sequence[RowIssue]) -> list[Finding]:
    dropped = [issue for issue in issues if issue.action == "dropped"]
    if not dropped:
        return []
    reasons = Counter(issue.reason for issue in dropped)
    return [
        Finding(
            "look",
            "rows dropped",
            len(dropped),
            f"Loading left out {len(dropped):,} rows: "
            + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
            + ".",
            tuple(f"{issue.file} row {issue.row}: {issue.reason}" for issue in dropped[:8]),
        )
    ]


SPLITS: tuple[Split, ...] = ("train", "val", "test")


def load_splits(config: Config) -> dict[str, Dataset]:
    """All splits that the data of the settings have, in the order train, val, test.

    Raises:
        ValueError: the data cannot be found or read, or there is no split at all.
    """
    found: dict[str, Dataset] = {}
    missing: list[NoSuchSplit] = []
    for split in SPLITS:
        try:
            found[split] = load_dataset(config.data, split)
        except NoSuchSplit as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def with_further(config: Config, further: Sequence[DataConfig]) -> dict[str, Dataset]:
    """The splits of the settings' data and those of further data sets, named ``slake_en: test``.

    Raises:
        ValueError: a data set cannot be found or read.
    """
    found = load_splits(config)
    for number, data in enumerate(further, start=1):
        is_alone = [each.name for each in further].count(data.name) == 1
        label = data.name if is_alone else f"{data.name} {number}"
        for split, dataset in load_splits(config.model_copy(update={"data": data})).items():
            found[f"{label}{OTHER}{split}"] = dataset
    return found


def owners_split(config: Config) -> dict[str, int]:
    """What the owners' split of a data set shares, by the images' names, for settings that split by image instead:
    published numbers are on that split. Empty where it has no test split or nothing else.

    Raises:
        ValueError: the data cannot be read.
    """
    whole = {"split": "official", "num_train": None, "num_val": None, "num_test": None}
    datasets = load_splits(config.model_copy(update={"data": config.data.model_copy(update=whole)}))
    names = {
        split: {image.key for index in range(len(dataset)) for image in dataset[index].images}
        for split, dataset in datasets.items()
    }
    test = names.pop("test", set())
    if not test or not names:
        return {}
    shared = len(test & set().union(*names.values()))
    return {f"owners' split, not used here: of its {len(test):,} test images are also in train or val": shared}


SKEW_P = 0.001
"""Answer letters count as skewed where chance explains them with a smaller probability (chi-squared test)."""
