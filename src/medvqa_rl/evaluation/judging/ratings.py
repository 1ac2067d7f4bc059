"""Ratings of answers by people on a blinded sheet: the sheet's key, the raters' files, and statistics. No torch.

```text
sheet.html          the form, which does not reveal which model gave an answer
sheet.key.json      the evaluation of each item; kept by whoever made the sheet
ratings-....json    one rater's ratings, saved from the form
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

from pydantic import TypeAdapter

from medvqa_rl.core.files import read_json, write_json
from medvqa_rl.core.text import shown
from medvqa_rl.evaluation.judging.intervals import mean_interval, share_interval
from medvqa_rl.evaluation.statistics.intervals_and_tests import paired_cluster_bootstrap
from medvqa_rl.evaluation.statistics.raters import Scale, alpha_interval, kappa_interval
from medvqa_rl.rewards.judges.rubric import REASONING

KEY_FORMAT = "medvqa-rl rating key 1"
RATINGS_FORMAT = "medvqa-rl ratings 1"
LEVELS = len(REASONING.levels)
ASPECTS = ("correct", "reasoning")
"""What a rater judges of each item."""


@dataclass(frozen=True)
class KeyItem:
    """An item of a sheet: one answer to one question."""

    item: str
    sample_id: str
    image_key: str
    evaluations: tuple[str, ...]
    """The evaluations that gave exactly this answer."""
    is_correct: bool
    """According to the package's scorer."""


@dataclass(frozen=True)
class SheetKey:
    """The evaluation behind each item of a sheet."""

    sheet: str
    """Identifies the sheet: a hash of its content."""
    seed: int
    evaluations: tuple[str, ...]
    """Their folders as given on the command line; the first is the baseline."""
    items: tuple[KeyItem, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"format": KEY_FORMAT, **asdict(self)}


_KEY = TypeAdapter(SheetKey)


@dataclass(frozen=True)
class Rating:
    """One rater's rating of one item; None means "cannot tell"."""

    is_correct: bool | None
    reasoning: int | None
    """0 to 3 on the rubric."""
    comment: str = ""


@dataclass(frozen=True)
class RaterFile:
    """One rater's file."""

    rater: str
    ratings: Mapping[str, Rating]
    """By item."""


def write_key(key: SheetKey, path: Path) -> None:
    """Write a key, whole or not at all."""
    write_json(path, key.to_json())


def read_key(path: Path) -> SheetKey:
    """Read a key.

    Raises:
        ValueError: the file is not a key, or is damaged.
    """
    _read_object(path, KEY_FORMAT, "the key that `medvqa-rl judge sheet` wrote beside the sheet")
    key = read_json(_KEY, path, "make the sheet again, or restore its key")
    if not {name for item in key.items for name in item.evaluations} <= set(key.evaluations):
        raise ValueError(f"The key {path} is damaged (an item belongs to no evaluation): restore it.")
    if len({item.item for item in key.items}) < len(key.items) or not (key.items and key.evaluations):
        raise ValueError(f"The key {path} is damaged (an item is missing, or stands twice): restore it.")
    return key


def read_ratings(path: Path, key: SheetKey) -> RaterFile:
    """Read a rater's file.

    Raises:
        ValueError: the file has another format, belongs to another sheet, or holds anything the form does not write.
    """
    found = _read_object(path, RATINGS_FORMAT, "a file that the rating sheet saved")
    if found.keys() != {"format", "sheet", "rater", "ratings"} or not isinstance(found["ratings"], list):
        raise ValueError(
            f"The file {path} does not hold exactly sheet, rater and ratings: save it from the sheet again."
        )
    if found["sheet"] != key.sheet:
        raise ValueError(
            f"The file {path} rates the sheet {shown(found['sheet'])}, but the key belongs to the sheet "
            f"{shown(key.sheet)}: "
            "give the key written beside the rated sheet."
        )
    rater = found["rater"]
    if not isinstance(rater, str) or not rater.strip():
        raise ValueError(f"The file {path} names no rater: write a name or number under rater.")
    ratings: dict[str, Rating] = {}
    known = {item.item for item in key.items}
    for place, row in enumerate(found["ratings"], start=1):
        where = f"Rating {place} of {path}"
        if not isinstance(row, dict) or row.keys() != {"item", "correct", "reasoning", "comment"}:
            raise ValueError(f"{where} does not hold exactly item, correct, reasoning and comment: save it again.")
        item, correct, reasoning, comment = row["item"], row["correct"], row["reasoning"], row["comment"]
        if not isinstance(item, str) or item not in known:
            raise ValueError(f"{where} is for the item {shown(item)}, which the sheet does not have: check the key.")
        if item in ratings:
            raise ValueError(f"{where} rates the item {shown(item)} a second time: keep one of the two.")
        if not (correct is None or isinstance(correct, bool)):
            raise ValueError(
                f'{where} has {shown(correct)} under correct: write true, false, or null for "cannot tell".'
            )
        # A bool is an int, but not a score.
        if not (reasoning is None or (type(reasoning) is int and 0 <= reasoning < LEVELS)):
            raise ValueError(f"{where} has {shown(reasoning)} under reasoning: write 0, 1, 2, 3, or null.")
        if not isinstance(comment, str):
            raise ValueError(f"{where} has a comment that is not a text: write a text, which may be empty.")
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
        raise ValueError(f"The file {path} is not of the format {shown(form)}: give {what}.")
    return found


