"""The result of an attack: what ``reward_attack.json`` holds, and how scores become it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, TypeAdapter

from medvqa_rl.rewards.attack.texts import RIGHT, WRONG

FILE = "reward_attack.json"
"""In the folder of a run."""
TOTAL = "total reward"
"""No function has this name, since it is none of Python's."""
TOLERANCE = 1e-9
"""Scores that differ by less are equal: sums are rounded."""
Number = float | None
"""None where it is not defined."""


@dataclass(frozen=True)
class Attacked:
    """The scores of one question's completions."""

    sample_id: str
    question: str
    options: tuple[str, ...]
    gold: str
    texts: Mapping[str, str]
    """By attack, the honest completions first."""
    scores: Mapping[str, Mapping[str, float]]
    """By attack: each reward before its weight, and the total. NaN where it is unscored or does not apply."""
    is_right: Mapping[str, bool]
    """By attack, by the scorer."""


class RewardRow(BaseModel):
    """A reward, or the total, over the questions."""

    name: str
    weight: Number
    right: Number
    """Mean of the honest right completions."""
    wrong: Number
    """Mean of the honest wrong ones."""
    highest: Number
    """The highest mean of a wrong completion."""
    attack: str
    """Which one has it."""
    exceeding: Number
    """Share of questions on which any wrong completion scores above the honest right one."""


class AttackRow(BaseModel):
    """The totals of one attack over the questions that it applies to."""

    name: str
    questions: int
    mean: Number
    excess: Number
    """The most by which it exceeds the honest right completion of the same question."""
    worst: str
    """The id of that question."""
    exceeding: Number
    """Share of questions on which it does."""
    taken_for_right: float
    """Share that the scorer calls right."""
    unscored: float


class Worst(BaseModel):
    """The wrong completion that exceeds the honest right one of its question by most."""

    attack: str
    sample_id: str
    question: str
    options: list[str]
    gold: str
    text: str
    scores: dict[str, Number]
    right: dict[str, Number]
    """The scores of the honest right completion."""


class AttackResult(BaseModel):
    """All of it."""

    version: Literal[1] = 1
    dataset: str
    questions: int
    skipped: int
    """Questions without a known wrong answer, or whose right one does not fit the token limit."""
    seed: int
    max_completion_length: int
    bound: float
    """The most that a wrong total may exceed that of the honest right completion."""
    excess: float
    """The most that it does."""
    left_out: list[str]
    rewards: list[RewardRow] = Field(min_length=1)
    """The total last."""
    attacks: list[AttackRow] = Field(min_length=1)
    """The highest mean first."""
    worst: Worst
    cure: Number
    """The weight of correctness from which on the bound would hold; None if there is none, or if it holds."""

    @property
    def is_exceeded(self) -> bool:
        return self.excess > self.bound + TOLERANCE


RESULT = TypeAdapter(AttackResult)


def summarise(
    found: Sequence[Attacked],
    weights: Mapping[str, float],
    *,
    dataset: str,
    skipped: int,
    seed: int,
    max_completion_length: int,
    bound: float,
    left_out: Sequence[str],
) -> AttackResult:
    """Summarise the scores of the questions' completions.

    Args:
        found: at least one question.
        weights: of the rewards.
        others: see :class:`AttackResult`.

    Raises:
        ValueError: no question has a scored right and a scored wrong completion.
    """
    names = list(dict.fromkeys(name for one in found for name in one.texts))
    wrong_names = [name for name in names if name != RIGHT]
    nothing = dict.fromkeys((*weights, TOTAL), math.nan)  # where an attack does not apply
    tables = {
        part: np.array([[one.scores.get(name, nothing)[part] for name in names] for one in found]) for part in nothing
    }  # (questions, completions)
    at = {name: place for place, name in enumerate(names)}
    wrong_places = [at[name] for name in wrong_names]
    total = tables[TOTAL]
    excess = total[:, wrong_places] - total[:, [at[RIGHT]]]
    if np.isnan(excess).all():
        raise ValueError(
            "No question has both a right and a wrong completion that could be scored: check that the judge answers, "
            "and that reward functions return finite numbers."
        )
    row, column = np.unravel_index(np.nanargmax(excess), excess.shape)
    one, name = found[int(row)], wrong_names[int(column)]
    largest = float(excess[row, column])
    return AttackResult(
        dataset=dataset,
        questions=len(found),
        skipped=skipped,
        seed=seed,
        max_completion_length=max_completion_length,
        bound=bound,
        excess=largest,
        left_out=list(left_out),
        rewards=[_reward_row(part, weights.get(part), tables[part], names) for part in tables],
        attacks=sorted(
            (_attack_row(attack, found, total[:, at[attack]], total[:, at[RIGHT]]) for attack in wrong_names),
            key=lambda item: -math.inf if item.mean is None else item.mean,
            reverse=True,
        ),
        worst=Worst(
            attack=name,
            sample_id=one.sample_id,
            question=one.question,
            options=list(one.options),
            gold=one.gold,
            text=one.texts[name],
            scores={part: _number(value) for part, value in one.scores[name].items()},
            right={part: _number(value) for part, value in one.scores[RIGHT].items()},
        ),
        cure=_cure(found, weights, bound) if largest > bound + TOLERANCE else None,
    )


def _reward_row(part: str, weight: float | None, table: NDArray[np.float64], names: Sequence[str]) -> RewardRow:
    means = {name: _mean(table[:, place]) for place, name in enumerate(names)}
    wrong = {name: mean for name, mean in means.items() if name != RIGHT and mean is not None}
    attack = max(wrong, key=lambda name: wrong[name], default="")
    right, others = table[:, [names.index(RIGHT)]], table[:, [name != RIGHT for name in names]]
    known = ~np.isnan(right[:, 0])
    above = np.any(others > right + TOLERANCE, axis=1)[known]
    return RewardRow(
        name=part,
        weight=weight,
        right=means[RIGHT],
        wrong=means[WRONG],
        highest=wrong.get(attack),
        attack=attack,
        exceeding=float(above.mean()) if above.size else None,
    )


def _attack_row(
    name: str, found: Sequence[Attacked], total: NDArray[np.float64], right: NDArray[np.float64]
) -> AttackRow:
    applies = [name in one.texts for one in found]
    excess = total - right
    known = excess[~np.isnan(excess)]
    worst = found[int(np.nanargmax(excess))].sample_id if known.size else ""
    return AttackRow(
        name=name,
        questions=sum(applies),
        mean=_mean(total),
        excess=float(known.max()) if known.size else None,
        worst=worst,
        exceeding=float((known > TOLERANCE).mean()) if known.size else None,
        taken_for_right=sum(one.is_right.get(name, False) for one in found) / sum(applies),
        unscored=float(np.isnan(total[applies]).mean()),
    )


def _cure(found: Sequence[Attacked], weights: Mapping[str, float], bound: float) -> float | None:
    """The least weight of correctness, in steps of 0.01, with which no wrong completion exceeds the bound; None if
    there is none, because one is taken for right."""
    needed = 0.0
    for one in found:
        right = one.scores[RIGHT]
        for name, scores in one.scores.items():
            excess = scores[TOTAL] - right[TOTAL] - bound
            if name == RIGHT or not excess > TOLERANCE:  # NaN too
                continue
            lead = _credit(one, RIGHT) - _credit(one, name)
            if not lead > TOLERANCE:
                return None
            needed = max(needed, excess / lead)
    return math.ceil(100 * (weights.get("correctness", 0.0) + needed) - 1e-6) / 100


def _credit(one: Attacked, name: str) -> float:
    return one.scores[name].get("correctness", float(one.is_right[name]))


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
