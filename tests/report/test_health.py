"""Each sign of failure is seen where it is and not where it is not.

Run: pytest tests/report/test_health.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from synthetic import step_row

from medvqa_rl.report.health import Check, broken_curve, check_health, collapse, ends

Change = Callable[[int], dict[str, Any]]


def rows(change: Change = lambda step: {}, steps: int = 100) -> list[dict[str, Any]]:
    """Steps of a sound run, each with changes."""
    found = [step_row(step) | change(step) for step in range(1, steps + 1)]
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def verdicts(change: Change, steps: int = 100) -> dict[str, str]:
    return {check.name: check.verdict for check in check_health(rows(change, steps))}


VERBOSE, THINKING, PERPLEXITY = "Verbose and wrong", "Low thinking reward with high accuracy", "High perplexity"
RISE = "No rise of the curve"
BREAK, LENGTH = "Abrupt change of the curve", "Length collapses"

CASES: list[tuple[str, str, str, Change]] = [
    ("wrong twice as long", VERBOSE, "look", lambda step: {"completions/mean_length_wrong": 58.0}),
    ("wrong 1.5 times as long", VERBOSE, "look", lambda step: {"completions/mean_length_wrong": 43.5}),
    ("wrong 1.4 times as long", VERBOSE, "fine", lambda step: {"completions/mean_length_wrong": 40.6}),
    (
        "long only at first",
        VERBOSE,
        "fine",
        lambda step: {"completions/mean_length_wrong": 90.0 if step < 50 else 30.0},
    ),
    ("longer, no gain", VERBOSE, "look", lambda step: {"completions/mean_length": 30.0 + step}),
    (
        "longer with gain",
        VERBOSE,
        "fine",
        lambda step: {"completions/mean_length": 30.0 + step, "rewards/correctness/mean": 0.3 + step / 300},
    ),
    ("nothing right", VERBOSE, "fine", lambda step: {"completions/mean_length_correct": None}),
    (
        "right without form",
        THINKING,
        "look",
        lambda step: {"rewards/format/mean": 0.4, "rewards/correctness/mean": 0.8},
    ),
    ("wrong without form", THINKING, "fine", lambda step: {"rewards/format/mean": 0.4}),
    (
        "right, judged badly",
        THINKING,
        "look",
        lambda step: {"rewards/semantic/mean": 0.05, "rewards/correctness/mean": 0.8},
    ),
    (
        "right, judged well",
        THINKING,
        "fine",
        lambda step: {"rewards/semantic/mean": 0.2, "rewards/correctness/mean": 0.8},
    ),
    ("no thinking reward", THINKING, "not measured", lambda step: {"rewards/format/mean": None}),
    ("no perplexity", PERPLEXITY, "not measured", lambda step: {}),
    ("perplexity of the study", PERPLEXITY, "fine", lambda step: {"eval/perplexity": 14.2}),
    ("perplexity grows", PERPLEXITY, "look", lambda step: {"eval/perplexity": 0.5 * step}),
    ("reward rises", RISE, "fine", lambda step: {"reward": 1.0 + 0.01 * step + 0.1 * (step % 5)}),
    ("reward rises within its noise", RISE, "look", lambda step: {"reward": 1.0 + 0.0005 * step + 0.1 * (step % 5)}),
    ("reward falls", RISE, "look", lambda step: {"reward": 2.0 - 0.01 * step}),
    ("supervised, no reward", RISE, "not measured", lambda step: {"reward": None, "loss": 1.0}),
    ("reward falls off", BREAK, "look", lambda step: {"reward": 1.5 + 0.05 * (step % 5) - (step > 60)}),
    ("reward rises slowly", BREAK, "fine", lambda step: {"reward": 0.01 * step + 0.1 * (step % 5)}),
    ("reward is constant", BREAK, "fine", lambda step: {"reward": 1.7}),
    ("constant, then another", BREAK, "look", lambda step: {"reward": 1.7 if step < 50 else 1.6}),
    (
        "supervised loss breaks",
        BREAK,
        "look",
        lambda step: {"reward": None, "loss": 1.0 + 0.01 * (step % 2) + (step > 50)},
    ),
    ("neither reward nor loss", BREAK, "not measured", lambda step: {"reward": None}),
    ("length to a third", LENGTH, "look", lambda step: {"completions/mean_length": 90.0 - 0.6 * step}),
    ("length to two thirds", LENGTH, "fine", lambda step: {"completions/mean_length": 90.0 - 0.3 * step}),
]


@pytest.mark.parametrize(("sign", "expected", "change"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_signs(sign: str, expected: str, change: Change) -> None:
    assert verdicts(change)[sign] == expected


def test_a_sound_run_shows_none() -> None:
    checks = check_health(rows(lambda step: {"reward": 1.0 + 0.01 * (step % 3) + 0.001 * step}))
    assert [check.verdict for check in checks] == ["fine", "fine", "not measured", *["fine"] * 6]
    assert all(check.rule.endswith(".") and check.figure.endswith(".") for check in checks)


@pytest.mark.parametrize("steps", [0, 1, 19])
def test_short_runs_are_not_judged(steps: int) -> None:
    checks = check_health(rows(steps=steps))
    assert {check.verdict for check in checks} == {"not measured"}
    assert not steps or f"was logged in {steps} step{'s' if steps > 1 else ''}; 20 are needed" in checks[0].figure


def test_figures_are_those_of_the_curve() -> None:
    values = [step_row(step, **{"completions/mean_length": float(step)}) for step in range(1, 41)]
    start, end = statistics.mean([1, 2, 3, 4]), statistics.mean([37, 38, 39, 40])
    assert ends([row["completions/mean_length"] for row in values]) == (start, end)
    found = collapse(values, "completions/mean_length", "x", "tokens", 0.5)
    assert found.figure == f"{start:.3g} tokens at the start, {end:.3g} at the end ({100 * end / start:.0f}\u00a0%)."


def test_the_break_is_the_largest_standardised_difference() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=60) + 6 * (np.arange(60) >= 33)
    sizes = {}
    for middle in range(10, 51):
        before, after = values[middle - 10 : middle], values[middle : middle + 10]
        spread = math.sqrt((statistics.variance(before) + statistics.variance(after)) / 2)
        sizes[middle] = abs(statistics.mean(after) - statistics.mean(before)) / spread
    place = max(sizes, key=lambda middle: sizes[middle])
    found: Check = broken_curve([{"step": float(100 + place), "reward": value} for place, value in enumerate(values)])
    assert f"at step {100 + place} ({sizes[place]:.1f} standard deviations)" in found.figure and place == 33


def test_noise_alone_is_no_break() -> None:
    generator = np.random.default_rng(1)
    alarms = sum(
        broken_curve([{"step": float(i), "reward": v} for i, v in enumerate(generator.normal(size=300))]).verdict
        == "look"
        for _ in range(100)
    )
    assert alarms <= 2
