"""Compute results from the records of an evaluation: every number in ``results.json`` can be recomputed from
``samples.jsonl``. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.answers import compared
from medvqa_rl.core.text import shown
from medvqa_rl.evaluation.measures.confidence import confidence_summary
from medvqa_rl.evaluation.measures.measured import measured_summary
from medvqa_rl.evaluation.measures.metrics import average, majority_at_k, majority_share, pass_at_k, rate
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import (
    cluster_bootstrap,
    cluster_permutation,
    cluster_standard_error,
    effective_n,
    exact_mcnemar,
    minimum_detectable_effect,
    paired_difference_interval,
    proportion_interval,
)

Numbers = dict[str, Any]

CHANGED = 0.25
"""Share of answers assumed to differ between two models, for ``detectable_difference``."""


def _summary(records: Sequence[EvalRecord], config: EvalConfig) -> Numbers:
    """Summarise a set of questions; rates are shares of the scored ones, NaN if there are none."""
    scored = [record for record in records if record.is_scored]
    clusters = [record.image_key for record in scored]
    right = [bool(record.is_correct) for record in scored]
    summary: Numbers = {
        "n": len(records),
        "num_scored": len(scored),
        "num_clusters": len(set(clusters)),
        "effective_n": math.nan,
        "accuracy": math.nan,
        "accuracy_low": math.nan,
        "accuracy_high": math.nan,
    }
    if scored:
        interval = proportion_interval(
            right, clusters, resamples=config.bootstrap, seed=config.seed, method=config.interval
        )
        summary |= {
            "effective_n": effective_n(right, clusters),
            "accuracy": interval.estimate,
            "accuracy_low": interval.low,
            "accuracy_high": interval.high,
        }
    lengths = [record.num_tokens for record in scored]
    return summary | {
        "format_rate": rate([record.is_well_formed for record in scored]),
        "no_answer_rate": rate([not record.has_answer for record in scored]),
        "truncated_rate": rate([record.is_truncated for record in scored]),
        "unscored_rate": rate([not record.is_scored for record in records]),
        "mean_length": mean(lengths) if lengths else math.nan,
        "median_length": median(lengths) if lengths else math.nan,
        "exact_match": average(record.exact_match for record in scored),
        "token_f1": average(record.token_f1 for record in scored),
        "rouge_l": average(record.rouge_l for record in scored),
        "majority_baseline": majority_share([_gold_keys(record) for record in scored]),
    }


def _gold_keys(record: EvalRecord) -> frozenset[str]:
    """The constant answers that would be correct: letters for choice questions, else gold answers as compared."""
    golds = (record.gold, *record.alternatives)
    return frozenset(
        golds if record.answer_type == "choice" else (compared(gold, record.answers_as) for gold in golds)
    )


def grouping(record: EvalRecord) -> dict[str, str]:
    """The groups of a record: annotated answer type, yes/no or other, and the sample's own groups."""
    return {"answer_type": record.answer_type, "answer_kind": record.answer_kind, **record.groups}


def by_group(records: Iterable[EvalRecord]) -> dict[str, dict[str, list[EvalRecord]]]:
    """Group records by key and value of their :func:`grouping`."""
    by: dict[str, dict[str, list[EvalRecord]]] = {}
    for record in records:
        for key, value in grouping(record).items():
            by.setdefault(key, {}).setdefault(value, []).append(record)
    return {key: dict(sorted(values.items())) for key, values in by.items()}


