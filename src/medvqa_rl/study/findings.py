"""What is read out of a study's cells besides accuracies: the wordiest wrong answers, how reward parts go with right
answers, and what an arm cost. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from medvqa_rl.evaluation.measures.similarity import reference_text
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.report.runs import Row
from medvqa_rl.study.plan.recipe import Cell

WORDIEST = 3
"""Wrong answers that are shown of each arm."""


@dataclass(frozen=True)
class Budget:
    """What one cell of an arm was given; zeros where nothing was trained."""

    completions: int
    """Sampled and trained on, without those that resampling threw away; of supervised arms references."""
    steps: int
    """Of the optimizer."""


def budget(cell: Cell) -> Budget:
    """The budget of a cell that has run all its steps."""
    train, rollout = cell.config.train, cell.config.rollout
    match cell.arm.verb:
        case "none":
            return Budget(0, 0)
        case "sft":
            return Budget(train.steps * cell.config.sft.batch_size, train.steps)
        case "train":
            completions = train.steps * train.prompts_per_step * rollout.num_generations
            return Budget(completions, train.steps * cell.config.loss.num_iterations)


@dataclass(frozen=True)
class WrongAnswer:
    """A wrong answer of an arm."""

    label: str
    """The cell that gave it."""
    question: str
    gold: str
    output: str
    num_tokens: int
    is_truncated: bool


def wordiest_wrong(answers: Mapping[str, Sequence[EvalRecord]], count: int = WORDIEST) -> tuple[WrongAnswer, ...]:
    """The longest wrong answers of an arm, longest first, of any question only the longest.

    Args:
        answers: label of each of the arm's cells -> its answers.
        count: how many.
    """
    wrong = [(record, label) for label, records in answers.items() for record in records if record.is_correct is False]
    longest: dict[str, tuple[EvalRecord, str]] = {}
    for record, label in sorted(wrong, key=lambda pair: (-pair[0].num_tokens, pair[0].sample_id, pair[1])):
        longest.setdefault(record.sample_id, (record, label))
    return tuple(
        WrongAnswer(label, record.question, _gold(record), record.output, record.num_tokens, record.is_truncated)
        for record, label in list(longest.values())[:count]
    )


def _gold(record: EvalRecord) -> str:
    text = reference_text(record)
    return f"{record.gold}: {text}" if text != record.gold else text


@dataclass(frozen=True)
class PartCorrelation:
    """How a reward part goes with right answers in an arm: Pearson's r within a step, averaged over steps."""

    part: str
    first: tuple[float, ...]
    """Of each seed, over the first half of the steps; NaN where it is constant in all of them."""
    last: tuple[float, ...]
    """The same of the second half."""


_CORRELATION = "/corr_correctness"


def correlations(runs: Sequence[Sequence[Row]]) -> tuple[PartCorrelation, ...]:
    """Of every reward part but correctness itself, from the logged steps of each seed of an arm."""
    logged = dict.fromkeys(key for rows in runs for row in rows for key in row)
    names = [key for key in logged if key.startswith("rewards/") and key.endswith(_CORRELATION)]
    found = []
    for key in names:
        halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in runs]
        first, last = (tuple(_mean(half[side], key) for half in halves) for side in (0, 1))
        found.append(PartCorrelation(key.removeprefix("rewards/").removesuffix(_CORRELATION), first, last))
    return tuple(found)


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return fmean(values) if values else math.nan
