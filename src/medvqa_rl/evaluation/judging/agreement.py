"""Agreement of a judge with labels: accuracy, Cohen's kappa, false-yes rate, and calibration of its margins.

Intervals resample clusters (all texts about one question), as those of accuracies do. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json
from scipy.stats import beta

from medvqa_rl.core.files import json_lines
from medvqa_rl.core.text import printable, shown
from medvqa_rl.evaluation.judging.intervals import share_interval
from medvqa_rl.evaluation.statistics.raters import kappa_interval
from medvqa_rl.rewards.judges import Grade, JudgeRequest

_LABELS = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class LabelledPair:
    """A request with its correct verdict."""

    request: JudgeRequest
    is_coherent: bool
    cluster: str
    """Shared by texts about the same question."""
    group: str = "all"
    """Results are broken down by group."""


def read_pairs(path: Path) -> list[LabelledPair]:
    """Read labelled reasoning from JSON Lines: ``reasoning`` and ``label`` (yes or no, true or false, 1 or 0), and
    optionally ``question``, ``options``, ``group`` and ``id`` (lines with equal ids form a cluster).

    Raises:
        ValueError: a line has another format, which the message names by its number, or there are no lines.
    """
    try:
        lines = json_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {path} is not UTF-8 text: save it as UTF-8.") from error
    pairs = [
        _read_pair(line, f"Line {number} of {path}", str(number))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not pairs:
        raise ValueError(f"The file {path} has no lines: write one JSON object with reasoning and label on each.")
    return pairs


def _read_pair(line: str, where: str, number: str) -> LabelledPair:
    try:
        row = from_json(line.encode("utf-8", "replace"))  # refuses half a character, and deep nesting
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({printable(str(error))}): write one object with reasoning and label."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("reasoning"), str):
        raise ValueError(f"{where} has no text under reasoning: write an object with reasoning and label.")
    label = _LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise ValueError(
            f"{where} has the label {shown(row.get('label'))}: write yes or no, true or false, or 1 or 0."
        )
    options = row.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where} has options that are not a list of texts: write a list, or omit them.")
    question = row.get("question", "")
    if not isinstance(question, str):
        raise ValueError(f"{where} has a question that is not a text: write a text, or omit it.")
    request = JudgeRequest(question, tuple(options), row["reasoning"])
    return LabelledPair(request, label, str(row.get("id", number)), str(row.get("group", "all")))


@dataclass(frozen=True)
class MarginBin:
    """Texts with similar margins."""

    margin: float
    """Mean of log P("Yes") - log P("No")."""
    count: int
    observed: float
    """Share labelled coherent."""
    low: float
    """Clopper-Pearson 95 % interval; texts are treated as independent."""
    high: float


def margin_bins(margins: Sequence[float], labels: Sequence[bool], bins: int = 10) -> list[MarginBin]:
    """Bin texts by margin, with equally many in each bin, to compare margins with the observed share of coherent
    texts."""
    order = np.argsort(margins, kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(order))):
        count, hits = len(part), int(np.asarray(labels)[part].sum())
        low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
        high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
        found.append(MarginBin(float(np.asarray(margins)[part].mean()), count, hits / count, low, high))
    return found


def agreement(
    labels: Sequence[bool], scores: Sequence[float], clusters: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Compare verdicts with labels. Unscored verdicts are counted and excluded from the other measures.

    Args:
        labels: (N,) the correct verdicts, at least one.
        scores: (N,) verdicts: 1 for Yes, 0 for No, NaN for unscored.
        clusters: (N,) what the intervals resample.

    Returns:
        ``n``, ``unscored_rate``, ``label_yes_rate``, ``verdict_yes_rate``, and with intervals (estimate, low, high)
        ``accuracy``, ``kappa``, ``false_yes_rate`` (Yes where the label is No) and ``false_no_rate``. Measures without
        any case are None.
    """
    scored = [
        (label, score == 1.0, cluster)
        for label, score, cluster in zip(labels, scores, clusters, strict=True)
        if not math.isnan(score)
    ]
    truths, said, groups = (list(column) for column in zip(*scored)) if scored else ([], [], [])
    return {
        "n": len(labels),
        "unscored_rate": 1 - len(scored) / len(labels),
        "label_yes_rate": float(np.mean(truths)) if scored else math.nan,
        "verdict_yes_rate": float(np.mean(said)) if scored else math.nan,
        "accuracy": share_interval([(label == yes, cluster) for label, yes, cluster in scored], seed=seed),
        "kappa": kappa_interval(truths, said, groups, seed=seed).to_json() if scored else None,
        "false_yes_rate": share_interval([(yes, cluster) for label, yes, cluster in scored if not label], seed=seed),
        "false_no_rate": share_interval([(not yes, cluster) for label, yes, cluster in scored if label], seed=seed),
    }


def by_group(pairs: Sequence[LabelledPair], grades: Sequence[Grade], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """:func:`agreement` over all pairs under ``all``, and over each group under its name."""
    rows = [
        (pair.group, pair.is_coherent, grade.score, pair.cluster) for pair, grade in zip(pairs, grades, strict=True)
    ]
    results = {}
    for name in dict.fromkeys(["all", *(group for group, *_ in rows)]):
        labels, scores, clusters = zip(*(row for group, *row in rows if name in ("all", group)))
        results[name] = agreement(labels, scores, clusters, seed=seed)
    return results
