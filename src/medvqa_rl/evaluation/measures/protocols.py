"""The same answers by the scoring rules of other harnesses, and the questions that differ. Imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from medvqa_rl.config import EvalConfig
from medvqa_rl.core.text import shown
from medvqa_rl.evaluation.measures import lmms_eval, medevalkit
from medvqa_rl.evaluation.measures.harness_texts import Verdict
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import Interval, cluster_bootstrap, proportion_interval

Protocol = Literal["medevalkit", "lmms_eval"]
TITLES: Mapping[Protocol, str] = {"medevalkit": "MedEvalKit", "lmms_eval": "lmms-eval"}
DIFFERENCES = "protocol-{}.jsonl"
"""The file of an evaluation with the questions on which a protocol and our rule differ."""
_SCORES: Mapping[Protocol, Callable[[EvalRecord, str], Verdict]] = {
    "medevalkit": medevalkit.score,
    "lmms_eval": lmms_eval.score,
}
_SOURCES: Mapping[Protocol, Sequence[str]] = {"medevalkit": medevalkit.SOURCES, "lmms_eval": lmms_eval.SOURCES}


def read_protocols(text: str) -> tuple[Protocol, ...]:
    """Read a list such as ``medevalkit,lmms_eval``.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in TITLES]:
        raise ValueError(
            f"--protocol has {shown(unknown[0])}, but must be {' or '.join(TITLES)}, or both with a comma."
        )
    return tuple(name for name in TITLES if name in names)


def score_by(protocol: Protocol, record: EvalRecord) -> Verdict:
    """Score one answer. The data set is the first part of its name in the record."""
    return _SCORES[protocol](record, record.dataset.partition("/")[0])


def summarise_protocol(
    protocol: Protocol, records: Sequence[EvalRecord], config: EvalConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the answers of an evaluation by another harness's rules.

    Unscored questions are left out, and those for which the harness has no rule are counted.

    Returns:
        ``accuracy`` with its 95 % interval over images, ``ours`` (accuracy of our rule on the same ``num_scored``
        questions), ``num_different``, ``no_rule`` (sentence -> questions) and ``sources``; and a dict for each
        question on which the rules differ: ``sample_id``, ``question``, ``gold``, ``output``, ``answer`` (as we parse
        it), ``ours``, ``theirs``, ``why`` (their rule) and ``our_why``.
    """
    scored = [(record, score_by(protocol, record)) for record in records if record.is_scored]
    with_rule = [(record, verdict.credit) for record, verdict in scored if verdict.credit is not None]
    credits = [credit for _, credit in with_rule]
    clusters = [record.image_key for record, _ in with_rule]
    interval = Interval(math.nan, math.nan, math.nan)
    if with_rule:
        options: Any = {"resamples": config.bootstrap, "seed": config.seed, "method": config.interval}
        if set(credits) <= {0.0, 1.0}:
            interval = proportion_interval([credit == 1.0 for credit in credits], clusters, **options)
        else:
            interval = cluster_bootstrap(credits, clusters, **options)
    different = [
        {
            "sample_id": record.sample_id,
            "question": record.question,
            "gold": record.reference,
            "output": record.output,
            "answer": record.answer,
            "ours": "right" if record.is_correct else "wrong",
            "theirs": verdict.word,
            "why": verdict.why,
            "our_why": record.why,
        }
        for record, verdict in scored
        if verdict.credit is not None and verdict.credit != float(bool(record.is_correct))
    ]
    summary = {
        "accuracy": interval.estimate,
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "ours": sum(bool(record.is_correct) for record, _ in with_rule) / len(with_rule) if with_rule else math.nan,
        "num_scored": len(with_rule),
        "num_clusters": len(set(clusters)),
        "num_different": len(different),
        "no_rule": dict(Counter(verdict.why for _, verdict in scored if verdict.credit is None)),
        "sources": list(_SOURCES[protocol]),
    }
    return summary, different


def difference_lines(different: Sequence[Mapping[str, Any]]) -> str:
    """The differences as JSON Lines in ASCII."""
    return "".join(json.dumps(row) + "\n" for row in different)
