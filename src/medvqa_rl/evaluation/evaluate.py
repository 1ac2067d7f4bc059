"""Evaluate a model on a data set: answers, per-sample records, results and files. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvqa_rl.config import EvalConfig, PrefetchConfig
from medvqa_rl.core.files import write_json
from medvqa_rl.core.packages import installed
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.types import Dataset, Sample, Template
from medvqa_rl.evaluation.answering import Progress, answer_all, chosen_samples
from medvqa_rl.evaluation.measures.instruments import NOTHING, Instruments, measure
from medvqa_rl.evaluation.records import EvalRecord, write_records
from medvqa_rl.evaluation.scoring import AnswerSettings
from medvqa_rl.evaluation.statistics.summary import flat_metrics, summarise

if TYPE_CHECKING:
    from medvqa_rl.rollout.decode import RolloutEngine

PACKAGES = ("medvqa-rl", "torch", "transformers", "numpy", "scipy", "pillow")
_INTERVALS = {"bca": "95 %, BCa bootstrap of images", "percentile": "95 %, percentile bootstrap of images"}


class EvaluationFailed(RuntimeError):
    """Too many questions could not be scored for the results to mean anything."""


@dataclass(frozen=True)
class Evaluation:
    """The records of an evaluation and the results computed from them."""

    records: tuple[EvalRecord, ...]
    """One per question: the output, the parsed answer, the gold answer, the score and why."""
    results: Mapping[str, Any]
    """The content of ``results.json``: what :func:`summarise` returns, and ``dataset``, ``settings``, ``seeds`` and
    ``versions``."""
    folder: Path | None = None
    """Where both are written, if they are."""

    @property
    def metrics(self) -> dict[str, float]:
        """The main numbers under the names of ``metrics.jsonl``."""
        return flat_metrics(self.results)

    @property
    def accuracy(self) -> float | None:
        """Share of the scored questions that are right; None if none was scored."""
        found: float | None = self.results["accuracy"]
        return found

    @property
    def interval(self) -> tuple[float | None, float | None]:
        """95 % interval of the accuracy, by bootstrap over images."""
        return self.results["accuracy_low"], self.results["accuracy_high"]

    def samples(self) -> list[dict[str, Any]]:
        """The records as dicts, as ``pandas.DataFrame`` and ``datasets.Dataset.from_list`` take them."""
        return [asdict(record) for record in self.records]

    def __repr__(self) -> str:
        numbers = ["none" if value is None else f"{value:.1%}" for value in (self.accuracy, *self.interval)]
        where = "" if self.folder is None else f" in {str(self.folder)!r}"
        return f"Evaluation(accuracy {numbers[0]}, 95 % interval {numbers[1]} to {numbers[2]}{where})"


@dataclass(frozen=True)
class Plan:
    """The questions of an evaluation and how they are answered."""

    dataset: Dataset
    samples: Sequence[Sample]
    settings: AnswerSettings

    def answer(
        self, engine: RolloutEngine, *, part: slice = slice(None), progress: Progress | None = None
    ) -> list[EvalRecord]:
        """Answer the questions.

        Args:
            part: the batches to answer, so that ranks can share them; no answer depends on who gives it.
            progress: called after each batch.
        """
        records: list[EvalRecord] = []
        answer_all(lambda: engine, self.samples, self.settings, part=part, save=records.extend, progress=progress)
        return records

    def conclude(self, records: Iterable[EvalRecord], instruments: Instruments = NOTHING) -> Evaluation:
        """Measure the answers and compute the results.

        Args:
            records: of all questions, in any order.
            instruments: further measures of the outputs.
        """
        by_id = {record.sample_id: record for record in records}
        measured = measure([by_id[sample.id] for sample in self.samples], instruments)
        return make_evaluation(measured, self.samples, self.dataset, self.settings)


def plan_evaluation(
    dataset: Dataset,
    config: EvalConfig,
    *,
    max_completion_length: int,
    template: Template = "think_answer",
    prefetch: PrefetchConfig = PrefetchConfig(),
) -> Plan:
    """Choose the questions of an evaluation; see :func:`evaluate`.

    Raises:
        ValueError: the data set is endless, or its ids are not unique.
    """
    samples = [as_asked(sample, template) for sample in chosen_samples(dataset, config)]
    return Plan(dataset, samples, AnswerSettings(config, max_completion_length, template, dataset.name, prefetch))


def evaluate(
    engine: RolloutEngine,
    dataset: Dataset,
    config: EvalConfig,
    *,
    max_completion_length: int,
    template: Template = "think_answer",
    progress: Progress | None = None,
    prefetch: PrefetchConfig = PrefetchConfig(),
    instruments: Instruments = NOTHING,
) -> Evaluation:
    """Answer every question greedily and score the answers with the scorer that rewards use.

    ``eval.num_samples`` more answers are sampled per question. A question whose image cannot be used is unscored:
    recorded with its reason, left out of every rate and counted in ``unscored_rate``.

    Args:
        engine: generates the answers.
        dataset: the questions; must not be endless.
        config: batch size, limits and bootstrap.
        max_completion_length: tokens per answer.
        template: the engine's prompt template, which also says how answers are parsed.
        progress: called after each batch.
        prefetch: how prompts are prepared ahead; no result depends on it.
        instruments: further measures of the outputs.

    Raises:
        ValueError: the data set is endless, has no questions, or its ids are not unique.
    """
    plan = plan_evaluation(
        dataset, config, max_completion_length=max_completion_length, template=template, prefetch=prefetch
    )
    return plan.conclude(plan.answer(engine, progress=progress), instruments)


def make_evaluation(
    records: Sequence[EvalRecord], samples: Sequence[Sample], dataset: Dataset, settings: AnswerSettings
) -> Evaluation:
    """Compute the results of an evaluation from the records of all chosen questions.

    Args:
        records: in the order of the samples.
        samples: the chosen questions.
        dataset: that they were chosen from.
        settings: that they were answered with.

    Raises:
        ValueError: there are no records.
    """
    config = settings.config
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
        "max_completion_length": settings.max_completion_length,
        "template": settings.template,
        "decoding": "greedy",
        "interval": _INTERVALS[config.interval],
    }
    results["seeds"] = {"choice": config.seed, "sampling": config.seed, "bootstrap": config.seed}
    results["versions"] = {"python": platform.python_version(), **installed(PACKAGES)}
    return Evaluation(tuple(records), results)


def questions_hash(samples: Sequence[Sample]) -> str:
    """Hash the evaluated questions (ids, questions, options, gold answers and how they are compared, image names): 16
    hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.id, sample.question, sample.options, sample.answer, sample.image_key)).encode())
        if sample.alternatives or sample.answers_as != "text":
            digest.update(repr((sample.alternatives, sample.answers_as)).encode())
    return digest.hexdigest()[:16]


def check_unscored(results: Mapping[str, Any], config: EvalConfig) -> None:
    """Fail an evaluation with too many unscored questions.

    Raises:
        EvaluationFailed: more than ``eval.fail_on_unscored`` of the questions could not be scored.
    """
    if results["unscored_rate"] > config.fail_on_unscored:
        count = results["n"] - results["num_scored"]
        raise EvaluationFailed(
            f"{count} of {results['n']} questions of {results['dataset']['name']} could not be scored, more than "
            f"eval.fail_on_unscored = {config.fail_on_unscored:g} allows: repair what unscored_reason in "
            "samples.jsonl names and evaluate again into another folder, with --output."
        )


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Write ``samples.jsonl``, then ``results.json``, each atomically; the folder is created."""
    write_records(evaluation.records, folder / "samples.jsonl")
    write_json(folder / "results.json", evaluation.results)
