"""A blinded sheet for rating answers: one self-contained HTML form that needs no server.

Answers of several evaluations are mixed, and only the key (:mod:`medvqa_rl.evaluation.judging.ratings`) tells which
evaluation gave which answer. Identical answers to a question are one item. The form stores ratings in the browser and
saves them as a file. Its content security policy allows only the inline script and style, by hash, and no connection;
the script writes all text with ``textContent``. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medvqa_rl.core.randomness import addresses
from medvqa_rl.core.types import LETTERS, Sample
from medvqa_rl.evaluation.judging.ratings import RATINGS_FORMAT, KeyItem, SheetKey
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.compare import Evaluated
from medvqa_rl.evaluation.statistics.summary import pair
from medvqa_rl.report.pages.rendering import render_with_script, thumbnail_uri
from medvqa_rl.rewards.judges.rubric import REASONING

MAX_SIDE = 1024
"""Longest side in pixels of the sheet's images."""


@dataclass(frozen=True)
class Item:
    """One answer to one question, and which evaluations gave it."""

    record: EvalRecord
    evaluations: tuple[str, ...]

    @property
    def reasoning(self) -> str:
        """The reasoning shown: the whole output if no answer could be parsed."""
        if self.record.think is not None:
            return self.record.think
        return "" if self.record.answer is not None else self.record.text


def choose_items(evaluations: Sequence[Evaluated], count: int, seed: int) -> list[Item]:
    """Sample questions and return their distinct answers in random order.

    Only questions that are scored in every evaluation are sampled. The sample is ordered by a hash of the ids, so a
    larger count only adds questions.

    Args:
        evaluations: evaluations of the same questions.
        count: maximum number of questions; each gives one item per distinct answer.
        seed: seed of the sample and of the order.

    Raises:
        ValueError: the evaluations are of different questions, or no question is scored in all of them.
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
                unparsed = record.output if record.think is None and record.answer is None else ""
                name = json.dumps([record.sample_id, record.think, record.answer, unparsed])
                found.setdefault(name, (record, []))[1].append(evaluated.name)
    return [
        Item(found[name][0], tuple(found[name][1]))
        for name in _in_random_order("rating sheet items", seed, sorted(found))
    ]


def _in_random_order(what: str, seed: int, names: Sequence[str]) -> list[str]:
    return [name for _, name in sorted(zip(addresses(what, seed, last=names), names))]


def make_key(items: Sequence[Item], evaluations: Sequence[Evaluated], seed: int) -> SheetKey:
    """Return the key of a sheet with these items in this order."""
    shown = [[item.record.sample_id, item.record.question, item.reasoning, item.record.answer] for item in items]
    sheet = hashlib.sha256(json.dumps([seed, REASONING.hash, shown]).encode()).hexdigest()[:16]
    rows = tuple(
        KeyItem(
            str(number), item.record.sample_id, item.record.image_key, item.evaluations, bool(item.record.is_correct)
        )
        for number, item in enumerate(items, start=1)
    )
    return SheetKey(sheet, seed, tuple(one.name for one in evaluations), rows)


def render_sheet(key: SheetKey, items: Sequence[Item], samples: Mapping[str, Sample]) -> str:
    """Return the sheet as HTML.

    Args:
        key: key of the items.
        items: the items, in the order of the key.
        samples: samples by id, for the images; if empty, no images are shown.

    Raises:
        ValueError: an image cannot be decoded.
    """
    images: dict[str, str] = {}
    names: dict[str, str] = {}
    rows = []
    for row, item in zip(key.items, items, strict=True):
        record, own = item.record, []
        shown = samples[record.sample_id].images if samples else ()
        for image in shown:
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
        scripts=("_sheet.js",),
        data={"format": RATINGS_FORMAT, "sheet": key.sheet, "items": rows, "images": images},
        sheet=key.sheet,
        count=len(rows),
        levels=list(enumerate(REASONING.levels)),
    )
