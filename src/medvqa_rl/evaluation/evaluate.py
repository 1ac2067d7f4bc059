"""Evaluation of a model on a data set: answers, per-sample records, results and files.

Imports torch only through the engine that is passed in.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from medvqa_rl.config import EvalConfig, PrefetchConfig
from medvqa_rl.core.files import write_json
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.types import Dataset, Sample, Template
from medvqa_rl.evaluation.answering import Asking, Engine, Progress, answer_all, chosen_samples
from medvqa_rl.evaluation.measures.instruments import NOTHING, Instruments, measure
from medvqa_rl.evaluation.records import EvalRecord, read_records, write_records
from medvqa_rl.evaluation.statistics.summary import flat_metrics, paired_gain, summarise
from medvqa_rl.evaluation.statistics.tables import controls_table, results_table

__all__ = [
    "EvalRecord",
    "Evaluation",
    "EvaluationFailed",
    "Progress",
    "check_unscored",
    "controls_table",
    "evaluate",
    "paired_gain",
    "read_records",
    "results_table",
    "summarise",
    "write_evaluation",
]

PACKAGES = ("medvqa-rl", "torch", "transformers", "numpy", "scipy", "pillow")
_INTERVALS = {"bca": "95 %, BCa bootstrap of images", "percentile": "95 %, percentile bootstrap of images"}


class EvaluationFailed(RuntimeError):
    """Too many questions could not be scored for the results to mean anything."""


@dataclass(frozen=True)
class Evaluation:
    """The records of an evaluation and what was computed from them."""

    records: tuple[EvalRecord, ...]
    results: Mapping[str, Any]
    """As :func:`summarise` returns them, with ``dataset``, ``settings``, ``seeds`` and
    ``versions``: the content of ``results.json``."""

    @property
    def metrics(self) -> dict[str, float]:
        """The main numbers under the names of ``metrics.jsonl``."""
        return flat_metrics(self.results)

    def table(self, title: str = "") -> Table:
        """Accuracy with intervals, overall and by every group, for the terminal."""
        return results_table(self.results, title)


def evaluate(
    engine: Engine,
    dataset: Dataset,
    config: EvalConfig,
    *,
    max_completion_length: int,
    template: Template = "think_answer",
    progress: Progress | None = None,
    prefetch: PrefetchConfig = PrefetchConfig(),
    instruments: Instruments = NOTHING,
) -> Evaluation:
    """Answer every question and score the answers with the rewards' own scorer.

    Answers are greedy; with ``eval.num_samples`` further ones are sampled. A question whose image cannot be used is
    unscored: recorded with its reason, left out of every rate and counted in ``unscored_rate``. ``eval.max_samples``
    keeps a choice by ``eval.seed``. Prompts of similar length are answered together.

    Args:
        engine: generates the answers.
        dataset: the questions; not an endless one, whose length would say nothing.
        config: batch size, limits and bootstrap.
        max_completion_length: tokens per answer.
        template: form in which the engine asks and answers are read.
        progress: called after every batch.
        prefetch: how the prompts of the next batch are prepared; no result depends on it.
        instruments: what measures the outputs besides.

    Raises:
        ValueError: the data set is endless, has no questions, or not unique ids.
    """
    samples = [as_asked(sample, template) for sample in chosen_samples(dataset, config)]
    asking = Asking(config, max_completion_length, template, dataset.name, prefetch)
    records: dict[str, EvalRecord] = {}

    def keep(some: Sequence[EvalRecord]) -> None:
        records.update({record.sample_id: record for record in some})

    answer_all(lambda: engine, samples, asking, keep=keep, progress=progress)
    measured = measure([records[sample.id] for sample in samples], instruments)
    return make_evaluation(measured, samples, dataset, asking)


def make_evaluation(
    records: Sequence[EvalRecord], samples: Sequence[Sample], dataset: Dataset, asking: Asking
) -> Evaluation:
    """Results of the records of all chosen questions, in their order.

    Raises:
        ValueError: there are none.
    """
    config = asking.config
    results = summarise(records, config)
    results["dataset"] = {
        "name": dataset.name,
        "fingerprint": dataset.fingerprint,
        "size": len(dataset),
        "questions": questions_hash(samples),
        "notes": dict(dataset.notes),
    }
    results["settings"] = {
        **config.model_dump(),
        "max_completion_length": asking.max_completion_length,
        "template": asking.template,
        "decoding": "greedy",
        "interval": _INTERVALS[config.interval],
    }
    results["seeds"] = {"choice": config.seed, "sampling": config.seed, "bootstrap": config.seed}
    results["versions"] = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return Evaluation(tuple(records), results)


def questions_hash(samples: Sequence[Sample]) -> str:
    """16 hexadecimal digits of the SHA-256 of the evaluated questions: ids, questions, options, gold answers, image
    names."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.id, sample.question, sample.options, sample.answer, sample.image_key)).encode())
    return digest.hexdigest()[:16]


def check_unscored(results: Mapping[str, Any], config: EvalConfig) -> None:
    """Refuse results of which too much is missing.

    Raises:
        EvaluationFailed: more than ``eval.fail_on_unscored`` of the questions could not be scored.
    """
    if results["unscored_rate"] > config.fail_on_unscored:
        count = results["n"] - results["num_scored"]
        raise EvaluationFailed(
            f"{count} of {results['n']} questions of {results['dataset']['name']} could not be scored, more than "
            f"eval.fail_on_unscored = {config.fail_on_unscored:g} allows: see unscored_reason in samples.jsonl, "
            "repair the data, or raise the setting."
        )


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``samples.jsonl`` and then ``results.json``, each atomically, into a folder that is made if needed."""
    write_records(evaluation.records, folder / "samples.jsonl")
    write_json(folder / "results.json", evaluation.results)
