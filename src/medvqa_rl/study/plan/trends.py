"""Trends as described in a recipe: measures against a number in which arms differ, such as traces or weights.

```yaml
trends:
  - title: Cold start
    x: reasonings                          # what the numbers count
    test: unseen                           # defaults to the primary one
    metrics: [accuracy, faithfulness]
    series:                                # name -> number -> arm
      warm-up: {0: zero_shot, 50: sft_50}
      GRPO: {0: grpo, 50: grpo_50}
    differences:                           # two series, subtracted at every number that both have
      - [GRPO, warm-up]
    steps_worth: {series: GRPO, reference: grpo_long}   # see steps_worth.py
```

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.core.text import shown
from medvqa_rl.study.plan.checks import check_keys, check_name, section, sections

METRICS = ("accuracy", "faithfulness", "distinct_truths", "thinking", "length", "length_bias", "format", "entropy")
"""What a trend can show; :mod:`medvqa_rl.study.trends` defines them."""
_KEYS = ("title", "x", "test", "metrics", "series", "differences", "steps_worth")

Series = Mapping[float, str]
"""Number -> arm, by rising numbers."""


@dataclass(frozen=True)
class StepsWorth:
    """Series whose first points are compared with the training curve of an arm."""

    series: str
    reference: str


@dataclass(frozen=True)
class Trend:
    """Measures of several series of arms."""

    title: str
    x: str
    test: str
    metrics: tuple[str, ...]
    series: Mapping[str, Series]
    differences: tuple[tuple[str, str], ...]
    """Pairs of series: the first minus the second."""
    steps_worth: StepsWorth | None


def read_trends(where: str, given: Any, arms: Sequence[str], tests: Sequence[str], primary: str) -> tuple[Trend, ...]:
    """Read the trends of a recipe.

    Args:
        where: the recipe, for messages.
        given: the value of ``trends``; may be None.
        arms: names of the recipe's arms.
        tests: names of its tests.
        primary: the test that a trend shows unless it names another.

    Raises:
        ValueError: a trend is incomplete, or names an unknown arm, metric, test or series.
    """
    entries = sections(where, "trends", given, "title, x, metrics and series")
    return tuple(
        _trend(f"{where}, trend {number},", entry, arms, tests, primary)
        for number, entry in enumerate(entries, start=1)
    )


def _trend(where: str, given: Mapping[str, Any], arms: Sequence[str], tests: Sequence[str], primary: str) -> Trend:
    check_keys(where, given, _KEYS)
    for key in ("title", "x"):
        if not isinstance(given.get(key), str) or not given[key].strip():
            raise ValueError(f"{where} has {shown(given.get(key))} as {key}, but must have a text.")
    test = given.get("test", primary)
    check_name(where, "test", str(test), tests)
    metrics = given.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        raise ValueError(f"{where} has {shown(metrics)} as metrics, but must have a list of {', '.join(METRICS)}.")
    for metric in metrics:
        check_name(where, "metric", str(metric), METRICS)
    series = {
        name: _series(f"{where} series {name},", section(where, f"series.{name}", points), arms)
        for name, points in section(where, "series", given.get("series")).items()
    }
    if not series:
        raise ValueError(f"{where} has no series: name at least one, such as series: {{GRPO: {{0: grpo}}}}.")
    differences = given.get("differences") or []
    if not isinstance(differences, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in differences):
        raise ValueError(f"{where} has {shown(differences)} as differences, but must have a list of pairs of series.")
    for pair in differences:
        for name in pair:
            check_name(f"{where} under differences,", "series", str(name), series)
    return Trend(
        title=given["title"],
        x=given["x"],
        test=str(test),
        metrics=tuple(metrics),
        series=series,
        differences=tuple((one, other) for one, other in differences),
        steps_worth=_steps_worth(f"{where} under steps_worth,", given.get("steps_worth"), series, arms),
    )


def _series(where: str, given: Mapping[Any, Any], arms: Sequence[str]) -> Series:
    series = {}
    for key, arm in given.items():
        if not re.fullmatch(r"\d+(\.\d+)?", str(key)):
            raise ValueError(f"{where} has the key {shown(key)}, but its keys must be numbers of at least 0.")
        check_name(where, "arm", str(arm), arms)
        series[float(key)] = str(arm)
    if not series:
        raise ValueError(f"{where} has no arms: give at least one, such as {{0: grpo}}.")
    return dict(sorted(series.items()))


def _steps_worth(where: str, given: Any, series: Mapping[str, Series], arms: Sequence[str]) -> StepsWorth | None:
    if given is None:
        return None
    entry = section(where, "steps_worth", given)
    if entry.keys() != {"series", "reference"}:
        raise ValueError(f"{where} has {', '.join(entry) or 'nothing'}, but must have series and reference.")
    check_name(where, "series", str(entry["series"]), series)
    check_name(where, "arm", str(entry["reference"]), arms)
    return StepsWorth(entry["series"], entry["reference"])
