"""The results of a study: every arm against the baseline, over all seeds, for each test set. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.evaluation.records import EvalRecord, read_records
from medvqa_rl.evaluation.statistics.stats import (
    McNemar,
    SeededInterval,
    exact_mcnemar,
    holm,
    minimum_detectable_effect,
    seeds_and_clusters_bootstrap,
)
from medvqa_rl.report.health import Check
from medvqa_rl.report.runs import Row, read_run
from medvqa_rl.study.findings import Budget, PartCorrelation, WrongAnswer, budget, correlations, wordiest_wrong
from medvqa_rl.study.plan.contrasts import Contrast, ContrastRow, contrast_rows
from medvqa_rl.study.plan.recipe import Cell, Recipe
from medvqa_rl.study.running import is_finished
from medvqa_rl.study.signs import cell_signs

RESAMPLES = 2000


@dataclass(frozen=True)
class SeedTest:
    """An arm against the baseline, both trained with one seed."""

    seed: int
    mcnemar: McNemar
    holm_p: float
    """McNemar's p adjusted for the arms that were compared with this seed."""


@dataclass(frozen=True)
class ArmResult:
    """An arm on a test set, over its seeds."""

    name: str
    published: float | None
    """Accuracy in percent that the paper reports; None where it reports none, and on all tests but the primary one."""
    budget: Budget
    """Of each seed."""
    num_questions: int
    num_clusters: int
    accuracy: SeededInterval
    gain: SeededInterval | None
    """Over the baseline, paired by seed and question; None for the baseline itself."""
    detectable: float
    """True difference that would be found with 80 % power; NaN where no answer differs, as for the baseline."""
    accuracies: tuple[float, ...]
    """Of each seed; one where nothing was trained, or once for all."""
    tests: tuple[SeedTest, ...]
    """None for the baseline itself."""
    results: tuple[Mapping[str, Any], ...]
    """The content of each seed's results.json."""


@dataclass(frozen=True)
class Collected:
    """Everything that is known of a study."""

    recipe: Recipe
    tests: Mapping[str, tuple[ArmResult, ...]]
    contrasts: Sequence[tuple[Contrast, tuple[ContrastRow, ...]]]
    missing: tuple[str, ...]
    """Cells that are not finished and not in the tables."""
    signs: Mapping[str, Mapping[int, tuple[Check, ...]]]
    """Trained arm -> seed -> every sign of failure that was looked for, found or not."""
    curves: Mapping[str, tuple[Sequence[Row], ...]]
    """Trained arm -> metrics.jsonl of each seed."""
    correlations: Mapping[str, tuple[PartCorrelation, ...]]
    """Trained arm -> how its reward parts go with right answers; empty for supervised arms."""
    wordiest: Mapping[str, tuple[WrongAnswer, ...]]
    """Arm -> its longest wrong answers to the primary test."""


def collect(recipe: Recipe) -> Collected:
    """Read all finished cells.

    Raises:
        ValueError: the baseline has no finished cell, or evaluations are of different questions.
    """
    finished = [cell for cell in recipe.cells if is_finished(cell)]
    if not any(cell.arm.name == recipe.baseline for cell in finished):
        raise ValueError(
            f"No cell of the baseline {recipe.baseline} is finished, so there is nothing to compare with: run the "
            "study first (medvqa-rl study run)."
        )
    answers = {
        name: {cell: read_records(cell.tests[place].folder / "samples.jsonl") for cell in finished}
        for place, name in enumerate(recipe.tests)
    }
    tests = {name: _test(recipe, answers[name], place) for place, name in enumerate(recipe.tests)}
    primary = recipe.tests.index(recipe.primary)
    by_arm: dict[str, list[Cell]] = {}
    for cell in finished:
        by_arm.setdefault(cell.arm.name, []).append(cell)
    trained = {name: cells for name, cells in by_arm.items() if cells[0].arm.verb != "none"}
    curves = {name: tuple(read_run(cell.folder).metrics for cell in cells) for name, cells in trained.items()}
    untrained = next((cells[0] for cells in by_arm.values() if cells[0].arm.verb == "none"), None)

    def before(cell: Cell) -> Mapping[str, Any] | None:
        """Results of what a cell's training began with."""
        found = cell.start if cell.start in finished else untrained
        return None if found is None else _results(found.tests[primary].folder)

    signs = {
        name: {
            cell.seed: cell_signs(
                rows, _results(cell.tests[primary].folder), answers[recipe.primary][cell], before(cell)
            )
            for cell, rows in zip(cells, curves[name])
        }
        for name, cells in trained.items()
    }
    return Collected(
        recipe,
        tests,
        [(one, _contrast(one, answers, by_arm)) for one in recipe.contrasts],
        tuple(cell.label for cell in recipe.cells if cell not in finished),
        signs,
        curves,
        {name: correlations(runs) for name, runs in curves.items()},
        {
            name: wordiest_wrong({cell.label: answers[recipe.primary][cell] for cell in cells})
            for name, cells in by_arm.items()
        },
    )


