"""Greedy evaluation of a model on a data set: answers, per-sample records, results and files.

Imports torch only through the engine that is passed in.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from medvqa_rl.config import EvalConfig
from medvqa_rl.data.images import MemoryImage
from medvqa_rl.data.splits import choose
from medvqa_rl.evaluation.metrics import token_f1
from medvqa_rl.evaluation.records import EvalRecord, flat_metrics, paired_gain, read_records, summarise, write_records
from medvqa_rl.prompts import Template, parse_completion
from medvqa_rl.rewards.correctness import is_correct
from medvqa_rl.types import Completion, Dataset, Group, Sample

__all__ = [
    "EvalRecord",
    "Evaluation",
    "Progress",
    "evaluate",
    "paired_gain",
    "read_records",
    "results_table",
    "summarise",
    "write_evaluation",
]

Progress = Callable[[int, int], None]
"""Called with the number of questions done and their total."""


class GreedyEngine(Protocol):
    """What evaluation needs of :class:`medvqa_rl.rollout.decode.RolloutEngine`."""

    def greedy(self, samples: Sequence[Sample], *, max_completion_length: int, batch_size: int) -> Iterator[Group]: ...


@dataclass(frozen=True)
class Evaluation:
    """The records of an evaluation and what was computed from them."""

    records: tuple[EvalRecord, ...]
    results: Mapping[str, Any]
    """As :func:`medvqa_rl.evaluation.records.summarise` returns them, with ``dataset``, ``settings`` and
    ``versions``: the content of ``results.json``."""

    @property
    def metrics(self) -> dict[str, float]:
        """The main numbers under the names of ``metrics.jsonl``."""
        return flat_metrics(self.results)

    def table(self, title: str = "") -> Table:
        """Accuracy with intervals, overall and by every group, for the terminal."""
        return results_table(self.results, title)


def evaluate(
    engine: GreedyEngine,
    dataset: Dataset,
    config: EvalConfig,
    *,
    max_completion_length: int,
    template: Template = "think_answer",
    progress: Progress | None = None,
) -> Evaluation:
    """Answer every question greedily and score the answers with the rewards' own scorer.

    A question whose image cannot be decoded is unscored: recorded with its reason, left out of every rate and
    counted in ``unscored_rate``. ``eval.max_samples`` keeps a choice by ``eval.seed``.

    Args:
        engine: generates the answers.
        dataset: the questions; not an endless one, whose length would say nothing.
        config: batch size, limits and bootstrap.
        max_completion_length: tokens per answer.
        template: form in which the engine asks and answers are read.
        progress: called after every batch.

    Raises:
        ValueError: the data set is endless or has no questions.
    """
    if dataset.is_endless:
        raise ValueError(
            f"The data set {dataset.name} is endless and cannot be evaluated: use its val or test split, or set a "
            "number of samples."
        )
    samples = _chosen(dataset, config)
    total = len(dataset) if config.max_samples is None else min(len(dataset), config.max_samples)
    records: list[EvalRecord] = []
    while batch := list(islice(samples, config.batch_size)):
        records += _answer(engine, batch, config, max_completion_length, template)
        if progress is not None:
            progress(len(records), total)
    results = summarise(records, config)
    results["dataset"] = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "size": len(dataset),
        "notes": dict(dataset.notes),
    }
    results["settings"] = {
        **config.model_dump(),
        "max_completion_length": max_completion_length,
        "template": template,
        "decoding": "greedy",
        "interval": "95 %, percentile bootstrap of images",
    }
    packages = ("medvqa-rl", "torch", "transformers", "numpy", "scipy", "pillow")
    results["versions"] = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return Evaluation(tuple(records), results)


def _chosen(dataset: Dataset, config: EvalConfig) -> Iterator[Sample]:
    """The samples to evaluate, one after the other (drawing one may cost time)."""
    if config.max_samples is None or config.max_samples >= len(dataset):
        return (dataset[index] for index in range(len(dataset)))
    chosen = choose([str(index) for index in range(len(dataset))], config.max_samples, config.seed)
    return (dataset[index] for index in chosen)


def _answer(
    engine: GreedyEngine, batch: Sequence[Sample], config: EvalConfig, max_completion_length: int, template: Template
) -> list[EvalRecord]:
    """Records of some samples in their order. Images are decoded here, so that one that fails is told apart from
    any other error and spoils its own question only."""
    reasons: dict[str, str] = {}
    decoded = []
    for sample in batch:
        try:
            images = tuple(MemoryImage(image.key, image.load()) for image in sample.images)
        except ValueError as error:
            reasons[sample.id] = str(error)
        else:
            decoded.append(replace(sample, images=images))
    groups = engine.greedy(decoded, max_completion_length=max_completion_length, batch_size=config.batch_size)
    completions = {group.sample.id: group.completions[0] for group in groups} if decoded else {}
    assert len(completions) == len(decoded), "one answer per question, and ids are unique"
    return [
        _unscored(sample, reasons[sample.id])
        if sample.id in reasons
        else _scored(sample, completions[sample.id], template)
        for sample in batch
    ]


def _scored(sample: Sample, completion: Completion, template: Template) -> EvalRecord:
    parsed = parse_completion(completion.text, template)
    return EvalRecord(
        sample_id=sample.id,
        image_key=sample.image_key,
        question=sample.question,
        options=sample.options,
        gold=sample.answer,
        output=completion.text,
        think=parsed.think,
        answer=parsed.answer,
        is_correct=is_correct(sample, parsed.answer),
        is_well_formed=parsed.is_well_formed,
        has_answer=parsed.answer is not None,
        is_truncated=completion.is_truncated,
        num_tokens=len(completion.token_ids),
        token_f1=token_f1(parsed.answer, sample.answer) if sample.answer_type == "open" else None,
        answer_type=sample.answer_type,
        groups=dict(sample.groups),
    )


def _unscored(sample: Sample, reason: str) -> EvalRecord:
    return EvalRecord(
        sample_id=sample.id,
        image_key=sample.image_key,
        question=sample.question,
        options=sample.options,
        gold=sample.answer,
        output="",
        think=None,
        answer=None,
        is_correct=None,
        is_well_formed=False,
        has_answer=False,
        is_truncated=False,
        num_tokens=0,
        token_f1=None,
        answer_type=sample.answer_type,
        groups=dict(sample.groups),
        unscored_reason=reason,
    )


def _without_nan(value: Any) -> Any:
    """NaN as null: what does not apply, in a form that every JSON reader takes."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``samples.jsonl`` and then ``results.json``, each atomically, into a folder that is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    samples, results = folder / "samples.jsonl", folder / "results.json"
    write_records(evaluation.records, samples.with_suffix(".partial"))
    os.replace(samples.with_suffix(".partial"), samples)
    text = json.dumps(_without_nan(dict(evaluation.results)), indent=2, ensure_ascii=False, allow_nan=False)
    results.with_suffix(".partial").write_text(text + "\n", encoding="utf-8")
    os.replace(results.with_suffix(".partial"), results)


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def results_table(results: Mapping[str, Any], title: str = "") -> Table:
    """A table of results, as computed or as read from ``results.json``: percentages with 95 % intervals."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("")
    for name in ("questions", "images", "accuracy", "95 % interval", "majority", "no answer", "format", "length"):
        table.add_column(name, justify="right")

    def add(name: str, summary: Mapping[str, Any], style: str = "") -> None:
        low, high = _percent(summary["accuracy_low"]), _percent(summary["accuracy_high"])
        length = summary["mean_length"]
        table.add_row(
            name,
            f"{summary['num_scored']:,}",
            f"{summary['num_clusters']:,}",
            _percent(summary["accuracy"]),
            f"{low} to {high}" if low else "",
            _percent(summary["majority_baseline"]),
            _percent(summary["no_answer_rate"]),
            _percent(summary["format_rate"]),
            "" if length is None or math.isnan(length) else f"{length:.0f}",
            style=style,
        )

    add("all", results, "bold")
    for key, values in results["by"].items():
        table.add_section()
        for value, summary in values.items():
            add(f"{key.replace('_', ' ')}: {value}", summary)
    if unscored := results["n"] - results["num_scored"]:
        table.caption = f"{unscored} of {results['n']} questions could not be scored and are left out."
    return table
