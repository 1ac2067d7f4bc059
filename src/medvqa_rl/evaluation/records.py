"""What an evaluation stores and everything that is computed from it: all numbers of ``results.json`` follow from
``samples.jsonl`` and can be computed again. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, median
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.evaluation.metrics import majority_share, rate
from medvqa_rl.evaluation.stats import cluster_bootstrap, exact_mcnemar, paired_cluster_bootstrap
from medvqa_rl.prompts import normalise
from medvqa_rl.types import AnswerType

Numbers = dict[str, float | int]


@dataclass(frozen=True)
class EvalRecord:
    """One question with the model's greedy answer: a line of ``samples.jsonl``."""

    sample_id: str
    image_key: str
    """The cluster: questions about the same images share it."""
    question: str
    options: tuple[str, ...]
    gold: str
    """The gold answer: an option's letter for choice questions, text otherwise."""
    output: str
    """The completion as decoded; empty where unscored."""
    think: str | None
    answer: str | None
    """The answer as parsed; None is no answer."""
    is_correct: bool | None
    """None is unscored: our failure, left out of every rate."""
    is_well_formed: bool
    has_answer: bool
    is_truncated: bool
    """The token limit came before the end."""
    num_tokens: int
    token_f1: float | None
    """Token F1 of open questions; None for others and where unscored."""
    answer_type: AnswerType
    groups: Mapping[str, str] = field(default_factory=dict)
    unscored_reason: str | None = None

    @property
    def is_scored(self) -> bool:
        return self.is_correct is not None


