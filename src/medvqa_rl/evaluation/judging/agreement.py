"""How well a judge agrees with labels: accuracy, Cohen's kappa, false-yes rate, and whether its margins mean anything.

Intervals resample clusters (all texts about one question), as those of accuracies do. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import beta

from medvqa_rl.evaluation.statistics.raters import kappa_interval
from medvqa_rl.evaluation.statistics.stats import proportion_interval
from medvqa_rl.rewards.judges import JudgeRequest, Verdict

_LABELS = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True)
class LabelledPair:
    """A request with what the verdict should be."""

    request: JudgeRequest
    is_coherent: bool
    cluster: str
    """Texts about the same question share it."""
    group: str = "all"
    """What results are broken down by."""


def read_pairs(path: Path) -> list[LabelledPair]:
    """Read labelled reasoning from JSON Lines: ``reasoning`` and ``label`` (yes or no, true or false, 1 or 0), and
    where known ``question``, ``options``, ``group`` and ``id`` (lines of equal ids are not independent).

    Raises:
        ValueError: a line is not of this form, or there is none; the message names its number.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object with reasoning and label.") from error
    if not isinstance(row, dict) or not isinstance(row.get("reasoning"), str):
        raise ValueError(f"{where} has no text named reasoning: write an object with reasoning and label.")
    label = _LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise ValueError(f"{where} has the label {row.get('label')!r}: write yes or no, true or false, or 1 or 0.")
    options = row.get("options", [])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where} has options that are no list of texts: write a list, or leave them out.")
    question = row.get("question", "")
    if not isinstance(question, str):
        raise ValueError(f"{where} has a question that is no text: write a text, or leave it out.")
    request = JudgeRequest(question, tuple(options), row["reasoning"])
    return LabelledPair(request, label, str(row.get("id", number)), str(row.get("group", "all")))


@dataclass(frozen=True)
class MarginBin:
    """Texts of similar margin."""

    margin: float
    """Mean of log P("Yes") - log P("No")."""
    count: int
    observed: float
    """Share labelled coherent."""
    low: float
    """95 % interval of Clopper and Pearson, texts taken as independent."""
    high: float


def margin_bins(margins: Sequence[float], labels: Sequence[bool], bins: int = 10) -> list[MarginBin]:
    """Texts in bins of equal numbers by margin: does a larger margin mean coherent more often?"""
    order = np.argsort(margins, kind="stable")
    found = []
    for part in np.array_split(order, min(bins, len(order))):
        count, hits = len(part), int(np.asarray(labels)[part].sum())
        low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
        high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
        found.append(MarginBin(float(np.asarray(margins)[part].mean()), count, hits / count, low, high))
    return found


def agreement(pairs: Sequence[LabelledPair], verdicts: Sequence[Verdict], *, seed: int = 0) -> dict[str, Any]:
    """:func:`agreement_with` of the pairs' labels."""
    return agreement_with(
        [pair.is_coherent for pair in pairs],
        [verdict.value for verdict in verdicts],
        [pair.cluster for pair in pairs],
        seed=seed,
    )


def agreement_with(
    truths: Sequence[bool], values: Sequence[float], groups: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """All measures of some verdicts; unscored ones are counted and left out of the rest.

    Args:
        truths: (N,) labels, at least one.
        values: (N,) verdicts: 1 for Yes, 0 for No, NaN for unscored.
        groups: (N,) clusters.

    Returns:
        ``n``, ``unscored_rate``, ``label_yes_rate``, ``verdict_yes_rate``, and with intervals (estimate, low, high)
        ``accuracy``, ``kappa``, ``false_yes_rate`` (Yes to what is labelled No) and ``false_no_rate``.
        A rate of nothing is None.
    """
    scored = [row for row in zip(truths, values, groups, strict=True) if not math.isnan(row[1])]
    labels = [label for label, _, _ in scored]
    said = [value == 1.0 for _, value, _ in scored]
    clusters = [cluster for _, _, cluster in scored]

    def share(flags: Sequence[bool], chosen: Iterator[bool]) -> dict[str, float] | None:
        some = [(flag, cluster) for flag, cluster, is_in in zip(flags, clusters, chosen) if is_in]
        if not some:
            return None
        return proportion_interval([flag for flag, _ in some], [cluster for _, cluster in some], seed=seed).to_json()

    rate = float(np.mean(labels)) if labels else math.nan
    return {
        "n": len(truths),
        "unscored_rate": 1 - len(scored) / len(truths),
        "label_yes_rate": rate,
        "verdict_yes_rate": float(np.mean(said)) if said else math.nan,
        "accuracy": share([a == b for a, b in zip(labels, said)], iter([True] * len(labels))),
        "kappa": kappa_interval(labels, said, clusters, seed=seed).to_json() if scored else None,
        "false_yes_rate": share(said, (not label for label in labels)),
        "false_no_rate": share([not yes for yes in said], iter(labels)),
    }


def by_group(pairs: Sequence[LabelledPair], verdicts: Sequence[Verdict], *, seed: int = 0) -> Mapping[str, Any]:
    """:func:`agreement` of all pairs under ``all``, and of every group under its name."""
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(index)
    results = {"all": agreement(pairs, verdicts, seed=seed)}
    for name, chosen in groups.items():
        if name != "all":
            results[name] = agreement([pairs[i] for i in chosen], [verdicts[i] for i in chosen], seed=seed)
    return results
