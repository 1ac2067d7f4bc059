"""Collapses of a training run, found step by step in its metrics. Imports no torch.

A run reports them when they happen, and the health check of a report finds them in the same way afterwards. The
thresholds are ours: exceeding one is a reason to look closer, not a verdict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

Sign = Literal["reward", "kl", "entropy", "mismatch"]
"""Metric that collapses."""

Windowed = Literal["reward", "kl", "entropy"]
"""Those that are judged over a window."""
WINDOW = 20
"""Logged steps that a collapse must last."""
REWARD_LEFT = 0.05
"""Share of the best mean reward of a window at or below which the reward has fallen to 0."""
HIGH_KL = 1.0
"""Nats per token from which the policy is far from its reference."""
ENTROPY_LEFT = 0.2
"""Share of the initial entropy below which it has collapsed."""
MISMATCH = "sampling/sampling_logp_difference/mean"
"""Nats per token by which the log-probabilities of vLLM and of training differ."""
MISMATCH_RISE = 5.0
"""Multiple of the first step's mismatch above which vLLM may no longer sample from the trained weights."""
MISMATCH_MATTERS = 0.001
"""Nats per token up to which any rise is rounding."""


@dataclass(frozen=True)
class Collapse:
    """A collapse, seen for the first time."""

    sign: Sign
    step: int
    text: str
    """What happened and what to do, in sentences."""


class CollapseWatch:
    """Reports each sign once, from the rows of metrics.jsonl in order."""

    def __init__(self) -> None:
        self._recent: dict[Windowed, deque[float]] = {
            sign: deque(maxlen=WINDOW) for sign in ("reward", "kl", "entropy")
        }
        self._best_reward: float | None = None
        """Highest mean reward of a window so far."""
        self._first_entropy: float | None = None
        """Mean entropy of the first window."""
        self._first_mismatch: float | None = None
        self._seen: set[Sign] = set()

    def see(self, step: int, row: Mapping[str, float | None]) -> list[Collapse]:
        """Take the metrics of a step; return the collapses that it completes."""
        found = []
        for sign, recent in self._recent.items():
            value = row.get(sign)
            if value is None:
                continue
            recent.append(value)
            if len(recent) < WINDOW or sign in self._seen:
                continue
            text = self._judge(sign)
            if text is not None:
                self._seen.add(sign)
                found.append(Collapse(sign, step, text))
        mismatch = row.get(MISMATCH)
        if mismatch is not None and "mismatch" not in self._seen:
            text = self._judge_mismatch(mismatch)
            if text is not None:
                self._seen.add("mismatch")
                found.append(Collapse("mismatch", step, text))
        return found

    def _judge_mismatch(self, now: float) -> str | None:
        """Judge a step."""
        if self._first_mismatch is None:
            self._first_mismatch = now
        if now <= max(MISMATCH_RISE * self._first_mismatch, MISMATCH_MATTERS):
            return None
        return (
            f"The log-probabilities of vLLM and of training differ by {now:.2g} nats per token, from "
            f"{self._first_mismatch:.2g} in the first step: vLLM may keep old weights. Stop the run and try "
            "--dry-run, which hands changed weights over and compares."
        )

    def _judge(self, sign: Windowed) -> str | None:
        """Judge a full window."""
        values = self._recent[sign]
        match sign:
            case "reward":
                return self._judge_reward(fmean(values))
            case "kl":
                return _judge_kl(median(values))
            case "entropy":
                return self._judge_entropy(fmean(values))

    def _judge_reward(self, now: float) -> str | None:
        best = self._best_reward = max(now, now if self._best_reward is None else self._best_reward)
        if best < 0 or now > REWARD_LEFT * best:
            return None
        if best == 0:
            return (
                f"No completion of {WINDOW} steps earned a reward, so there is nothing to learn from. Read the "
                "completions in samples/; start from an instruct model or run `medvqa-rl sft` first, so that right "
                "answers in the requested format are sampled sometimes."
            )
        return (
            f"The reward has fallen to {now:.3g}, from {best:.3g} at best (means of {WINDOW} steps): the policy has "
            "collapsed. Stop the run, and start again from an earlier checkpoint with a lower "
            "optimizer.learning_rate or a higher loss.beta."
        )

    def _judge_entropy(self, now: float) -> str | None:
        if self._first_entropy is None:
            self._first_entropy = now
        if now >= ENTROPY_LEFT * self._first_entropy:
            return None
        return (
            f"The entropy has fallen to {now:.3g} nats per token, from {self._first_entropy:.3g} at the start: the "
            "completions of a prompt are nearly equal, so there is little left to learn from. Lower "
            "optimizer.learning_rate, raise loss.beta, or stop and use an earlier checkpoint."
        )


def _judge_kl(now: float) -> str | None:
    if now <= HIGH_KL:
        return None
    return (
        f"The KL divergence from the reference is {now:.3g} nats per token (median of {WINDOW} steps, above "
        f"{HIGH_KL:g}): the policy is far from its start, and its text may degrade. Read the completions in samples/; "
        "lower optimizer.learning_rate or raise loss.beta."
    )


def find_collapses(rows: Iterable[Mapping[str, float]]) -> dict[Sign, Collapse]:
    """Find all collapses in the rows of a metrics.jsonl, by sign."""
    watch = CollapseWatch()
    return {found.sign: found for row in rows for found in watch.see(int(row["step"]), row)}
