"""Tables of a study against numbers computed independently.

Run: pytest tests/study/test_collect.py
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cells import OUTCOMES, store, write
from scipy.stats import binomtest

from medvqa_rl.evaluation.statistics.intervals_and_tests import holm
from medvqa_rl.study.collect import collect
from medvqa_rl.study.output import write_study
from medvqa_rl.study.plan.recipe import read_recipe
from medvqa_rl.study.running import forecast


def test_equal_answers_have_no_detectable_difference(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    store(recipe, OUTCOMES | {("sft", seed): OUTCOMES["grpo", seed] for seed in (0, 1)})
    arms = {arm.name: arm for arm in collect(recipe).tests["home"]}
    assert arms["sft"].gain is not None and arms["sft"].gain.estimate == 0
    assert math.isnan(arms["sft"].detectable) and arms["zero_shot"].detectable > 0


def test_tables_agree_with_scipy_and_computation_by_hand(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    store(recipe, OUTCOMES, change=lambda cell, record: replace(record, distinct_truths=1 + int(record.sample_id) % 2))
    arms = {arm.name: arm for arm in collect(recipe).tests["home"]}
    assert arms["sft"].num_questions == 10 and arms["sft"].num_clusters == 5  # one is unscored somewhere
    assert arms["grpo"].accuracies == (0.9, 0.9) and arms["zero_shot"].accuracies == (0.2,)
    assert arms["grpo"].gain is None and arms["grpo"].tests == ()
    gain = arms["sft"].gain
    assert gain is not None and gain.estimate == pytest.approx((0.6 - 0.9 + 0.5 - 0.9) / 2)
    assert gain.low <= gain.estimate <= gain.high and arms["sft"].detectable == pytest.approx(
        2.8016 * gain.standard_error, rel=1e-3
    )
    raw: dict[str, dict[int, float]] = {}
    for name in ("zero_shot", "sft"):
        for seed in (0, 1):
            before, after = OUTCOMES["grpo", seed], OUTCOMES[name, 0 if name == "zero_shot" else seed]
            pairs = list(zip(before, after))[:10]
            better, worse = pairs.count(("0", "1")), pairs.count(("1", "0"))
            raw.setdefault(name, {})[seed] = binomtest(better, better + worse).pvalue
    for seed in (0, 1):
        adjusted = holm({name: found[seed] for name, found in raw.items()})
        for name in raw:
            (test,) = [test for test in arms[name].tests if test.seed == seed]
            assert test.mcnemar.p_value == pytest.approx(raw[name][seed])
            assert test.holm_p == pytest.approx(adjusted[name])
    assert raw["zero_shot"][0] < 0.05
    text = write_study(collect(recipe), tmp_path / "tables")[0].read_text()
    (head, *body) = list(csv.reader(text.splitlines()))
    columns = {row[0]: dict(zip(head, row)) for row in body}
    assert columns["grpo"]["seeds"] == "90.0, 90.0" and columns["sft"]["minus grpo"] == "-35.0"
    assert columns["sft"]["true claims per reasoning"] == "1.45"  # of questions 0 to 10
    # Similarities of two instruments never share a column.
    assert (columns["grpo"]["similarity (tfidf)"], columns["grpo"]["similarity (other)"]) == ("0.50", "")
    assert (columns["sft"]["similarity (tfidf)"], columns["sft"]["similarity (other)"]) == ("", "0.50")


def test_unfinished_cells_are_reported_and_excluded(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given), tmp_path / "study")
    with pytest.raises(ValueError, match="No cell of the baseline grpo is finished"):
        collect(recipe)
    store(recipe, {key: flags for key, flags in OUTCOMES.items() if key not in (("sft", 1), ("zero_shot", 0))})
    collected = collect(recipe)
    assert collected.missing == ("zero_shot", "sft, seed 1")
    (sft,) = [arm for arm in collected.tests["home"] if arm.name == "sft"]
    assert sft.accuracies == (6 / 11,)
    assert [test.seed for test in sft.tests] == [0]
    # A measured step takes 2 s: four steps of sft and four questions at 15 s.
    assert forecast(recipe)[recipe.cells[2]] == 4 * 2.0 + 4 * 15


def test_work_grows_with_the_number_of_questions_not_with_its_square(given: dict[str, Any], tmp_path: Path) -> None:
    """Count the calls of Python and C functions for N, 2 N and 4 N questions."""

    def calls(size: int) -> int:
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe = read_recipe(write(folder / "tiny.yaml", given), folder / "study")
        store(recipe, {key: (flags * size)[:size] for key, flags in OUTCOMES.items()})
        count = 0

        def profile(*_: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(profile)
        try:
            collect(recipe)
        finally:
            sys.setprofile(None)
        return count

    one, two, four = calls(40), calls(80), calls(160)
    assert four - two < 2.2 * (two - one)
    assert four < 4 * one
