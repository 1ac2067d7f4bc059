"""The data of the report's sample viewer: stored completions with thumbnails, within a size budget. Imports no torch.

A run stores texts and numbers but no images. Images are looked up by sample id in the data set of its settings, if
that still has the same fingerprint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from medvqa_rl.config import Config, leaves
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS, Sample
from medvqa_rl.evaluation.pass_rates import load_training_set
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.report.pages.rendering import thumbnail_uri
from medvqa_rl.report.runs import StoredGroup, StoredRun, read_groups

T = TypeVar("T")

MAX_GROUPS = 500
MAX_TEXT_BYTES = 3_500_000
MAX_IMAGE_BYTES = 4_500_000
"""With everything else, the page stays below 10 MB."""
MAX_THUMBNAIL = 224
"""Longest side in pixels of the viewer's images."""


@dataclass(frozen=True)
class Viewer:
    """The data of the page's script, and notes about it."""

    groups: Sequence[dict[str, Any]]
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
    kept = evenly(found, MAX_GROUPS)
    plain = [_group(run, group) for run, group in kept]
    while len(plain) > 1 and sum(len(json.dumps(group)) for group in plain) > MAX_TEXT_BYTES:
        kept, plain = evenly(kept, len(kept) * 9 // 10), evenly(plain, len(plain) * 9 // 10)
    if len(kept) < len(found):
        notes.append(
            f"{len(kept)} of {len(found)} stored groups are shown, evenly subsampled, to keep the page small."
        )
    thumbnails = _Thumbnails()
    runs_with_images = runs if images else []
    for number, run in enumerate(runs_with_images):
        own = [(group, shown) for (place, group), shown in zip(kept, plain) if place == number]
        samples, problem = find_samples(run, [group for group, _ in own])
        if problem:
            notes.append(f"{run.name}: {problem}")
        for group, shown in own:
            if group.sample_id in samples:
                thumbnails.add(samples[group.sample_id], shown, notes)
    if plain and not images:
        notes.append("The page was written without images.")
    if left_out := thumbnails.num_left_out:
        notes.append(
            f"{number_of(left_out, 'image')} {'is' if left_out == 1 else 'are'} left out to keep the page small."
        )
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


def find_samples(run: StoredRun, groups: Sequence[StoredGroup]) -> tuple[dict[str, Sample], str]:
    """Find the samples of stored groups in the data set of the run's settings, by id.

    Returns:
        The samples, and a sentence if images cannot be shown, else an empty string.
    """
    if not groups:
        return {}, ""
    try:
        config = Config.model_validate(run.config)
    except ValueError:
        return {}, "the settings are missing or have another version, so the images cannot be found."
    try:
        dataset = load_training_set(config.data)
    except (ValueError, OSError) as error:
        return {}, f"the data set {config.data.name} is not available here, so no images are shown: {error}"
    known = run.data.get("train")
    if not isinstance(known, dict) or known.get("fingerprint") != dataset.fingerprint:
        return {}, (
            f"the data set {dataset.name} has changed since the run (another fingerprint), so no images are shown."
        )
    samples: Iterable[Sample]
    if dataset.is_endless:
        train = config.train
        samples = (
            draw.sample
            for step in sorted({group.step for group in groups})
            for draw in step_samples(dataset, step - 1, num_prompts=train.prompts_per_step, seed=train.seed)
        )
    else:
        samples = (dataset[index] for index in range(len(dataset)))
    wanted = {group.sample_id for group in groups}
    return {sample.id: sample for sample in samples if sample.id in wanted}, ""


class _Thumbnails:
    """Images on the page, each stored once."""

    def __init__(self) -> None:
        self.uris: dict[str, str] = {}
        self.num_left_out = 0
        self._names: dict[str, str] = {}
        self._size = 0

    def add(self, sample: Sample, shown: dict[str, Any], notes: list[str]) -> None:
        """Add a sample's images to its group, and the tags that older versions did not store."""
        shown["tags"] = shown["tags"] or {"answer_type": sample.answer_type, **sample.groups}
        for image in sample.images:
            if image.key not in self._names:
                if self._size >= MAX_IMAGE_BYTES:
                    self.num_left_out += 1
                    continue
                try:
                    uri = thumbnail_uri(image.load(), MAX_THUMBNAIL, lossless_bytes=8_000)
                except ValueError as error:
                    notes.append(str(error))
                    continue
                self._size += len(uri)
                self._names[image.key] = name = str(len(self._names))
                self.uris[name] = uri
            shown["images"].append(self._names[image.key])