def summarise(records: Sequence[EvalRecord], config: EvalConfig) -> dict[str, Any]:
    """Compute all results of an evaluation from its records.

    Returns:
        ``n``, ``num_scored``, ``num_clusters`` (images), ``effective_n`` (number of independent questions with the
        same information), ``accuracy`` with its 95 % interval ``accuracy_low`` to ``accuracy_high`` (images resampled,
        ``eval.interval``), ``format_rate``, ``no_answer_rate``, ``truncated_rate``, ``unscored_rate``, ``mean_length``
        and ``median_length`` in tokens, ``exact_match``, ``token_f1`` and ``rouge_l`` of open questions, and
        ``majority_baseline`` (accuracy of always giving the most frequent gold answer, or letter). Under ``by`` the
        same for each value of ``answer_type`` (as annotated), ``answer_kind`` (yes/no or other) and every key of the
        samples' groups, such as modality and family.

        ``averages``: ``micro_questions`` is the accuracy; ``macro_images`` and ``macro_<key>`` average the accuracies
        of images, or of a key's values, with equal weights. ``detectable_difference``: the difference from another
        model that is detected with 80 % power on these questions, if a quarter of the answers differ. ``letters``:
        frequencies of gold and given letters in choice questions. ``majority_per_type``: accuracy of always giving the
        most frequent gold answer of the question's answer type. ``sampled``: results of the k sampled answers, if any.
        ``lengths``, ``thinking``, ``perplexity``, ``similarity`` and ``faithfulness``: see
        :func:`medvqa_rl.evaluation.measures.measured.measured_summary`; ``confidence``: see
        :func:`medvqa_rl.evaluation.measures.confidence.confidence_summary`. What does not apply is NaN.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("There is nothing to evaluate: the split has no questions; check data and eval.max_samples.")
    overall = _summary(records, config)
    by = {
        key: {value: _summary(members, config) for value, members in values.items()}
        for key, values in by_group(records).items()
    }
    images: dict[str, list[bool]] = {}
    for record in records:
        if record.is_scored:
            images.setdefault(record.image_key, []).append(bool(record.is_correct))
    averages = {
        "micro_questions": overall["accuracy"],
        "macro_images": average(mean(map(float, right)) for right in images.values()),
    }
    for key, values in by.items():
        accuracies = [summary["accuracy"] for summary in values.values() if summary["num_scored"]]
        averages[f"macro_{key}"] = average(accuracies)
    return {
        **overall,
        "averages": averages,
        "detectable_difference": minimum_detectable_effect(
            math.sqrt(
                CHANGED / min(overall["effective_n"], overall["num_scored"])
            )  # above it by chance, in few images
        ),
        "letters": _letters(records),
        "majority_per_type": _majority_per_type(records),
        "sampled": _sampled(records, config),
        **measured_summary(records),
        "confidence": confidence_summary(records, config),
        "by": by,
    }


def _majority_per_type(records: Sequence[EvalRecord]) -> float:
    """Accuracy of always giving the most frequent gold answer of the question's answer type (an oracle baseline)."""
    by_type: dict[str, list[frozenset[str]]] = {}
    for record in records:
        if record.is_scored:
            by_type.setdefault(record.answer_type, []).append(_gold_keys(record))
    count = sum(map(len, by_type.values()))
    return sum(majority_share(golds) * len(golds) for golds in by_type.values()) / count if count else math.nan


def _letters(records: Sequence[EvalRecord]) -> Numbers:
    """Count gold and given letters of the scored choice questions, with the total variation distance between the two
    distributions. Answers that name no option count as a letter of their own."""
    chosen = [record for record in records if record.answer_type == "choice" and record.is_scored]
    gold, given = Counter(record.gold for record in chosen), Counter(record.choice or "none" for record in chosen)
    letters = sorted(gold.keys() | given.keys() - {"none"}) + (["none"] if given["none"] else [])
    return {
        "gold": {letter: gold[letter] for letter in letters},
        "given": {letter: given[letter] for letter in letters},
        "distance": _half_distance(gold, given) if chosen else math.nan,
    }


def _half_distance(one: Counter[str], other: Counter[str]) -> float:
    """Total variation distance of two distributions, given as counts with the same total."""
    return sum(abs(one[key] - other[key]) for key in one.keys() | other.keys()) / (2 * one.total())


def _sampled(records: Sequence[EvalRecord], config: EvalConfig) -> Numbers:
    """Summarise the sampled answers; empty if there are none."""
    scored = [record for record in records if record.is_scored and record.sampled]
    if not scored:
        return {}
    count = min(len(record.sampled) for record in scored)
    sizes = sorted({2**power for power in range(count.bit_length()) if 2**power <= count} | {count})
    clusters = [record.image_key for record in scored]
    summary: Numbers = {"num_samples": count, "num_scored": len(scored)}

    def add(name: str, values: Sequence[float]) -> None:
        interval = cluster_bootstrap(
            values, clusters, resamples=config.bootstrap, seed=config.seed, method=config.interval
        )
        summary[name] = {"value": interval.estimate, "low": interval.low, "high": interval.high}

    add("mean_accuracy", [mean(float(answer.is_correct) for answer in record.sampled) for record in scored])
    for k in sizes:
        right = [sum(answer.is_correct for answer in record.sampled) for record in scored]
        add(f"pass@{k}", [pass_at_k(len(record.sampled), c, k) for record, c in zip(scored, right)])
        add(f"majority@{k}", [_majority(record, k) for record in scored])
    return summary | {
        "no_answer_rate": average(float(answer.answer is None) for record in scored for answer in record.sampled),
        "mean_length": average(float(answer.num_tokens) for record in scored for answer in record.sampled),
    }


