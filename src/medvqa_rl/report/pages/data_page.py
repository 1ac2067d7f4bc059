"""One self-contained HTML page about a data set: what is wrong, what splits share, how everything is distributed.

Like the other pages it loads nothing, has no script, and escapes all text. Imports no torch.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from medvqa_rl.core.types import LETTERS, ImageSource
from medvqa_rl.data.findings import DataReport, SplitFacts
from medvqa_rl.data.images.files import shrink

THUMBNAIL = 160 * 160
"""Pixels of an image in the page."""

MAX_PAIRS = 12
"""Shared images that are shown."""

MAX_ISSUES = 200
"""Dropped and repaired rows that are listed."""

BINS = 24


@dataclass(frozen=True)
class Histogram:
    """Bars of one split for one measure; all splits of a measure have the same scale."""

    title: str
    counts: tuple[int, ...]
    ticks: tuple[tuple[float, str], ...]
    """(place from 0 to 1, label)."""
    summary: str
    median: float
    """Place of the median from 0 to 1."""

    @property
    def heights(self) -> list[float]:
        """Bars from 0 to 1."""
        top = max(self.counts, default=0) or 1
        return [count / top for count in self.counts]


@dataclass(frozen=True)
class ShownPair:
    """Two images that are the same, or look alike."""

    title: str
    first: str
    second: str
    first_image: str
    """Data address of a thumbnail; empty where the image cannot be decoded."""
    second_image: str


def write_data_page(out: Path, report: DataReport, budget_source: str) -> Path:
    """Write the page, atomically; its folder is made.

    Args:
        out: the file.
        report: what a check found.
        budget_source: where the limits on image sizes are known from.
    """
    html = (
        _environment()
        .get_template("data.html.j2")
        .render(
            report=report,
            title=", ".join(dict.fromkeys(split.name.rsplit("/", 1)[0] for split in report.splits)),
            budget_source=budget_source,
            unit=report.budget.patch_size * report.budget.merge_size,
            measures=_measures(report.splits),
            letters=_letters(report.splits),
            pairs=_pairs(report),
            max_issues=MAX_ISSUES,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(html, encoding="utf-8", errors="replace")
    os.replace(partial, out)
    return out


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("medvqa_rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda share: "–" if math.isnan(share) else f"{100 * share:.1f} %"
    return environment


def histograms(title: str, values: Sequence[Sequence[int]], unit: str) -> list[Histogram]:
    """Histograms of the same measure of several splits, with bins of equal ratio from the least to the largest value.

    Args:
        title: the measure.
        values: whole numbers of at least 0, per split; 0 goes into the first bin.
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
    """Where a value lies between the first and the last edge, by ratio; 0.5 where they hold one value."""
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
    """Splits with choice questions: (letter, questions, share) for each."""
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
    """The shared images that a name does not give away first, then some of the others."""
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
        image = shrink(source.load(), THUMBNAIL)
    except ValueError:  # the findings say why
        return ""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
