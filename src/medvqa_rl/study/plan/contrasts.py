"""Contrasts: two tests of the same questions, such as two prompts, compared within every arm; or two arms, of which
none is the baseline, compared on every test. Imports no torch.

```yaml
contrasts:
  - {title: "With minus without reasoning", of: unseen, minus: unseen_direct}
  - {title: "A judge that sees, minus one of text", of: image, minus: text}
```
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import SeededInterval, seeds_and_clusters_bootstrap
from medvqa_rl.study.plan.checks import check_name, sections

_KEYS = ("title", "of", "minus")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(frozen=True)
class Contrast:
    """Two tests or two arms to compare."""

    title: str
    of: str
    minus: str
    """Names of the tests, whose questions are the same, or of the arms."""
    of_arms: bool = False


@dataclass(frozen=True)
class ContrastRow:
    """The contrast of two tests within one arm, or of two arms on one test."""

    name: str
    """Of the arm or the test."""
    of: float
    minus: float
    """Mean accuracies over seeds."""
    difference: SeededInterval
    """Paired by seed and question."""
    differences: tuple[float, ...]
    """Of each seed."""


def read_contrasts(
    where: str, given: Any, tests: Mapping[str, Mapping[str, Any]], arms: Collection[str]
) -> tuple[Contrast, ...]:
    """Read the contrasts of a recipe.

    Args:
        where: the recipe, for messages.
        given: the value of ``contrasts``; may be None.
        tests: settings of each test.
        arms: names of the arms. A name that is also that of a test is taken for the test.

    Raises:
        ValueError: a contrast has no title, an unknown name, a test and an arm, one thing twice, or two tests with
            different data.
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
            check_name(here, "test or arm", name, [*tests, *arms])
        if (one in tests) != (other in tests):
            raise ValueError(f"{here} compares {one} with {other}, but a test and an arm cannot be compared.")
        if one not in tests:
            if one == other:
                raise ValueError(f"{here} compares the arm {one} with itself: name two arms.")
            contrasts.append(Contrast(entry["title"], one, other, of_arms=True))
            continue
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
    """Subtract accuracies under two conditions, for each row, over the questions that are scored in every cell.

    Args:
        of: name of the row -> the records of each seed under the one condition.
        minus: the same rows and seeds under the other.
        resamples: of the bootstrap.

    Raises:
        ValueError: the cells have different questions, or none is scored everywhere.
    """
    cells = {
        (side, name, index): records
        for side, rows in enumerate((of, minus))
        for name, seeds in rows.items()
        for index, records in enumerate(seeds)
    }
    if len({frozenset(record.sample_id for record in records) for records in cells.values()}) > 1:
        raise ValueError("The cells of a contrast have different questions: run them again on the same data.")
    outcomes, clusters = shared_outcomes(cells, "a contrast")
    pairs = {
        name: [(outcomes[0, name, index], outcomes[1, name, index]) for index in range(len(seeds))]
        for name, seeds in of.items()
    }
    values = {
        name: [[a - b for a, b in zip(one, other, strict=True)] for one, other in seeds]
        for name, seeds in pairs.items()
    }
    intervals = seeds_and_clusters_bootstrap(values, clusters, resamples=resamples)
    return tuple(
        ContrastRow(
            name=name,
            of=fmean(fmean(one) for one, _ in seeds),
            minus=fmean(fmean(other) for _, other in seeds),
            difference=intervals[name],
            differences=tuple(map(fmean, values[name])),
        )
        for name, seeds in pairs.items()
    )


def matched_by_seed(arms: Sequence[Mapping[int, T]], once: Sequence[bool]) -> list[tuple[int, tuple[T, ...]]]:
    """Match the cells of several arms by seed: the seed, and the cell of each arm, for every seed that all have.

    The single cell of an arm that is trained once belongs to every seed of the others; if all are, the seed is that of
    the last arm.

    Args:
        arms: seed -> cell; may be empty, and then there is no match.
        once: whether each arm is trained once.
    """
    if not all(arms):
        return []
    trained = [cells for cells, is_once in zip(arms, once) if not is_once]
    seeds = [seed for seed in trained[0] if all(seed in cells for cells in trained)] if trained else [*arms[-1]][:1]
    return [
        (seed, tuple(next(iter(cells.values())) if is_once else cells[seed] for cells, is_once in zip(arms, once)))
        for seed in seeds
    ]


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
