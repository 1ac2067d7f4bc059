"""Metrics of a step, computed from its completions. Metrics that TRL has too keep TRL's names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.types import AnswerType, Group, Template
from medvqa_rl.rewards.scores import Scores


@dataclass(frozen=True)
class CompletionRecord:
    """A sampled completion as logged: one line of samples/step_*.jsonl."""

    sample_id: str
    index: int
    """Index of the completion within its group."""
    question: str
    options: tuple[str, ...]
    gold: str
    completion: str
    rewards: dict[str, float | None]
    """Unweighted reward parts; NaN is unscored, and None does not apply."""
    reward: float
    advantage: float
    length: int
    """Number of tokens, including the end-of-sequence token."""
    prompt_length: int
    is_truncated: bool
    is_correct: bool
    has_answer: bool
    answer_type: AnswerType
    groups: dict[str, str]
    """The sample's groups, such as modality and family."""
    extra: dict[str, Any]
    """Values that reward functions logged for this completion."""
    template: Template = "think_answer"
    """The template of its prompt."""
    is_well_formed: bool = False
    """Whether it follows the template's format exactly."""

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, with non-finite rewards as None, and without the parts that do not apply."""
        record = asdict(self)
        record["rewards"] = {name: _finite(value) for name, value in self.rewards.items() if value is not None}
        record["reward"] = _finite(self.reward)
        return record


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def record_completions(
    groups: Sequence[Group], scores: Scores, advantages: NDArray[np.float64]
) -> list[CompletionRecord]:
    """Build the records of P groups of G completions, group after group, from the answers that the rewards read."""
    records: list[CompletionRecord] = []
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            read = scores.reads[len(records)]
            records.append(
                CompletionRecord(
                    sample_id=group.sample.id,
                    index=g,
                    question=group.sample.question,
                    options=group.sample.options,
                    gold=group.sample.gold,
                    completion=completion.text,
                    rewards={
                        name: float(values[p, g]) if scores.applies[name][p, g] else None
                        for name, values in scores.parts.items()
                    },
                    reward=float(scores.total[p, g]),
                    advantage=float(advantages[p, g]),
                    length=len(completion.token_ids),
                    prompt_length=len(group.prompt.input_ids),
                    is_truncated=completion.is_truncated,
                    is_correct=read.is_right,
                    has_answer=read.parsed.answer is not None,
                    answer_type=group.sample.answer_type,
                    groups=dict(group.sample.groups),
                    extra={name: values[len(records)] for name, values in scores.columns.items()},
                    template=group.template,
                    is_well_formed=read.parsed.is_well_formed,
                )
            )
    return records


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    array = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    return float(array.mean()) if array.size else math.nan


def _std(values: Iterable[float]) -> float:
    """Standard deviation (n - 1) of the values that are not NaN; 0 for fewer than two."""
    array = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    return float(array.std(ddof=1)) if array.size > 1 else 0.0


def _correlation(values: Sequence[float], flags: Sequence[bool]) -> float:
    """Pearson correlation of values with flags, ignoring NaN; NaN if either is constant."""
    pairs = [(value, float(flag)) for value, flag in zip(values, flags) if not math.isnan(value)]
    if not pairs or np.ptp(np.asarray(pairs), axis=0).min() < 1e-12:
        return math.nan
    return float(np.corrcoef(np.asarray(pairs).T)[0, 1])


def template_metrics(records: Sequence[CompletionRecord]) -> dict[str, float]:
    """Metrics per template, over all ranks: ``prompts/{template}/share`` (of the completions), mean ``reward``,
    ``correct`` (share of correct answers), ``format`` (share that follow the format) and mean ``length``."""
    metrics: dict[str, float] = {}
    for template in sorted({record.template for record in records}):
        own = [record for record in records if record.template == template]
        metrics |= {
            f"prompts/{template}/share": len(own) / len(records),
            f"prompts/{template}/reward": _mean(record.reward for record in own),
            f"prompts/{template}/correct": _mean(record.is_correct for record in own),
            f"prompts/{template}/format": _mean(record.is_well_formed for record in own),
            f"prompts/{template}/length": _mean(record.length for record in own),
        }
    return metrics


def rollout_metrics(records: Sequence[CompletionRecord], num_generations: int) -> dict[str, float]:
    """Reward, length and rate metrics of a step's completions, over all ranks.

    Args:
        records: groups of ``num_generations`` records each, group after group.
    """
    rewards = np.asarray([record.reward for record in records]).reshape(-1, num_generations)
    spreads = [_std(row) for row in rewards]
    is_equal = [spread == 0 or np.nanmax(row) == np.nanmin(row) for spread, row in zip(spreads, rewards)]
    metrics = {
        "reward": _mean(rewards.ravel()),
        "reward_std": _std(rewards.ravel()),
        "frac_reward_zero_std": float(np.mean(is_equal)),
        "unscored_rate": float(np.isnan(rewards).mean()),
    }
    for name in records[0].rewards:
        values = [math.nan if value is None else value for value in (record.rewards[name] for record in records)]
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = _mean(values), _std(values)
        if name != "correctness":
            metrics[f"rewards/{name}/corr_correctness"] = _correlation(values, [r.is_correct for r in records])
    lengths = [record.length for record in records]
    metrics |= {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean(record.is_truncated for record in records),
        "completions/mean_terminated_length": _mean(r.length for r in records if not r.is_truncated),
        "completions/mean_length_correct": _mean(r.length for r in records if r.is_correct),
        "completions/mean_length_wrong": _mean(r.length for r in records if not r.is_correct),
        "no_answer_rate": _mean(not record.has_answer for record in records),
    }
    return metrics


def mean_over_ranks(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average per-rank metrics over the ranks that report them."""
    names = {name for own in metrics for name in own}
    return {name: _mean(own[name] for own in metrics if name in own) for name in sorted(names)}


def to_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics with None in place of NaN and infinity, which JSON does not support."""
    return {name: _finite(float(value)) for name, value in metrics.items()}