def _contrast(
    contrast: Contrast,
    answers: Mapping[str, Mapping[Cell, Sequence[EvalRecord]]],
    by_arm: Mapping[str, Sequence[Cell]],
) -> tuple[ContrastRow, ...]:
    of, minus = (
        {name: [answers[test][cell] for cell in cells] for name, cells in by_arm.items()}
        for test in (contrast.of, contrast.minus)
    )
    return contrast_rows(of, minus, resamples=RESAMPLES)


def _right(records: Sequence[EvalRecord], order: Sequence[str]) -> list[bool | None]:
    """Outcomes in an order of ids; None is unscored."""
    by_id = {record.sample_id: record.is_correct for record in records}
    return [by_id[id] for id in order]


def _test(recipe: Recipe, answers: Mapping[Cell, Sequence[EvalRecord]], place: int) -> tuple[ArmResult, ...]:
    finished = list(answers)
    first = next(iter(answers.values()))
    asked = {record.sample_id: record for record in first}
    for cell, records in answers.items():
        if {(r.sample_id, r.question, r.gold) for r in records} != {(r.sample_id, r.question, r.gold) for r in first}:
            raise ValueError(
                f"The cells {finished[0].label} and {cell.label} were tested on different questions "
                f"({cell.tests[place].name}): run both again on the same version of the data."
            )
    scored = [id for id in asked if all(_right(records, [id])[0] is not None for records in answers.values())]
    if not scored:
        raise ValueError(f"No question of {recipe.tests[place]} is scored in all cells, so nothing can be compared.")
    clusters = [asked[id].image_key for id in scored]
    right = {cell: [bool(flag) for flag in _right(records, scored)] for cell, records in answers.items()}
    arms: dict[str, list[Cell]] = {}
    for cell in finished:
        arms.setdefault(cell.arm.name, []).append(cell)
    pairs = {name: _pairs(arms[recipe.baseline], arm) for name, arm in arms.items() if name != recipe.baseline}
    tests = {
        name: {seed: exact_mcnemar(right[one], right[other]) for seed, one, other in found}
        for name, found in pairs.items()
    }
    adjusted = {
        seed: holm({name: found[seed].p_value for name, found in tests.items() if seed in found})
        for seed in {seed for found in tests.values() for seed in found}
    }
    results = []
    for name, arm in arms.items():
        differences = [
            [float(after) - float(before) for before, after in zip(right[one], right[other])]
            for _, one, other in pairs.get(name, ())
        ]
        gain = seeds_and_clusters_bootstrap(differences, clusters, resamples=RESAMPLES) if differences else None
        changed = any(any(of_seed) for of_seed in differences)
        results.append(
            ArmResult(
                name=name,
                published=arm[0].arm.published if recipe.tests[place] == recipe.primary else None,
                budget=budget(arm[0]),
                num_questions=len(scored),
                num_clusters=len(set(clusters)),
                accuracy=seeds_and_clusters_bootstrap([right[cell] for cell in arm], clusters, resamples=RESAMPLES),
                gain=gain,
                detectable=minimum_detectable_effect(gain.standard_error) if gain and changed else math.nan,
                accuracies=tuple(sum(right[cell]) / len(scored) for cell in arm),
                tests=tuple(
                    SeedTest(seed, found, adjusted[seed][name]) for seed, found in tests.get(name, {}).items()
                ),
                results=tuple(_results(cell.tests[place].folder) for cell in arm),
            )
        )
    return tuple(results)


def _pairs(baseline: Sequence[Cell], arm: Sequence[Cell]) -> list[tuple[int, Cell, Cell]]:
    """Seed, the baseline's cell and the arm's cell. What has one cell only, because it was not trained or once for
    all, is compared with every seed of the other."""
    one, other = ({cell.seed: cell for cell in side} for side in (baseline, arm))
    if baseline[0].arm.once and arm[0].arm.once:
        return [(arm[0].seed, baseline[0], arm[0])]
    if baseline[0].arm.once:
        return [(seed, baseline[0], cell) for seed, cell in other.items()]
    if arm[0].arm.once:
        return [(seed, cell, arm[0]) for seed, cell in one.items()]
    return [(seed, one[seed], other[seed]) for seed in one if seed in other]


def _results(folder: Path) -> Mapping[str, Any]:
    results: Mapping[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return results
