"""Findings besides accuracies: training budgets, the course of training, the longest wrong answers, and correlations
of reward parts with correctness. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.report.runs import Row
from medvqa_rl.report.stability import largest_drop, window_for
from medvqa_rl.study.plan.recipe import Cell

NUM_SHOWN = 3
"""Number of wrong answers to show of each arm."""


@dataclass(frozen=True)
class Budget:
    """Training budget of one cell; zeros if untrained."""

    completions: int
    """Completions trained on, without those discarded by resampling; for supervised arms, references."""
    steps: int
    """Optimizer steps."""


def budget(cell: Cell) -> Budget:
    """The budget of a cell that ran all its steps."""
    train, rollout = cell.config.train, cell.config.rollout
    match cell.arm.verb:
        case "none" | "build":
            return Budget(0, 0)
        case "sft":
            return Budget(train.steps * cell.config.sft.batch_size, train.steps)
        case "train":
            completions = train.steps * train.prompts_per_step * rollout.num_generations
            return Budget(completions, train.steps * cell.config.loss.num_iterations)


LabelledRecord = tuple[str, EvalRecord]
"""Label of a cell, and one of its records."""


def longest_wrong(answers: Mapping[str, Sequence[EvalRecord]], count: int = NUM_SHOWN) -> tuple[LabelledRecord, ...]:
    """Return the longest wrong answers of an arm, longest first, with at most one per question.

    Args:
        answers: records by cell label.
        count: of answers.
    """
    wrong = [(label, record) for label, records in answers.items() for record in records if record.is_correct is False]
    longest: dict[str, LabelledRecord] = {}
    for label, record in sorted(wrong, key=lambda pair: (-pair[1].num_tokens, pair[1].sample_id, pair[0])):
        longest.setdefault(record.sample_id, (label, record))
    return tuple(longest.values())[:count]


@dataclass(frozen=True)
class PartCorrelation:
    """Correlation of a reward part with correctness: Pearson's r within a step, averaged over steps."""

    part: str
    first: tuple[float, ...]
    """Per seed, over the first half of the steps; NaN if the part is constant in all of them."""
    last: tuple[float, ...]
    """Per seed, over the second half."""


_CORRELATION = "/corr_correctness"


def correlations(runs: Sequence[Sequence[Row]]) -> tuple[PartCorrelation, ...]:
    """Average the logged correlations of every reward part except correctness.

    Args:
        runs: metrics.jsonl of each seed of an arm.
    """
    logged = dict.fromkeys(key for rows in runs for row in rows for key in row)
    names = [key for key in logged if key.startswith("rewards/") and key.endswith(_CORRELATION)]
    found = []
    for key in names:
        halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in runs]
        first, last = (tuple(_mean(half[side], key) for half in halves) for side in (0, 1))
        found.append(PartCorrelation(key.removeprefix("rewards/").removesuffix(_CORRELATION), first, last))
    return tuple(found)


@dataclass(frozen=True)
class Course:
    """How the training of an arm went. NaN where nothing was logged."""

    entropy: tuple[float, float]
    """Mean token entropy in nats over the first and the last fifth of the steps, averaged over seeds."""
    length: tuple[float, float]
    """Mean tokens of a completion, likewise."""
    fall: float
    """Largest fall of the moving average of the reward (:func:`medvqa_rl.report.stability.largest_drop`), of the seed
    where it is largest."""
    spike: float
    """Largest gradient norm divided by the median one, of the seed where it is largest."""


def ends(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """Means of a value over the first and the last fifth of the steps that logged it; NaN if none did."""
    logged = [row[key] for row in rows if key in row]
    size = max(1, len(logged) // 5)
    return (fmean(logged[:size]), fmean(logged[-size:])) if logged else (math.nan, math.nan)


def course(runs: Sequence[Sequence[Row]]) -> Course:
    """Summarise the training of an arm.

    Args:
        runs: metrics.jsonl of each seed.
    """

    def mean_ends(key: str) -> tuple[float, float]:
        first, last = map(fmean, zip(*(ends(rows, key) for rows in runs)))
        return first, last

    falls, spikes = [], []
    for rows in runs:
        rewards = [row["reward"] for row in rows if "reward" in row]
        norms = sorted(row["grad_norm"] for row in rows if row.get("grad_norm"))
        window = window_for(len(rewards))
        if len(rewards) >= window:
            falls.append(largest_drop(range(len(rewards)), rewards, window).size)
        if norms:
            spikes.append(norms[-1] / median(norms))
    return Course(
        mean_ends("entropy"),
        mean_ends("completions/mean_length"),
        max(falls, default=math.nan),
        max(spikes, default=math.nan),
    )


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return fmean(values) if values else math.nan
