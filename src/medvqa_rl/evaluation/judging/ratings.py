"""What people say of answers on a blinded sheet: the sheet's key, their files, and what follows. Imports no torch.

```text
sheet.html          the form, without a word about whose answer is whose
sheet.key.json      which evaluation each item is from; stays with the one who made the sheet
ratings-....json    what a rater saved from the form
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from medvqa_rl.core.files import write_json
from medvqa_rl.evaluation.statistics.raters import Scale, alpha_interval, kappa_interval
from medvqa_rl.evaluation.statistics.stats import cluster_bootstrap, paired_cluster_bootstrap, proportion_interval
from medvqa_rl.rewards.judges.rubric import TOP

KEY_FORMAT = "medvqa-rl rating key 1"
RATINGS_FORMAT = "medvqa-rl ratings 1"
LEVELS = TOP + 1
"""Scores of the rubric, from 0."""
NOMINAL: Scale = "nominal"
INTERVAL: Scale = "interval"


@dataclass(frozen=True)
class KeyItem:
    """An item of a sheet: one answer to one question."""

    item: str
    sample_id: str
    image_key: str
    evaluations: tuple[str, ...]
    """Those that gave this very answer."""
    is_correct: bool
    """What the package's scorer says of it."""


@dataclass(frozen=True)
class SheetKey:
    """Which item of a sheet is whose."""

    sheet: str
    """Names the sheet: a hash of what is on it."""
    seed: int
    evaluations: tuple[str, ...]
    """Folders as they were given; the first is the baseline."""
    items: tuple[KeyItem, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": KEY_FORMAT, **asdict(self)}


@dataclass(frozen=True)
class Rating:
    """What one rater says of one item; None is that it cannot be told."""

    is_correct: bool | None
    reasoning: int | None
    """0 to 3 on the rubric."""
    comment: str = ""


@dataclass(frozen=True)
class RaterFile:
    """What one rater saved."""

    rater: str
    ratings: Mapping[str, Rating]
    """By item."""


def write_key(key: SheetKey, path: Path) -> None:
    """Write a key as a whole or not at all."""
    write_json(path, key.to_json())


def read_key(path: Path) -> SheetKey:
    """Read what :func:`write_key` wrote.

    Raises:
        ValueError: it is no such file.
    """
    found = _read_object(path, KEY_FORMAT, "the key that `medvqa-rl judge sheet` wrote beside the sheet")
    try:
        items = tuple(KeyItem(**{**item, "evaluations": tuple(item["evaluations"])}) for item in found["items"])
        del found["format"]
        key = SheetKey(**{**found, "evaluations": tuple(found["evaluations"]), "items": items})
    except (TypeError, KeyError) as error:
        raise ValueError(f"The key {path} is damaged ({error}): make the sheet again, or restore its key.") from error
    if not {name for item in items for name in item.evaluations} <= set(key.evaluations):
        raise ValueError(f"The key {path} is damaged (an item is of no evaluation): restore it.")
    return key


def read_ratings(path: Path, key: SheetKey) -> RaterFile:
    """Read what a rater saved from the form.

    Raises:
        ValueError: it is no such file, of another sheet, or holds something that the form does not write.
    """
    found = _read_object(path, RATINGS_FORMAT, "a file that the rating sheet saved")
    if found.keys() != {"format", "sheet", "rater", "ratings"} or not isinstance(found["ratings"], list):
        raise ValueError(
            f"The file {path} does not hold sheet, rater and ratings alone: save it from the sheet again."
        )
    if found["sheet"] != key.sheet:
        raise ValueError(
            f"The file {path} rates the sheet {found['sheet']!r}, but the key is of the sheet {key.sheet!r}: give the "
            "key that was written beside the sheet that was rated."
        )
    rater = found["rater"]
    if not isinstance(rater, str) or not rater.strip():
        raise ValueError(f"The file {path} names no rater: write a name or number under rater.")
    ratings: dict[str, Rating] = {}
    known = {item.item for item in key.items}
    for place, row in enumerate(found["ratings"], start=1):
        where = f"Rating {place} of {path}"
        if not isinstance(row, dict) or row.keys() != {"item", "correct", "reasoning", "comment"}:
            raise ValueError(f"{where} does not hold item, correct, reasoning and comment alone: save it again.")
        item, correct, reasoning, comment = row["item"], row["correct"], row["reasoning"], row["comment"]
        if not isinstance(item, str) or item not in known:
            raise ValueError(f"{where} is of the item {item!r}, which the sheet does not have: check the key.")
        if item in ratings:
            raise ValueError(f"{where} rates the item {item!r} a second time: keep one of the two.")
        if not (correct is None or isinstance(correct, bool)):
            raise ValueError(
                f"{where} says correct is {correct!r}: write true, false, or null where it cannot be told."
            )
        # A bool is an int, but no score.
        if not (reasoning is None or (type(reasoning) is int and 0 <= reasoning < LEVELS)):
            raise ValueError(f"{where} scores the reasoning {reasoning!r}: write 0, 1, 2, 3, or null.")
        if not isinstance(comment, str):
            raise ValueError(f"{where} has a comment that is no text: write a text, which may be empty.")
        ratings[item] = Rating(correct, reasoning, comment)
    if not ratings:
        raise ValueError(f"The file {path} holds no rating: rate the sheet before saving it.")
    return RaterFile(rater.strip().encode(errors="replace").decode(), ratings)  # it is printed


def _read_object(path: Path, form: str, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}: give {what}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"The file {path} is not JSON ({type(error).__name__}): give {what}.") from error
    if not isinstance(found, dict) or found.get("format") != form:
        raise ValueError(f"The file {path} is not of the format {form!r}: give {what}.")
    return found