def write_records(records: Iterable[EvalRecord], path: Path) -> None:
    """Write one JSON object per line, in ASCII, so that no character of an output can break a line or the file."""
    lines = [json.dumps(asdict(record)) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def read_records(path: Path) -> list[EvalRecord]:
    """Read a ``samples.jsonl``.

    Raises:
        ValueError: the file is missing or a line of it is no evaluation record.
    """
    if not path.is_file():
        raise ValueError(
            f"There are no evaluation records at {path}: name a samples.jsonl that `medvqa-rl eval` wrote."
        )
    names = {item.name for item in fields(EvalRecord)}
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {path} is not JSON ({error}): evaluate again.") from error
        if not isinstance(row, dict) or row.keys() != names:
            raise ValueError(f"Line {number} of {path} is not an evaluation record of this version: evaluate again.")
        records.append(EvalRecord(**{**row, "options": tuple(row["options"])}))
    return records


def _summary(records: Sequence[EvalRecord], config: EvalConfig) -> Numbers:
    """Numbers of a set of questions; rates are shares of the scored ones, NaN where there are none."""
    scored = [record for record in records if record.is_scored]
    clusters = [record.image_key for record in scored]
    summary: Numbers = {
        "n": len(records),
        "num_scored": len(scored),
        "num_clusters": len(set(clusters)),
        "accuracy": math.nan,
        "accuracy_low": math.nan,
        "accuracy_high": math.nan,
    }
    if scored:
        interval = cluster_bootstrap(
            [float(bool(record.is_correct)) for record in scored],
            clusters,
            resamples=config.bootstrap,
            seed=config.seed,
        )
        summary |= {"accuracy": interval.estimate, "accuracy_low": interval.low, "accuracy_high": interval.high}
    lengths = [record.num_tokens for record in scored]
    f1 = [record.token_f1 for record in scored if record.token_f1 is not None]
    return summary | {
        "format_rate": rate([record.is_well_formed for record in scored]),
        "no_answer_rate": rate([not record.has_answer for record in scored]),
        "truncated_rate": rate([record.is_truncated for record in scored]),
        "unscored_rate": rate([not record.is_scored for record in records]),
        "mean_length": mean(lengths) if lengths else math.nan,
        "median_length": median(lengths) if lengths else math.nan,
        "token_f1": mean(f1) if f1 else math.nan,
        "majority_baseline": majority_share([_gold_key(record) for record in scored]),
    }


def _gold_key(record: EvalRecord) -> str:
    """What a constant answer would be: a letter for choice questions, the normalised gold for others."""
    return record.gold if record.answer_type == "choice" else normalise(record.gold)


def summarise(records: Sequence[EvalRecord], config: EvalConfig) -> dict[str, Any]:
    """All numbers of an evaluation from its records alone.

    Returns:
        ``n``, ``num_scored``, ``num_clusters`` (images), ``accuracy`` with the bounds of its 95 % interval
        (cluster bootstrap, percentile) ``accuracy_low`` and ``accuracy_high``, ``format_rate``, ``no_answer_rate``,
        ``truncated_rate``, ``unscored_rate``, ``mean_length`` and ``median_length`` in tokens, ``token_f1`` of the
        open questions, ``majority_baseline`` (always the most frequent gold answer; the majority letter for choice
        questions), and under ``by`` the same for each value of ``answer_type`` and of every key of the samples'
        groups, such as modality and family. What does not apply is NaN.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("There is nothing to evaluate: the split has no questions; check data and eval.max_samples.")
    by: dict[str, dict[str, list[EvalRecord]]] = {}
    for record in records:
        for key, value in {"answer_type": record.answer_type, **record.groups}.items():
            by.setdefault(key, {}).setdefault(value, []).append(record)
    return {
        **_summary(records, config),
        "by": {
            key: {value: _summary(members, config) for value, members in sorted(values.items())}
            for key, values in by.items()
        },
    }


_LOGGED = (
    *("accuracy", "accuracy_low", "accuracy_high", "token_f1", "mean_length"),
    *("format_rate", "no_answer_rate", "truncated_rate", "unscored_rate"),
)


def flat_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Results under the names of ``metrics.jsonl``: ``eval/accuracy``, ``eval/accuracy/choice``,
    ``eval/format_rate`` ...; what is NaN is left out."""
    metrics = {f"eval/{name}": float(results[name]) for name in _LOGGED}
    for answer_type, summary in results["by"]["answer_type"].items():
        metrics[f"eval/accuracy/{answer_type}"] = float(summary["accuracy"])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def paired_gain(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], config: EvalConfig
) -> dict[str, float | int]:
    """What changed between two evaluations of the same questions.

    Questions that are unscored in either are left out.

    Returns:
        ``n``, ``num_clusters``, ``accuracy_before``, ``accuracy_after``, ``gain`` = after - before with the bounds of
        its 95 % paired interval ``gain_low`` and ``gain_high`` (cluster bootstrap), ``improved`` and ``worsened``
        (questions), ``mcnemar_p``.

    Raises:
        ValueError: the evaluations are of different questions, or no question is scored in both.
    """
    later = {record.sample_id: record for record in after}
    if len(before) != len(after) or {record.sample_id for record in before} != later.keys():
        shared = len({record.sample_id for record in before} & later.keys())
        raise ValueError(
            f"The two evaluations are of different questions ({len(before)} and {len(after)}, {shared} in common): "
            "evaluate both on the same split with the same data settings."
        )
    pairs = [(record, later[record.sample_id]) for record in before]
    pairs = [(one, other) for one, other in pairs if one.is_scored and other.is_scored]
    if not pairs:
        raise ValueError("No question is scored in both evaluations: see unscored_reason in their samples.jsonl.")
    then, now = [bool(one.is_correct) for one, _ in pairs], [bool(other.is_correct) for _, other in pairs]
    clusters = [one.image_key for one, _ in pairs]
    gain = paired_cluster_bootstrap(then, now, clusters, resamples=config.bootstrap, seed=config.seed)
    test = exact_mcnemar(then, now)
    return {
        "n": len(pairs),
        "num_clusters": len(set(clusters)),
        "accuracy_before": mean(map(float, then)),
        "accuracy_after": mean(map(float, now)),
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "improved": test.improved,
        "worsened": test.worsened,
        "mcnemar_p": test.p_value,
    }
