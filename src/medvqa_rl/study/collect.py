"""Collect the results of a study: every arm against the baseline, over seeds, on each test. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medvqa_rl.data.stored import garbage_collection_paused
from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.results import read_results
from medvqa_rl.evaluation.statistics.intervals_and_tests import (
    McNemar,
    SeededInterval,
    exact_mcnemar,
    holm,
    minimum_detectable_effect,
    seeds_and_clusters_bootstrap,
)
from medvqa_rl.report.health import Check
from medvqa_rl.report.runs import Row, read_run
from medvqa_rl.study.findings import Budget, LabelledRecord, PartCorrelation, budget, correlations, longest_wrong
from medvqa_rl.study.plan.contrasts import Contrast, ContrastRow, contrast_rows, matched_by_seed, shared_outcomes
from medvqa_rl.study.plan.recipe import Cell, Recipe
from medvqa_rl.study.running import is_finished
from medvqa_rl.study.signs import cell_signs
from medvqa_rl.study.trends import Answered, TrendResult, trend_result

RESAMPLES = 2000


@dataclass(frozen=True)
class SeedTest:
    """An arm against the baseline with the same seed."""

    seed: int
    mcnemar: McNemar
    holm_p: float
    """McNemar's p adjusted for the number of arms compared with this seed."""


@dataclass(frozen=True)
class ArmResult:
    """An arm on one test, over its seeds."""

    name: str
    published: float | None
    """Accuracy in percent that the paper reports, if any; primary test only."""
    budget: Budget
    """Per seed."""
    num_questions: int
    num_clusters: int
    accuracy: SeededInterval
    gain: SeededInterval | None
    """Over the baseline, paired by seed and question; None for the baseline."""
    detectable: float
    """True difference detected with 80 % power; NaN if no answer differs, and for the baseline."""
    accuracies: tuple[float, ...]
    """Per seed; a single one if the arm has one cell (``Arm.once``)."""
    tests: tuple[SeedTest, ...]
    """Per seed; empty for the baseline."""
    results: tuple[Mapping[str, Any], ...]
    """The content of each seed's results.json."""


@dataclass(frozen=True)
class Collected:
    """All results of a study."""

    recipe: Recipe
    tests: Mapping[str, tuple[ArmResult, ...]]
    contrasts: Sequence[tuple[Contrast, tuple[ContrastRow, ...]]]
    trends: tuple[TrendResult, ...]
    missing: tuple[str, ...]
    """Labels of unfinished cells, which no table includes."""
    signs: Mapping[str, Mapping[int, tuple[Check, ...]]]
    """Trained arm -> seed -> every sign of failure that was checked."""
    curves: Mapping[str, tuple[Sequence[Row], ...]]
    """Trained arm -> metrics.jsonl of each seed."""
    correlations: Mapping[str, tuple[PartCorrelation, ...]]
    """Trained arm -> correlations of its reward parts with correctness; empty for supervised arms."""
    longest_wrong: Mapping[str, tuple[LabelledRecord, ...]]
    """Arm -> its longest wrong answers on the primary test."""


def collect(recipe: Recipe) -> Collected:
    """Read all finished cells.

    Raises:
        ValueError: the baseline has no finished cell, or two cells evaluated different questions.
    """
    finished = [cell for cell in recipe.cells if is_finished(cell)]
    if not any(cell.arm.name == recipe.baseline for cell in finished):
        raise ValueError(
            f"No cell of the baseline {recipe.baseline} is finished, so there is nothing to compare with: run the "
            "study first (medvqa-rl study run)."
        )
    with garbage_collection_paused():
        answers = {
            name: {cell: read_records(cell.tests[index].folder / "samples.jsonl") for cell in finished}
            for index, name in enumerate(recipe.tests)
        }
    primary, primary_answers = recipe.tests.index(recipe.primary), answers[recipe.primary]
    by_arm = _by_arm(finished)
    trained = {name: cells for name, cells in by_arm.items() if cells[0].arm.is_run}
    curves = {name: tuple(read_run(cell.folder).metrics for cell in cells) for name, cells in trained.items()}
    untrained = next((cells[0] for cells in by_arm.values() if cells[0].arm.verb == "none"), None)

    def before(cell: Cell) -> Mapping[str, Any] | None:
        """Results of the model that a cell's training started from."""
        found = cell.start if cell.start in finished else untrained
        return None if found is None else _results(found, primary)

    signs = {
        name: {
            cell.seed: cell_signs(
                rows,
                _results(cell, primary),
                primary_answers[cell],
                before(cell),
            )
            for cell, rows in zip(cells, curves[name])
        }
        for name, cells in trained.items()
    }
    return Collected(
        recipe=recipe,
        tests={name: _test(recipe, answers[name], index) for index, name in enumerate(recipe.tests)},
        contrasts=[(one, found) for one in recipe.contrasts if (found := _contrast(one, answers, by_arm))],
        trends=tuple(
            trend_result(
                trend,
                {
                    name: [
                        Answered(cell.seed, cell.arm.once, answers[trend.test][cell], rows)
                        for cell, rows in zip(cells, curves.get(name, ((),) * len(cells)))
                    ]
                    for name, cells in by_arm.items()
                },
                resamples=RESAMPLES,
            )
            for trend in recipe.trends
            if trend.test in answers
        ),
        missing=tuple(cell.label for cell in recipe.cells if cell not in finished),
        signs=signs,
        curves=curves,
        correlations={name: correlations(runs) for name, runs in curves.items()},
        longest_wrong={
            name: longest_wrong({cell.label: primary_answers[cell] for cell in cells})
            for name, cells in by_arm.items()
        },
    )


