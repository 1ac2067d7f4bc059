"""One self-contained HTML page about a data set: findings, shared images and distributions. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvqa_rl.core.files import write_text
from medvqa_rl.core.types import LETTERS, ImageSource
from medvqa_rl.data.findings import DataReport, SplitFacts
from medvqa_rl.report.pages.rendering import render, thumbnail_uri

MAX_THUMBNAIL = 200
"""Longest side in pixels of the images."""

MAX_PAIRS = 12
"""Maximum number of shared images on the page."""

MAX_ISSUES = 200
"""Maximum number of dropped and repaired rows on the page."""

BINS = 24


@dataclass(frozen=True)
class Histogram:
    """Histogram of one measure in one split; all splits share the scale of a measure."""

    title: str
    counts: tuple[int, ...]
    ticks: tuple[tuple[float, str], ...]
    """Position from 0 to 1, and label."""
    summary: str
    median: float
    """Position of the median from 0 to 1."""

    @property
    def heights(self) -> list[float]:
        """Heights of the bars from 0 to 1."""
        top = max(self.counts, default=0) or 1
        return [count / top for count in self.counts]


@dataclass(frozen=True)
class ShownPair:
    """Two images that are equal or look alike."""

    title: str
    first: str
    second: str
    first_image: str
    """Data URI of a thumbnail; empty if the image cannot be decoded."""
    second_image: str


def write_data_page(out: Path, report: DataReport, cost_source: str) -> Path:
    """Write the page; its folder is created.

    Args:
        out: the file.
        report: the findings of a check.
        cost_source: where the limits on image sizes come from.
    """
    html = render(
        "data.html.j2",
        report=report,
        title=", ".join(dict.fromkeys(split.name.rsplit("/", 1)[0] for split in report.splits)),
        cost_source=cost_source,
        measures=_measures(report.splits),
        letters=_letters(report.splits),
        pairs=_pairs(report),
        max_issues=MAX_ISSUES,
    )
    return write_text(out, html, errors="replace")


def histograms(title: str, values: Sequence[Sequence[int]], unit: str) -> list[Histogram]:
    """Return histograms of one measure for several splits, with logarithmic bins.

    Args:
        title: name of the measure.
        values: non-negative integers of each split; 0 goes into the first bin.
        unit: what is counted.
    """
    present = [np.maximum(np.asarray(each, dtype=np.float64), 1.0) for each in values]
    low = min((float(each.min()) for each in present if len(each)), default=1.0)
    high = max((float(each.max()) for each in present if len(each)), default=1.0)
    bins = max(1, min(BINS, math.ceil(high - low) + 1))
    edges = np.geomspace(low * 0.999, high * 1.001, bins + 1)
    result: list[Histogram] = []
    ticks = tuple(
        (_place(value, edges), f"{value:,.0f}") for value in dict.fromkeys((low, round(math.sqrt(low * high)), high))
    )
    for each in present:
        if not len(each):
            result.append(Histogram(title, (), ticks, "none", 0.0))
            continue
        counts = np.histogram(each, edges)[0]
        median = float(np.median(each))
        summary = f"median {median:,.0f} {unit}, {each.min():,.0f} to {each.max():,.0f}"
        result.append(Histogram(title, tuple(counts.tolist()), ticks, summary, _place(median, edges)))
    return result


def _place(value: float, edges: np.ndarray[Any, Any]) -> float:
    """Return the position of a value between the first and last edge on a log scale; 0.5 if all values are equal."""
    span = math.log(float(edges[-1]) / float(edges[0]))
    return min(1.0, max(0.0, math.log(value / float(edges[0])) / span)) if span > 0.01 else 0.5


def _measures(splits: Sequence[SplitFacts]) -> list[list[Histogram]]:
    areas = [[width * height for width, height in zip(split.widths, split.heights)] for split in splits]
    return [
        histograms("Length of questions", [split.question_words for split in splits], "words"),
        histograms("Length of answers", [split.answer_words for split in splits], "words"),
        histograms("Size of images", areas, "pixels"),
        histograms("Image tokens of a question", [split.image_tokens for split in splits], "tokens"),
    ]


def _letters(splits: Sequence[SplitFacts]) -> list[tuple[SplitFacts, list[tuple[str, int, float]]]]:
    """Return letter, number of questions and share for each split with choice questions."""
    result: list[tuple[SplitFacts, list[tuple[str, int, float]]]] = []
    for split in splits:
        counts: Counter[str] = Counter()
        for (_, letter), count in split.letters.items():
            counts[letter] += count
        if total := counts.total():
            used = LETTERS[: max(number for number, _ in split.letters)]
            result.append((split, [(letter, counts[letter], counts[letter] / total) for letter in used]))
    return result


def _pairs(report: DataReport) -> list[ShownPair]:
    """Return pairs of shared images: first those with different names, then the others."""
    order = {"pixels": 0, "hash": 1, "name": 2}
    found = [(overlap, pair) for overlap in report.overlaps for pair in overlap.pairs]
    found.sort(key=lambda item: (order[item[1].how], item[1].bits))
    sources = {key: source for split in report.splits for key, source in split.images.items()}
    how = {"pixels": "equal pixels", "name": "same image"}
    return [
        ShownPair(
            f"{overlap.first} and {overlap.second}: {how.get(pair.how, f'{pair.bits} bits apart')}",
            pair.first,
            pair.second,
            _thumbnail(sources[pair.first]),
            _thumbnail(sources[pair.second]),
        )
        for overlap, pair in found[:MAX_PAIRS]
    ]


def _thumbnail(source: ImageSource) -> str:
    try:
        return thumbnail_uri(source.load(), MAX_THUMBNAIL)
    except ValueError:  # the findings give the reason
        return ""
