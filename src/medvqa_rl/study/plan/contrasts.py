"""Contrasts: two tests of the same questions, such as two prompts, compared within every arm. Imports no torch.

```yaml
contrasts:
  - {title: "With minus without reasoning", of: unseen, minus: unseen_direct}
```
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import SeededInterval, seeds_and_clusters_bootstrap
from medvqa_rl.study.plan.checks import check_name, sections

_KEYS = ("title", "of", "minus")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Contrast:
    """Two tests to compare."""

    title: str
    of: str
    minus: str
    """Names of the tests; their questions are the same."""


@dataclass(frozen=True)
class ContrastRow:
    """The contrast of one arm."""

    arm: str
    of: float
    minus: float
    """Mean accuracies over seeds."""
    difference: SeededInterval
    """Paired by seed and question."""
    differences: tuple[float, ...]
    """Of each seed."""


def read_contrasts(where: str, given: Any, tests: Mapping[str, Mapping[str, Any]]) -> tuple[Contrast, ...]:
    """Read the contrasts of a recipe.

    Args:
        where: the recipe, for messages.
        given: the value of ``contrasts``; may be None.
        tests: settings of each test.

    Raises:
        ValueError: a contrast has no title, an unknown test, or two tests with different data.
    """
    contrasts = []
    for number, entry in enumerate(sections(where, "contrasts", given, "title, of and minus"), start=1):
        here = f"{where}, contrast {number},"
        if entry.keys() != set(_KEYS) or not all(isinstance(value, str) and value.strip() for value in entry.values()):
            raise ValueError(
                f"{here} has {', '.join(entry) or 'nothing'}, but must have a text as title, of and minus."
            )
        one, other = entry["of"], entry["minus"]
        for name in (one, other):
            check_name(here, "test", name, tests)
        if tests[one].get("data") != tests[other].get("data") or one == other:
            raise ValueError(
                f"{here} compares {one} with {other}, but must compare two tests of the same questions: give both the "
                "same data section, and different settings beside it."
            )
        contrasts.append(Contrast(entry["title"], one, other))
    return tuple(contrasts)


def contrast_rows(
    of: Mapping[str, Sequence[Sequence[EvalRecord]]],
    minus: Mapping[str, Sequence[Sequence[EvalRecord]]],
    *,
    resamples: int,
) -> tuple[ContrastRow, ...]:
    """Subtract the accuracies on two tests, for each arm, over the questions that are scored in every cell.

    Args:
        of: arm -> the records of each of its seeds on the one test.
        minus: the same arms and seeds on the other.
        resamples: of the bootstrap.

    Raises:
        ValueError: the tests have different questions, or none is scored everywhere.
    """
    cells = {
        (side, arm, index): records
        for side, arms in enumerate((of, minus))
        for arm, seeds in arms.items()
        for index, records in enumerate(seeds)
    }
    if len({frozenset(record.sample_id for record in records) for records in cells.values()}) > 1:
        raise ValueError("Two tests of a contrast have different questions: run both again on the same data.")
    outcomes, clusters = shared_outcomes(cells, "a contrast")
    pairs = {
        arm: [(outcomes[0, arm, index], outcomes[1, arm, index]) for index in range(len(seeds))]
        for arm, seeds in of.items()
    }
    values = {
        arm: [[a - b for a, b in zip(one, other, strict=True)] for one, other in seeds] for arm, seeds in pairs.items()
    }
    intervals = seeds_and_clusters_bootstrap(values, clusters, resamples=resamples)
    rows = [
        ContrastRow(
            arm=arm,
            of=fmean(fmean(one) for one, _ in seeds),
            minus=fmean(fmean(other) for _, other in seeds),
            difference=intervals[arm],
            differences=tuple(map(fmean, values[arm])),
        )
        for arm, seeds in pairs.items()
    ]
    return tuple(rows)


def shared_outcomes(answers: Mapping[K, Sequence[EvalRecord]], what: str) -> tuple[dict[K, list[bool]], list[str]]:
    """Restrict cells to the questions that are scored in all of them.

    Args:
        answers: records of the same questions in every cell.
        what: the test, for the message.

    Returns:
        Each cell's outcomes in the order of the first cell, and the cluster of each question.

    Raises:
        ValueError: no question is scored in every cell.
    """
    first, *_ = answers.values()
    by_id = {cell: {record.sample_id: record.is_correct for record in records} for cell, records in answers.items()}
    scored = [record for record in first if all(cell[record.sample_id] is not None for cell in by_id.values())]
    if not scored:
        raise ValueError(f"No question of {what} is scored in all cells, so nothing can be compared.")
    outcomes = {name: [bool(cell[record.sample_id]) for record in scored] for name, cell in by_id.items()}
    return outcomes, [record.image_key for record in scored]
