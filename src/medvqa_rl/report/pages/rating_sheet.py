"""A blinded sheet on which people rate answers: one HTML form that needs no server and loads nothing.

Answers of several evaluations are mixed, and nothing on the page tells whose they are; the key does
(:mod:`ratings`). Equal answers to a question are one item. The form keeps what is rated in the
browser and saves it as a file. Its content security policy allows the one script and the one style inside it, by
their hashes, and no connection; the script writes all text with ``textContent``. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.config import Config
from medvqa_rl.core.answers import without_tags
from medvqa_rl.core.randomness import addresses
from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.data import Split, load_dataset
from medvqa_rl.evaluation.judging.ratings import RATINGS_FORMAT, KeyItem, SheetKey
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.compare import Evaluated
from medvqa_rl.evaluation.statistics.summary import pair
from medvqa_rl.report.pages.rendering import render_with_script, thumbnail_uri
from medvqa_rl.rewards.judges.rubric import REASONING

MAX_SIDE = 1024
"""Longest side in pixels of the sheet's images."""
_SPLITS: tuple[Split, ...] = ("test", "val", "train")


@dataclass(frozen=True)
class Item:
    """One answer to one question, and which evaluations gave it."""

    record: EvalRecord
    evaluations: tuple[str, ...]

    @property
    def reasoning(self) -> str:
        """What is shown as reasoning; of an output in which no answer could be read, all of it."""
        if self.record.think is not None:
            return self.record.think
        return "" if self.record.answer is not None else without_tags(self.record.output)


def choose_items(evaluations: Sequence[Evaluated], count: int, seed: int) -> list[Item]:
    """Answers to some questions in random order.

    Questions are chosen by the hash of their ids, so a larger count adds to a smaller one's; only those that every
    evaluation has scored.

    Args:
        evaluations: of the same questions.
        count: of questions, at most; each gives as many items as there are different answers to it.
        seed: of the choice and of the order.

    Raises:
        ValueError: the evaluations are of different questions, or no question is scored in all.
    """
    first = evaluations[0]
    shared = {record.sample_id for record in first.records if record.is_scored}
    for other in evaluations[1:]:
        shared &= {one.sample_id for one, _ in pair(first.records, other.records)}
    if not shared:
        raise ValueError(
            f"No question is scored in all of {', '.join(one.name for one in evaluations)}: see unscored_reason in "
            "their samples.jsonl."
        )
    chosen = _in_random_order("rating sheet questions", seed, sorted(shared))[:count]
    found: dict[str, tuple[EvalRecord, list[str]]] = {}
    wanted = set(chosen)
    for evaluated in evaluations:
        for record in evaluated.records:
            if record.sample_id in wanted:
                said = record.output if record.think is None and record.answer is None else ""
                name = json.dumps([record.sample_id, record.think, record.answer, said])
                found.setdefault(name, (record, []))[1].append(evaluated.name)
    return [
        Item(found[name][0], tuple(found[name][1]))
        for name in _in_random_order("rating sheet items", seed, sorted(found))
    ]


def _in_random_order(what: str, seed: int, names: Sequence[str]) -> list[str]:
    return [name for _, name in sorted(zip(addresses(what, seed, last=names), names))]


def make_key(items: Sequence[Item], evaluations: Sequence[Evaluated], seed: int) -> SheetKey:
    """The key of a sheet with these items in this order."""
    shown = [[item.record.sample_id, item.record.question, item.reasoning, item.record.answer] for item in items]
    sheet = hashlib.sha256(json.dumps([seed, REASONING.hash, shown]).encode()).hexdigest()[:16]
    rows = tuple(
        KeyItem(
            str(place), item.record.sample_id, item.record.image_key, item.evaluations, bool(item.record.is_correct)
        )
        for place, item in enumerate(items, start=1)
    )
    return SheetKey(sheet, seed, tuple(one.name for one in evaluations), rows)


def find_samples(folder: Path, records: Sequence[EvalRecord]) -> dict[str, Sample]:
    """The samples of an evaluation's records, by id, from the data set that its settings name.

    Raises:
        ValueError: the settings or the data set are not there, or it is another than the one that was evaluated.
    """
    results = _read(folder / "results.json")
    dataset, config = results.get("dataset"), results.get("config")
    if not isinstance(config, dict):  # an evaluation while training: the settings are the run's
        config = _read(folder.parent.parent / "config.resolved.json")
    hint = "restore the data, or make the sheet with --no-images"
    if not isinstance(dataset, dict) or not config:
        raise ValueError(
            f"The evaluation in {folder} does not say which data it is of, so its images are unknown: {hint}."
        )
    try:
        data = Config.model_validate(config).data
    except ValueError as error:
        raise ValueError(f"The settings of the evaluation in {folder} are of another version: {hint}.") from error
    problems = []
    for split in _SPLITS:
        try:
            found = load_dataset(data, split)
        except (ValueError, OSError) as error:
            problems.append(f"{split}: {error}")
            continue
        if found.fingerprint == dataset.get("fingerprint"):
            wanted = {record.sample_id: record.image_key for record in records}
            samples = {sample.id: sample for index in range(len(found)) if (sample := found[index]).id in wanted}
            if any(id not in samples or samples[id].image_key != key for id, key in wanted.items()):
                break
            return samples
    told = f" ({' '.join(problems)})" if problems else ""
    raise ValueError(f"The data of the evaluation in {folder} cannot be found again{told}: {hint}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def render_sheet(key: SheetKey, items: Sequence[Item], samples: Mapping[str, Sample]) -> str:
    """The sheet as HTML.

    Args:
        key: of these items.
        items: in their order.
        samples: by id, for the images; empty shows none.

    Raises:
        ValueError: an image cannot be decoded.
    """
    images: dict[str, str] = {}
    names: dict[str, str] = {}
    rows = []
    for row, item in zip(key.items, items, strict=True):
        record, own = item.record, []
        for image in samples[record.sample_id].images if samples else ():
            if image.key not in names:
                names[image.key] = str(len(names))
                images[names[image.key]] = thumbnail_uri(image.load(), MAX_SIDE, lossless_bytes=300_000)
            own.append(names[image.key])
        rows.append(
            {
                "id": row.item,
                "question": record.question,
                "options": [f"{letter}: {text}" for letter, text in zip(LETTERS, record.options)],
                "gold": record.reference,
                "reasoning": item.reasoning,
                "answer": record.answer or "",
                "images": own,
            }
        )
    return render_with_script(
        "sheet.html.j2",
        styles=("_style.css", "_sheet.css"),
        script="_sheet.js",
        data={"format": RATINGS_FORMAT, "sheet": key.sheet, "items": rows, "images": images},
        sheet=key.sheet,
        count=len(rows),
        levels=list(enumerate(REASONING.levels)),
    )