def summarise_ratings(key: SheetKey, raters: Sequence[RaterFile], *, seed: int = 0) -> dict[str, Any]:
    """Summarise the ratings.

    Returns:
        ``items``, their number; ``comments``; ``raters``: for each ``name``, ``rated``, ``cannot_tell`` (ratings left
        open), ``accuracy`` and ``reasoning`` (means of their ratings); ``evaluations``: for each ``name``, ``items``
        (rated by anyone), ``accuracy`` (share of right answers; an item with several raters counts with their mean)
        and ``reasoning`` (mean from 0 to 3) with 95 % intervals that resample images, and ``scorer_accuracy`` of the
        same items; ``differences``: for each further evaluation ``name``, ``accuracy`` and ``reasoning`` minus the
        first one's on the same questions; ``agreement`` for ``correct`` and ``reasoning``: ``items`` rated by two or
        more, ``same`` (share of them on which all agree), ``alpha`` (Krippendorff's, nominal and interval) and, for
        exactly two raters, ``kappa`` (Cohen's, for reasoning with quadratic weights); None with one rater.

    Raises:
        ValueError: two raters have the same name.
    """
    names = [rater.rater for rater in raters]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two files are by the rater {shown(twice)}: give each rater once, or a name of their own.")
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
        "agreement": None if len(raters) < 2 else {what: _agreement(key, raters, what, seed) for what in ASPECTS},
    }


def _rated(rating: Rating | None, what: str) -> list[float]:
    """The rating of one aspect, in a list; empty if the rater did not rate it."""
    value = None if rating is None else rating.reasoning if what == "reasoning" else rating.is_correct
    return [] if value is None else [float(value)]


def _means(item: str, raters: Sequence[RaterFile]) -> dict[str, float]:
    """Mean over the raters of an item for each aspect that anyone rated."""
    rated = {what: [value for rater in raters for value in _rated(rater.ratings.get(item), what)] for what in ASPECTS}
    return {what: mean(values) for what, values in rated.items() if values}


def _rater(rater: RaterFile) -> dict[str, Any]:
    rated = {what: [value for one in rater.ratings.values() for value in _rated(one, what)] for what in ASPECTS}
    return {
        "name": rater.rater,
        "rated": len(rater.ratings),
        "cannot_tell": len(ASPECTS) * len(rater.ratings) - sum(map(len, rated.values())),
        "accuracy": mean(rated["correct"]) if rated["correct"] else math.nan,
        "reasoning": mean(rated["reasoning"]) if rated["reasoning"] else math.nan,
    }


def _evaluation(name: str, key: SheetKey, means: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    own = [item for item in key.items if name in item.evaluations and means[item.item]]

    def interval(what: str) -> dict[str, float] | None:
        rows = [(means[item.item][what], item.image_key) for item in own if what in means[item.item]]
        if {value for value, _ in rows} <= {0.0, 1.0}:
            return share_interval([(value == 1, image) for value, image in rows], seed=seed)
        return mean_interval(rows, seed=seed)

    return {
        "name": name,
        "items": len(own),
        "accuracy": interval("correct"),
        "reasoning": interval("reasoning"),
        "scorer_accuracy": mean(float(item.is_correct) for item in own) if own else math.nan,
    }


def _difference(name: str, key: SheetKey, means: Mapping[str, Mapping[str, float]], seed: int) -> dict[str, Any]:
    """An evaluation minus the first one, question by question."""
    baseline = key.evaluations[0]
    first, other = (
        {item.sample_id: item for item in key.items if one in item.evaluations} for one in (baseline, name)
    )
    found: dict[str, Any] = {"name": name}
    for what in ASPECTS:
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
        ([int(value) for rater in raters for value in _rated(rater.ratings.get(item.item), what)], item.image_key)
        for item in key.items
    ]
    rows = [(unit, image) for unit, image in rows if len(unit) > 1]
    scale: Scale = "nominal" if what == "correct" else "interval"
    levels = 2 if what == "correct" else LEVELS
    units, images = [unit for unit, _ in rows], [image for _, image in rows]
    found: dict[str, Any] = {
        "items": len(rows),
        "same": share_interval([(len(set(unit)) == 1, image) for unit, image in rows], seed=seed),
        "alpha": alpha_interval(units, images, levels=levels, scale=scale, seed=seed).to_json() if rows else None,
    }
    if len(raters) == 2:
        first, second = [unit[0] for unit in units], [unit[1] for unit in units]
        kappa = kappa_interval(first, second, images, levels=levels, scale=scale, seed=seed) if rows else None
        found["kappa"] = None if kappa is None else kappa.to_json()
    return found
