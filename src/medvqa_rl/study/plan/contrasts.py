"""Two tests of the same questions against each other within every arm, such as two prompts. Imports no torch.

```yaml
contrasts:
  - {title: "Reasoning asked for, minus not", of: unseen, minus: unseen_direct}
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from medvqa_rl.config.schema import did_you_mean
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.stats import SeededInterval, seeds_and_clusters_bootstrap

_KEYS = ("title", "of", "minus")


@dataclass(frozen=True)
class Contrast:
    """What a recipe asks for."""

    title: str
    of: str
    minus: str
    """Names of two tests of the same questions."""


@dataclass(frozen=True)
class ContrastRow:
    """One arm."""

    arm: str
    of: float
    minus: float
    """Accuracies, means over seeds."""
    difference: SeededInterval
    """Paired by seed and question."""
    differences: tuple[float, ...]
    """Of each seed."""


def read_contrasts(where: str, given: Any, tests: Mapping[str, Mapping[str, Any]]) -> tuple[Contrast, ...]:
    """The contrasts of a recipe.

    Args:
        where: the recipe, for messages.
        given: what stands under ``contrasts``; None is none.
        tests: settings of each test.

    Raises:
        ValueError: one names no title, a test that there is not, or two that ask of different data.
    """
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise ValueError(f"{where} has {given!r} as contrasts, but it must be a list of sections with {_said(_KEYS)}.")
    found = []
    for number, entry in enumerate(given, start=1):
        here = f"{where}, contrast {number},"
        if entry.keys() != set(_KEYS) or not all(isinstance(value, str) and value.strip() for value in entry.values()):
            raise ValueError(f"{here} has {', '.join(entry) or 'nothing'}, but must have a text as {_said(_KEYS)}.")
        for name in (entry["of"], entry["minus"]):
            if name not in tests:
                raise ValueError(
                    f"{here} names the test {name!r}, but may name {', '.join(tests)}"
                    + (did_you_mean(name, tests) or ".")
                )
        if tests[entry["of"]].get("data") != tests[entry["minus"]].get("data") or entry["of"] == entry["minus"]:
            raise ValueError(
                f"{here} compares {entry['of']} with {entry['minus']}, but must compare two tests that ask the same "
                "questions in two ways: give both the same data section and different settings beside it."
            )
        found.append(Contrast(**entry))
    return tuple(found)


def _said(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def contrast_rows(
    of: Mapping[str, Sequence[Sequence[EvalRecord]]],
    minus: Mapping[str, Sequence[Sequence[EvalRecord]]],
    *,
    resamples: int,
) -> tuple[ContrastRow, ...]:
    """Accuracy on one test minus that on another, for each arm. Questions that any answer left unscored are left out
    for all.

    Args:
        of: arm -> the records of each of its seeds, on the one test.
        minus: the same arms and seeds on the other.

    Raises:
        ValueError: the tests asked different questions, or none is scored everywhere.
    """
    everything = [
        {record.sample_id: record for record in cell} for side in (of, minus) for arm in side.values() for cell in arm
    ]
    if any(cell.keys() != everything[0].keys() for cell in everything):
        raise ValueError("Two tests of a contrast asked different questions: run both again on the same data.")
    scored = [id for id in everything[0] if all(cell[id].is_correct is not None for cell in everything)]
    if not scored:
        raise ValueError("No question of a contrast is scored in all cells, so nothing can be compared.")
    clusters = [everything[0][id].image_key for id in scored]

    def right(cell: Sequence[EvalRecord]) -> list[float]:
        by_id = {record.sample_id: float(bool(record.is_correct)) for record in cell}
        return [by_id[id] for id in scored]

    rows = []
    for arm in of:
        pairs = [(right(one), right(other)) for one, other in zip(of[arm], minus[arm], strict=True)]
        values = [[a - b for a, b in zip(one, other)] for one, other in pairs]
        rows.append(
            ContrastRow(
                arm=arm,
                of=fmean(fmean(one) for one, _ in pairs),
                minus=fmean(fmean(other) for _, other in pairs),
                difference=seeds_and_clusters_bootstrap(values, clusters, resamples=resamples),
                differences=tuple(map(fmean, values)),
            )
        )
    return tuple(rows)