def summarise_ratings(key: SheetKey, raters: Sequence[RaterFile], *, seed: int = 0) -> dict[str, Any]:
    """What the raters found.

    Returns:
        ``items``, how many; ``comments``; ``raters``: for each ``name``, ``rated``, ``cannot_tell`` (verdicts left
        open), ``accuracy`` and ``reasoning`` (means of what they said); ``evaluations``: for each ``name``, ``items``
        (rated by anybody), ``accuracy`` (share of right answers; an item counts with the mean of its raters) and
        ``reasoning`` (mean of 0 to 3) with 95 % intervals that resample images, ``scorer_accuracy`` of the same items;
        ``differences``: for each further evaluation ``name``, ``accuracy`` and ``reasoning`` minus the first one's on
        the same questions; ``agreement`` for ``correct`` and ``reasoning``: ``items`` that two or more rated, ``same``
        (share of them on which all agree), ``alpha`` (Krippendorff's, nominal and interval) and, of exactly two
        raters, ``kappa`` (Cohen's, of reasoning with quadratic weights); None with one rater.

    Raises:
        ValueError: two raters have the same name.
    """
    names = [rater.rater for rater in raters]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two files are by the rater {twice!r}: give each rater once, or a name of their own.")
    means = {item.item: _means(item.item, raters) for item in key.items}
    return {
        "items": len(key.items),
        "comments": [
            {"item": item, "rater": rater.rater, "comment": rating.comment}
            for rater in raters
            for item, rating in rater.ratings.items()
            if rating.comment.strip()
        ],
        "raters": [_rater(rater) for rater in raters],
        "evaluations": [_evaluation(name, key, means, seed) for name in key.evaluations],
        "differences": [_difference(name, key, means, seed) for name in key.evaluations[1:]],
        "agreement": None
        if len(raters) < 2
        else {
            "correct": _agreement(key, raters, "correct", seed),
            "reasoning": _agreement(key, raters, "reasoning", seed),
        },
    }


def _said(rating: Rating, what: str) -> int | None:
    if what == "reasoning":
        return rating.reasoning
    return None if rating.is_correct is None else int(rating.is_correct)


