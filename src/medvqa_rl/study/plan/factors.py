"""A paper's tables as described in a recipe: arms, metrics, and the figures that the paper reports for its own model
and data. Imports no torch.

```yaml
tables:
  - title: Medical semantic alignment
    arms: [grpo, grpo_semantic]
    metrics: [accuracy, similarity]
    published:
      grpo_semantic:
        accuracy: {value: 59.86, change: 1.82, certain: [change]}
        similarity: {value: 0.46, change: 0.25, certain: [change]}
    note: What to know about these figures.
```

``value`` is the figure itself, ``change`` its difference from the paper's baseline. ``certain`` names those of the
two that the paper's own summary states; the others come from secondary sources and are unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medvqa_rl.core.text import shown
from medvqa_rl.study.plan.checks import check_keys, check_name, sections


class Metric(NamedTuple):
    """A number in results.json that a table can show."""

    title: str
    path: tuple[str, ...]
    """Its keys in results.json."""
    scale: float = 1.0
    """Factor that converts our number to the unit of the published ones."""
    decimals: int = 2
    instrument: str | None = None
    """Section of results.json that names the instrument; numbers of different instruments share no column."""


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy, %", ("accuracy",), 100.0, 1),
    "similarity": Metric("similarity", ("similarity", "value"), instrument="similarity"),
    "perplexity": Metric("perplexity", ("perplexity", "value"), instrument="perplexity"),
    "length": Metric("length, tokens", ("lengths", "total", "all", "mean"), decimals=0),
    "length_right": Metric("length of right answers", ("lengths", "total", "right", "mean"), decimals=0),
    "length_wrong": Metric("length of wrong answers", ("lengths", "total", "wrong", "mean"), decimals=0),
    "thinking": Metric("thinking reward, of 2", ("thinking", "reward"), instrument="thinking"),
    "format": Metric("in form, %", ("format_rate",), 100.0, 1),
    "faithfulness": Metric("true claims, %", ("faithfulness", "value"), 100.0, 1),
    "distinct_truths": Metric("true claims per reasoning", ("faithfulness", "distinct_truths"), decimals=2),
}
"""The metrics by their names in recipes."""


@dataclass(frozen=True)
class Published:
    """A figure that the paper reports."""

    value: float | None
    change: float | None
    """Difference from the paper's baseline."""
    certain: tuple[str, ...]
    """Which of ``value`` and ``change`` the paper's own summary states; the others come from secondary sources."""


@dataclass(frozen=True)
class FactorTable:
    """One of the paper's tables."""

    title: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    published: Mapping[tuple[str, str], Published]
    """By (arm, metric)."""
    note: str

    @property
    def slug(self) -> str:
        """The title in the form used in file names."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


_KEYS = ("title", "arms", "metrics", "published", "note")


def read_tables(where: str, given: Any, arms: Sequence[str]) -> tuple[FactorTable, ...]:
    """Read the tables of a recipe.

    Args:
        where: the recipe, for messages.
        given: the value of ``tables``; may be None.
        arms: names of the recipe's arms.

    Raises:
        ValueError: a table is incomplete, or names an unknown arm or metric.
    """
    entries = sections(where, "tables", given, "a title and arms")
    tables = tuple(_table(f"{where}, table {number},", entry, arms) for number, entry in enumerate(entries, start=1))
    for number, table in enumerate(tables, start=1):
        if not table.slug or table.slug in [other.slug for other in tables[: number - 1]]:
            raise ValueError(
                f"{where}, table {number}, has the title {shown(table.title)}, but files are named after it: "
                "give each "
                "table a unique title with letters or digits."
            )
    return tables


def _table(where: str, given: Mapping[str, Any], arms: Sequence[str]) -> FactorTable:
    check_keys(where, given, _KEYS)
    title = given.get("title")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"{where} has no title: give it one, such as title: Length rewards.")
    chosen = _names(where, "arms", given.get("arms"))
    metrics = _names(where, "metrics", given.get("metrics", ["accuracy"]))
    for name in chosen:
        check_name(where, "arm", name, arms)
    for name in metrics:
        check_name(where, "metric", name, list(METRICS))
    published = given.get("published") or {}
    if not isinstance(published, dict) or not all(isinstance(figures, dict) for figures in published.values()):
        raise ValueError(
            f"{where} has {shown(published)} as published, but it must have a section of metrics per arm."
        )
    found = {}
    for arm, figures in published.items():
        check_name(where, "arm", arm, chosen)
        for metric, figure in figures.items():
            check_name(where, "metric", metric, metrics)
            found[arm, metric] = _figure(f"{where} published.{arm}.{metric}", figure)
    return FactorTable(title, tuple(chosen), tuple(metrics), found, str(given.get("note", "")))


def _names(where: str, what: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where} has {shown(given)} as {what}, but must have a list of names.")
    return given


def _figure(where: str, given: Any) -> Published:
    figure = given if isinstance(given, dict) else {}
    numbers = {key: figure[key] for key in ("value", "change") if key in figure}
    certain = figure.get("certain", [])
    is_valid = numbers and all(type(number) in (int, float) for number in numbers.values())
    is_valid = is_valid and isinstance(certain, list) and all(name in list(numbers) for name in certain)
    if not is_valid or not figure.keys() <= {"value", "change", "certain"}:
        raise ValueError(
            f"{where} is {shown(given)}, but must have a number as value, change or both, and may list under "
            "certain those "
            "that the paper's own summary states, such as {value: 59.86, change: 1.82, certain: [change]}."
        )
    return Published(numbers.get("value"), numbers.get("change"), tuple(certain))
