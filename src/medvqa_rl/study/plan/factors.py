"""The tables of a paper as a recipe describes them: which arms, which metrics, and what the paper reports for its own
model and data. Imports no torch.

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

``value`` is the figure itself, ``change`` its difference from the paper's arm that is the recipe's baseline.
``certain`` names those of the two that the paper's own summary states; others report the rest, unchecked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from medvqa_rl.config.schema import did_you_mean


class Metric(NamedTuple):
    """A number of results.json that a table can show."""

    title: str
    path: tuple[str, ...]
    """Where it is in results.json."""
    scale: float = 1.0
    """Ours times this has the unit of the published figures."""
    decimals: int = 2
    instrument: str | None = None
    """Section of results.json that names what measured it; numbers of different instruments share no column."""


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
}
"""What a table can show, by the names that recipes use."""


@dataclass(frozen=True)
class Published:
    """A figure of the paper."""

    value: float | None
    change: float | None
    """From the paper's own arm that corresponds to the baseline."""
    certain: tuple[str, ...]
    """Which of ``value`` and ``change`` the paper's own summary states; the others are from secondary sources."""


@dataclass(frozen=True)
class FactorTable:
    """One table of the paper."""

    title: str
    arms: tuple[str, ...]
    metrics: tuple[str, ...]
    published: Mapping[tuple[str, str], Published]
    """By arm and metric."""
    note: str

    @property
    def slug(self) -> str:
        """The title as part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


_KEYS = ("title", "arms", "metrics", "published", "note")


def read_tables(where: str, given: Any, arms: Sequence[str]) -> tuple[FactorTable, ...]:
    """The tables of a recipe.

    Args:
        where: the recipe, for messages.
        given: what stands under ``tables``; None is none.
        arms: names of the recipe's arms.

    Raises:
        ValueError: a table lacks something, or names an arm or a metric that there is not.
    """
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise ValueError(f"{where} has {given!r} as tables, but it must be a list of sections with a title and arms.")
    tables = tuple(_table(f"{where}, table {number},", entry, arms) for number, entry in enumerate(given, start=1))
    for number, table in enumerate(tables, start=1):
        if not table.slug or table.slug in [other.slug for other in tables[: number - 1]]:
            raise ValueError(
                f"{where}, table {number}, has the title {table.title!r}, but files are named after it: give each "
                "table a title of its own with some letters or digits."
            )
    return tables


def _table(where: str, given: Mapping[str, Any], arms: Sequence[str]) -> FactorTable:
    for key in given:
        _check(where, "key", key, _KEYS)
    title = given.get("title")
    if not isinstance(title, str) or not title.strip():
        raise ValueError(f"{where} has no title: give it one, such as title: Length rewards.")
    shown = _names(where, "arms", given.get("arms"))
    metrics = _names(where, "metrics", given.get("metrics", ["accuracy"]))
    for name in shown:
        _check(where, "arm", name, arms)
    for name in metrics:
        _check(where, "metric", name, list(METRICS))
    published = given.get("published") or {}
    if not isinstance(published, dict) or not all(isinstance(figures, dict) for figures in published.values()):
        raise ValueError(f"{where} has {published!r} as published, but it must have a section of metrics per arm.")
    found = {}
    for arm, figures in published.items():
        _check(where, "arm", arm, shown)
        for metric, figure in figures.items():
            _check(where, "metric", metric, metrics)
            found[arm, metric] = _figure(f"{where} published.{arm}.{metric}", figure)
    return FactorTable(title, tuple(shown), tuple(metrics), found, str(given.get("note", "")))


def _names(where: str, what: str, given: Any) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{where} has {given!r} as {what}, but must have a list of names.")
    return given


def _check(where: str, what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(
            f"{where} has the {what} {name!r}, but may have {', '.join(known)}" + (did_you_mean(name, known) or ".")
        )


def _figure(where: str, given: Any) -> Published:
    section = given if isinstance(given, dict) else {}
    numbers = {key: section[key] for key in ("value", "change") if key in section}
    certain = section.get("certain", [])
    is_sound = numbers and all(type(number) in (int, float) for number in numbers.values())
    is_sound = is_sound and isinstance(certain, list) and all(name in numbers for name in certain)
    if not is_sound or not section.keys() <= {"value", "change", "certain"}:
        raise ValueError(
            f"{where} is {given!r}, but must have a number as value, change or both, and may name those that the "
            "paper's own summary states, such as {value: 59.86, change: 1.82, certain: [change]}."
        )
    return Published(numbers.get("value"), numbers.get("change"), tuple(certain))