def _results(cell: Cell, test: int) -> dict[str, Any]:
    """The results of a cell's test."""
    return read_results(cell.tests[test].folder / "results.json")


def _contrast(
    contrast: Contrast,
    answers: Mapping[str, Mapping[Cell, Sequence[EvalRecord]]],
    by_arm: Mapping[str, Sequence[Cell]],
) -> tuple[ContrastRow, ...]:
    if contrast.of_arms:
        pairs = _pairs(by_arm.get(contrast.minus, ()), by_arm.get(contrast.of, ()))
        rows: list[ContrastRow] = []
        for test, found in answers.items() if pairs else ():  # tests have different questions
            unscored = {record.sample_id for every in found.values() for record in every if record.is_correct is None}
            scored = {
                cell: [record for record in found[cell] if record.sample_id not in unscored]
                for _, *both in pairs
                for cell in both
            }
            of, minus = [scored[cell] for _, _, cell in pairs], [scored[cell] for _, cell, _ in pairs]
            rows += contrast_rows({test: of}, {test: minus}, resamples=RESAMPLES)
        return tuple(rows)
    one, other = (
        {name: [answers[test][cell] for cell in cells] for name, cells in by_arm.items()}
        for test in (contrast.of, contrast.minus)
    )
    return contrast_rows(one, other, resamples=RESAMPLES)


def _test(recipe: Recipe, answers: Mapping[Cell, Sequence[EvalRecord]], index: int) -> tuple[ArmResult, ...]:
    """The results of all arms on one test, over the questions that are scored in every finished cell."""
    name = recipe.tests[index]
    questions = {
        cell: {(r.sample_id, r.question, r.gold, r.alternatives, r.answers_as) for r in records}
        for cell, records in answers.items()
    }
    first = next(iter(answers))
    for cell, asked in questions.items():
        if asked != questions[first]:
            raise ValueError(
                f"The cells {first.label} and {cell.label} were tested on different questions ({name}): run both "
                "again on the same version of the data."
            )
    right, clusters = shared_outcomes(answers, name)
    arms = _by_arm(answers)
    pairs = {arm: _pairs(arms[recipe.baseline], cells) for arm, cells in arms.items() if arm != recipe.baseline}
    tests = {
        arm: {seed: exact_mcnemar(right[one], right[other]) for seed, one, other in found}
        for arm, found in pairs.items()
    }
    adjusted = {
        seed: holm({arm: found[seed].p_value for arm, found in tests.items() if seed in found})
        for seed in {seed for found in tests.values() for seed in found}
    }
    differences = {
        arm: [[after - before for before, after in zip(right[one], right[other])] for _, one, other in found]
        for arm, found in pairs.items()
    }
    values: dict[tuple[str, str], Sequence[Sequence[int]]] = {
        ("accuracy", arm): [right[cell] for cell in cells] for arm, cells in arms.items()
    }
    values |= {("gain", arm): found for arm, found in differences.items() if found}
    intervals = seeds_and_clusters_bootstrap(values, clusters, resamples=RESAMPLES)
    results = []
    for arm, cells in arms.items():
        gain = intervals.get(("gain", arm))
        results.append(
            ArmResult(
                name=arm,
                published=cells[0].arm.published if name == recipe.primary else None,
                budget=budget(cells[0]),
                num_questions=len(clusters),
                num_clusters=len(set(clusters)),
                accuracy=intervals["accuracy", arm],
                gain=gain,
                detectable=minimum_detectable_effect(gain.standard_error) if gain else math.nan,
                accuracies=tuple(sum(right[cell]) / len(clusters) for cell in cells),
                tests=tuple(SeedTest(seed, found, adjusted[seed][arm]) for seed, found in tests.get(arm, {}).items()),
                results=tuple(_results(cell, index) for cell in cells),
            )
        )
    return tuple(results)


def _by_arm(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Group cells by the name of their arm, in order."""
    arms: dict[str, list[Cell]] = {}
    for cell in cells:
        arms.setdefault(cell.arm.name, []).append(cell)
    return arms


def _pairs(baseline: Sequence[Cell], arm: Sequence[Cell]) -> list[tuple[int, Cell, Cell]]:
    """Pair cells by seed: (seed, cell of the baseline, cell of the arm)."""
    sides = [{cell.seed: cell for cell in side} for side in (baseline, arm)]
    once = [any(cell.arm.once for cell in side) for side in (baseline, arm)]
    return [(seed, one, other) for seed, (one, other) in matched_by_seed(sides, once)]
