"""One self-contained HTML page about a run: what changed, for which questions, and what the model wrote.

The page loads nothing: styles and images are inside it, it has no script, and a content security policy forbids the
rest. All text is escaped, for completions and data sets can hold any string. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from medvqa_rl.core.answers import is_correct, parse_completion
from medvqa_rl.core.prompts import ALL_TAGS
from medvqa_rl.core.types import LETTERS, Group, Scores
from medvqa_rl.report.figures.style import number
from medvqa_rl.report.pages.inline import data_uri, thumbnail_uri

LIMITS = (
    "Research software, not for clinical use: nothing here may inform the care of a patient.",
    "The demo's images and questions are procedural. They show that the method works, not how well it does on real "
    "images.",
    "Intervals resample images of one evaluation. They do not cover another training seed or another hospital.",
)
"""What every demo page says about itself."""

MAX_THUMBNAIL = 320
"""Longest side in pixels of the images in the page."""


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions."""

    name: str
    before: Mapping[str, Any]
    """Results as in ``results.json``."""
    after: Mapping[str, Any]
    gain: Mapping[str, Any]
    """What :func:`medvqa_rl.evaluation.statistics.summary.paired_gain` returns."""
    note: str = ""
    """A sentence below the numbers."""
    names: tuple[str, str] = ("before", "after")
    """What the two are called."""


@dataclass(frozen=True)
class FigureFile:
    """A figure to show: PNG files for the light and, where there is one, the dark theme."""

    title: str
    light: Path
    dark: Path | None = None
    caption: str = ""


@dataclass(frozen=True)
class ShownCompletion:
    """A completion with everything that was made of it."""

    text: str
    is_correct: bool
    is_truncated: bool
    num_tokens: int
    parts: Mapping[str, float]
    """Reward parts before their weights; NaN is unscored."""
    total: float
    advantage: float


@dataclass(frozen=True)
class ShownGroup:
    """A question with the completions that were sampled for it."""

    caption: str
    """When this was, such as "step 25"."""
    question: str
    options: tuple[str, ...]
    gold: str
    tags: Mapping[str, str]
    """The sample's groups, such as modality and family."""
    image: Image.Image | None
    completions: Sequence[ShownCompletion]


@dataclass(frozen=True)
class DemoPage:
    """Everything that is on the page."""

    title: str
    lead: str
    """One or two sentences that say what was done."""
    comparisons: Sequence[Comparison]
    """The first one is broken down into tables."""
    figures: Sequence[FigureFile] = ()
    groups: Sequence[ShownGroup] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Short facts beside the settings: versions, seeds, seconds."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration, nested as in ``config.resolved.json``."""
    breakdown: Sequence[str] = ("modality", "family", "answer_type")
    """Groups that get a table; those that are absent are left out."""
    limits: Sequence[str] = LIMITS


def shown_group(group: Group, scores: Scores, advantages: Any, index: int, *, caption: str) -> ShownGroup:
    """Take a group out of a training step.

    Args:
        group: the index-th of the step's groups.
        scores: rewards of the step's groups.
        advantages: (P, G) advantages, an array or a tensor.
        index: place of the group in the step.
        caption: when this was.
    """
    sample = group.sample
    completions = [
        ShownCompletion(
            text=completion.text,
            is_correct=is_correct(sample, parse_completion(completion.text, group.template).answer),
            is_truncated=completion.is_truncated,
            num_tokens=len(completion.token_ids),
            parts={name: float(values[index, place]) for name, values in scores.parts.items()},
            total=float(scores.total[index, place]),
            advantage=float(advantages[index][place]),
        )
        for place, completion in enumerate(group.completions)
    ]
    image = sample.images[0].load() if sample.images else None
    return ShownGroup(caption, sample.question, sample.options, sample.answer, sample.groups, image, completions)


def write_demo_page(out: Path, page: DemoPage) -> Path:
    """Write the page, atomically; its folder is made.

    Raises:
        ValueError: there is no comparison to show.
    """
    if not page.comparisons:
        raise ValueError("There is nothing to put on a page: give at least one comparison of two evaluations.")
    first = page.comparisons[0]
    known = [key for key in page.breakdown if key in first.before["by"] and key in first.after["by"]]
    html = (
        environment()
        .get_template("demo.html.j2")
        .render(
            page=page,
            tables=[breakdown_table(key, first) for key in known],
            settings=flat_settings(page.settings),
            letters=LETTERS,
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(html, encoding="utf-8", errors="replace")
    os.replace(partial, out)
    return out


def environment() -> Environment:
    """Templates with escaping on and the filters that they use."""
    made = Environment(
        loader=PackageLoader("medvqa_rl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": _percent,
        "signed": _signed,
        "p_value": _p_value,
        "points": _points,
        "figure": _figure,
        "thumbnail": _thumbnail,
        "pieces": _pieces,
        "reward": _reward,
        "place": _place,
        "scale": _scale,
    }
    return made


def breakdown_table(key: str, comparison: Comparison) -> dict[str, Any]:
    """Rows of a breakdown: name, summaries before and after, change; the largest groups first."""
    before, after = comparison.before["by"][key], comparison.after["by"][key]
    rows = [(value, before[value], after[value]) for value in before if value in after]
    rows.sort(key=lambda row: -row[2]["num_scored"])
    return {"title": f"By {key.replace('_', ' ')}", "rows": rows}


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under dotted names, as they are written on the command line."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            flat[prefix + name] = ", ".join(map(str, value)) or "none"
        else:
            flat[prefix + name] = "none" if value is None or value == {} else str(value)
    return flat


# --- filters -------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    share = number(value)
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def _points(value: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    share = number(value)
    return "–" if math.isnan(share) else f"{100 * share:+.1f}".replace("-", "−")


def _p_value(value: float) -> str:
    """A p-value of a permutation test, which cannot be 0."""
    return f"{value:.3f}" if value >= 0.001 else "below 0.001"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _reward(value: float) -> str:
    return "unscored" if math.isnan(value) else f"{value:.2f}".rstrip("0").rstrip(".").replace("-", "−")


def _place(value: float | None) -> float:
    """A share as a place on a scale of 100; 0 where there is none."""
    share = number(value)
    return 0.0 if math.isnan(share) else round(100 * share, 2)


def _scale(group: ShownGroup) -> float:
    """The largest advantage of a group in size, or 1: the length of the bars."""
    return max((abs(completion.advantage) for completion in group.completions), default=0.0) or 1.0


def _figure(path: Path) -> str:
    return data_uri(path.read_bytes(), "png")


def _thumbnail(image: Image.Image) -> str:
    return thumbnail_uri(image, MAX_THUMBNAIL)


_TAG = re.compile("(" + "|".join(map(re.escape, ALL_TAGS)) + ")")


def _pieces(text: str) -> list[tuple[str, str]]:
    """A completion cut at its tags: (class, text), the class being tag, answer or text."""
    pieces: list[tuple[str, str]] = []
    kind = "text"
    for piece in _TAG.split(text):
        if piece in ALL_TAGS:
            kind = "answer" if piece == "<answer>" else "text"
            pieces.append(("tag", piece))
        elif piece:
            pieces.append((kind, piece))
    return pieces