def _majority(record: EvalRecord, k: int) -> float:
    votes = Counter(answer.vote for answer in record.sampled if answer.vote is not None)
    correct = next((answer.vote for answer in record.sampled if answer.is_correct), None)
    return majority_at_k(votes, correct, len(record.sampled) - votes.total(), k)


_LOGGED = (
    *("accuracy", "accuracy_low", "accuracy_high", "token_f1", "mean_length"),
    *("format_rate", "no_answer_rate", "truncated_rate", "unscored_rate"),
)

_MEASURED = {
    "perplexity": ("perplexity", "value"),
    "similarity": ("similarity", "value"),
    "thinking_reward": ("thinking", "reward"),
    "faithfulness": ("faithfulness", "value"),
}


def flat_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return results under the names used in ``metrics.jsonl`` (``eval/accuracy``, ``eval/accuracy/choice``,
    ``eval/format_rate`` ...), without NaN."""
    metrics = {f"eval/{name}": float(results[name]) for name in _LOGGED}
    metrics |= {f"eval/{name}": float(results[section][key]) for name, (section, key) in _MEASURED.items()}
    for answer_type, summary in results["by"]["answer_type"].items():
        metrics[f"eval/accuracy/{answer_type}"] = float(summary["accuracy"])
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def paired_gain(
    before: Sequence[EvalRecord], after: Sequence[EvalRecord], config: EvalConfig
) -> dict[str, float | int]:
    """Compare two evaluations of the same questions, over those that are scored in both.

    Returns:
        ``n``, ``num_clusters``, ``accuracy_before``, ``accuracy_after``, ``gain`` = after - before with its 95 %
        paired interval ``gain_low`` to ``gain_high`` (:func:`paired_difference_interval`), ``improved`` and
        ``worsened`` (numbers of questions), ``mcnemar_p`` (exact, treats questions as independent),
        ``permutation_p`` (flips the signs of whole images) and ``detectable_gain`` (detected with 80 % power at this
        number of questions and changes; NaN without
        changes).

    Raises:
        ValueError: the evaluations have different questions, or no question is scored in both.
    """
    pairs = pair(before, after)
    then, now = [bool(one.is_correct) for one, _ in pairs], [bool(other.is_correct) for _, other in pairs]
    clusters = [one.image_key for one, _ in pairs]
    gain = paired_difference_interval(
        then, now, clusters, resamples=config.bootstrap, seed=config.seed, method=config.interval
    )
    test = exact_mcnemar(then, now)
    differences = [float(later) - float(earlier) for earlier, later in zip(then, now)]
    error = cluster_standard_error(differences, clusters)
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
        "permutation_p": cluster_permutation(then, now, clusters, seed=config.seed),
        "detectable_gain": minimum_detectable_effect(error),
    }


def _is_same_question(one: EvalRecord, other: EvalRecord) -> bool:
    """Whether two records have the same question; a prompt may hide its options."""
    if bool(one.options) != bool(other.options):
        return (one.question, one.references) == (other.question, other.references)
    return _asked(one) == _asked(other)


def _asked(record: EvalRecord) -> tuple[object, ...]:
    """A question and what answers it."""
    return record.question, record.options, record.gold, record.alternatives


def pair(before: Sequence[EvalRecord], after: Sequence[EvalRecord]) -> list[tuple[EvalRecord, EvalRecord]]:
    """Pair the questions that are scored in both evaluations, in the order of the first.

    Raises:
        ValueError: the evaluations have different questions, or no question is scored in both.
    """
    later = {record.sample_id: record for record in after}
    if len(before) != len(after) or {record.sample_id for record in before} != later.keys():
        shared = len({record.sample_id for record in before} & later.keys())
        raise ValueError(
            f"The two evaluations have different questions ({len(before)} and {len(after)}, {shared} in common): "
            "evaluate both on the same split with the same data settings."
        )
    pairs = [(record, later[record.sample_id]) for record in before]
    for one, other in pairs:
        if not _is_same_question(one, other):
            raise ValueError(
                f"The two evaluations have different questions: {shown(one.sample_id)} asks "
                f"{shown(one.question)} with the "
                f"gold answer {shown(one.reference)} in one and {shown(other.question)} with "
                f"{shown(other.reference)} in the other; "
                "evaluate both on the same version of the data."
            )
        if one.answers_as != other.answers_as:
            raise ValueError(
                f"One evaluation compares answers as {one.answers_as}, the other as {other.answers_as}: evaluate both "
                "with the same data.answers_as."
            )
    pairs = [(one, other) for one, other in pairs if one.is_scored and other.is_scored]
    if not pairs:
        raise ValueError("No question is scored in both evaluations: see unscored_reason in their samples.jsonl.")
    return pairs