def _means(item: str, raters: Sequence[RaterFile]) -> dict[str, float]:
    """Mean of the raters of an item for ``correct`` and ``reasoning``; without those that nobody told."""
    found = {}
    for what in ("correct", "reasoning"):
        said = [_said(rater.ratings[item], what) for rater in raters if item in rater.ratings]
        if known := [value for value in said if value is not None]:
            found[what] = mean(map(float, known))
    return found


def _rater(rater: RaterFile) -> dict[str, Any]:
    correct = [_said(rating, "correct") for rating in rater.ratings.values()]
    reasoning = [rating.reasoning for rating in rater.ratings.values()]

    def average(values: Sequence[int | None]) -> float:
        known = [float(value) for value in values if value is not None]
        return mean(known) if known else math.nan

    return {
        "name": rater.rater,
        "rated": len(rater.ratings),
        "cannot_tell": (correct + reasoning).count(None),
        "accuracy": average(correct),
        "reasoning": average(reasoning),
    }


def _interval(values: Sequence[float], clusters: Sequence[str], seed: int) -> dict[str, float] | None:
    """Mean with its interval; None of nothing."""
    if not values:
        return None
    if set(values) <= {0.0, 1.0}:
        return proportion_interval([value == 1 for value in values], clusters, seed=seed).to_json()
    return cluster_bootstrap(values, clusters, seed=seed).to_json()


def _evaluation(name: str, key: SheetKey, means: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    own = [item for item in key.items if name in item.evaluations and means[item.item]]

    def measured(what: str) -> dict[str, float] | None:
        some = [(means[item.item][what], item.image_key) for item in own if what in means[item.item]]
        return _interval([value for value, _ in some], [image for _, image in some], seed)

    return {
        "name": name,
        "items": len(own),
        "accuracy": measured("correct"),
        "reasoning": measured("reasoning"),
        "scorer_accuracy": mean(float(item.is_correct) for item in own) if own else math.nan,
    }


def _difference(name: str, key: SheetKey, means: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    """An evaluation minus the first one, question by question."""
    baseline = key.evaluations[0]
    first, other = (
        {item.sample_id: item for item in key.items if one in item.evaluations} for one in (baseline, name)
    )
    found: dict[str, Any] = {"name": name}
    for what in ("correct", "reasoning"):
        pairs = [
            (means[first[id].item][what], means[other[id].item][what], first[id].image_key)
            for id in first
            if id in other and what in means[first[id].item] and what in means[other[id].item]
        ]
        gain = None
        if pairs:
            before, after, images = zip(*pairs)
            gain = {"questions": len(pairs), **paired_cluster_bootstrap(before, after, images, seed=seed).to_json()}
        found["accuracy" if what == "correct" else what] = gain
    return found


def _agreement(key: SheetKey, raters: Sequence[RaterFile], what: str, seed: int) -> dict[str, Any]:
    rows = [
        ([_said(rater.ratings[item.item], what) if item.item in rater.ratings else None for rater in raters], item)
        for item in key.items
    ]
    some = [([value for value in row if value is not None], item.image_key) for row, item in rows]
    some = [(row, image) for row, image in some if len(row) > 1]
    units, images = [row for row, _ in some], [image for _, image in some]
    levels, scale = (2, NOMINAL) if what == "correct" else (LEVELS, INTERVAL)
    found: dict[str, Any] = {"items": len(units), "same": None, "alpha": None}
    if units:
        found["same"] = proportion_interval([len(set(unit)) == 1 for unit in units], images, seed=seed).to_json()
        found["alpha"] = alpha_interval(units, images, levels=levels, scale=scale, seed=seed).to_json()
    if len(raters) == 2:
        first, second = [unit[0] for unit in units], [unit[1] for unit in units]
        found["kappa"] = (
            kappa_interval(first, second, images, levels=levels, scale=scale, seed=seed).to_json() if units else None
        )
    return found
