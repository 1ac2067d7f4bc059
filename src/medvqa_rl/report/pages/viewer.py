"""The data of the report's browser of training groups: completions with thumbnails, within a size budget. Imports no
torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from medvqa_rl.config import leaves
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS
from medvqa_rl.report.pages.images import Thumbnails, samples_of_groups
from medvqa_rl.report.runs import StoredGroup, StoredRun, read_groups

T = TypeVar("T")

MAX_GROUPS = 500
MAX_TEXT_BYTES = 3_000_000
MAX_IMAGE_BYTES = 3_000_000
"""With the answers of evaluations and everything else, the page stays below 10 MB."""


@dataclass(frozen=True)
class Viewer:
    """What a browser on the page shows, and notes about it."""

    groups: Sequence[dict[str, Any]]
    """Groups of completions, or questions with their answers."""
    images: dict[str, str]
    """Data URI of each image by its key on this page."""
    notes: Sequence[str]


def build_viewer(runs: Sequence[StoredRun], *, images: bool = True) -> Viewer:
    """Collect the groups of some runs, evenly subsampled if there are too many.

    Args:
        images: also look up the images.
    """
    notes: list[str] = []
    found: list[tuple[int, StoredGroup]] = []
    for number, run in enumerate(runs):
        groups, problems = read_groups(run)
        notes += [f"{run.name}: {problem}" for problem in problems]
        found += [(number, group) for group in groups]
    kept, plain = within(found, lambda item: _group(*item), MAX_GROUPS, MAX_TEXT_BYTES)
    if len(kept) < len(found):
        notes.append(
            f"{len(kept)} of {len(found)} stored groups are shown, evenly subsampled, to keep the page small."
        )
    thumbnails = Thumbnails("", MAX_IMAGE_BYTES)
    runs_with_images = runs if images else []
    for number, run in enumerate(runs_with_images):
        own = [(group, shown) for (place, group), shown in zip(kept, plain) if place == number]
        samples, problem = samples_of_groups(run, [group for group, _ in own])
        if problem:
            notes.append(f"{run.name}: {problem}")
        for group, shown in own:
            if (sample := samples.get(group.sample_id)) is not None:
                shown["images"] = thumbnails.add(sample, str(run.data.get("train")), notes)
                shown["tags"] = shown["tags"] or {"answer_type": sample.answer_type, **sample.groups}
    if plain and not images:
        notes.append("The page was written without images.")
    notes += thumbnails.note()
    return Viewer(plain, thumbnails.uris, notes)


def section_tags(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    """The tags that the runs' completions may have, and the opening ones of answers, for the script."""
    tags, answers = dict.fromkeys(DEFAULT_WORDING.tags), dict.fromkeys(DEFAULT_WORDING.answer[:1])
    for name, value in ((name, value) for run in runs for name, value in leaves(run.config).items()):
        if name.startswith("prompt.tags.") and isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            tags |= dict.fromkeys(value)
            answers |= dict.fromkeys(value[:1]) if name == "prompt.tags.answer" else {}
    return {"tags": list(tags), "answerTags": list(answers)}


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """Return at most ``limit`` of the items, evenly spaced, including the last."""
    if len(items) <= limit:
        return list(items)
    return [items[(place + 1) * len(items) // limit - 1] for place in range(limit)]


def within(
    items: Sequence[T], draw: Callable[[T], dict[str, Any]], limit: int, max_bytes: int
) -> tuple[list[T], list[dict[str, Any]]]:
    """Return at most ``limit`` of the items, evenly spaced, and their JSON, which takes at most ``max_bytes`` together
    unless one alone takes more."""
    kept = evenly(items, limit)
    plain = [draw(item) for item in kept]
    while len(plain) > 1 and sum(len(json.dumps(one)) for one in plain) > max_bytes:
        kept, plain = evenly(kept, len(kept) * 9 // 10), evenly(plain, len(plain) * 9 // 10)
    return kept, plain


def _group(run: int, group: StoredGroup) -> dict[str, Any]:
    """Return a group as JSON for the script."""
    gold = group.gold
    if group.options and gold in LETTERS[: len(group.options)]:
        gold = f"{gold}: {group.options[LETTERS.index(gold)]}"
    return {
        "run": run,
        "step": group.step,
        "id": group.sample_id,
        "question": group.question,
        "options": [f"{letter}: {text}" for letter, text in zip(LETTERS, group.options)],
        "gold": gold,
        "tags": dict(group.tags),
        "images": [],
        "completions": [
            {
                "text": item.text,
                "outcome": "right" if item.is_correct else "wrong" if item.has_answer else "none",
                "cut": item.is_truncated,
                "tokens": item.num_tokens,
                "rewards": [[name, _rounded(value)] for name, value in item.rewards.items()],
                "reward": _rounded(item.reward),
                "advantage": _rounded(item.advantage),
            }
            for item in group.completions
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
