"""Trends against numbers computed by hand, and their files.

Run: pytest tests/study/test_trends.py
"""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import OUTCOMES, store, write
from matplotlib.figure import Figure
from PIL import Image

from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.statistics.intervals_and_tests import seeds_and_clusters_bootstrap
from medvqa_rl.study.collect import Collected, collect
from medvqa_rl.study.output import write_study
from medvqa_rl.study.plan.recipe import Cell, read_recipe
from medvqa_rl.study.trend_figure import plot_trend
from medvqa_rl.study.trends import Answered, trend_result
from tests.records import make_record

TREND: dict[str, Any] = {
    "title": "Cold start",
    "x": "reasonings",
    "metrics": ["accuracy", "faithfulness", "distinct_truths", "thinking", "length_bias", "entropy"],
    "series": {"warm-up": {"50": "sft", "0": "zero_shot"}, "GRPO": {"50": "grpo"}},
    "differences": [["GRPO", "warm-up"]],
    "steps_worth": {"series": "GRPO", "reference": "grpo"},
}


def varied(cell: Cell, record: EvalRecord) -> EvalRecord:
    """Claims in two of three answers, verdicts, and lengths that depend on the question and the seed."""
    number = int(record.sample_id)
    share = None if number % 3 == 0 else (0.25 if cell.arm.name == "sft" else 0.5)
    verdict = float(number % 2)
    record = replace(record, faithfulness=share, distinct_truths=0 if share is None else number % 3)
    return replace(record, verdict=verdict, verdict_by="j", num_tokens=10 + number + cell.seed)


def logged(cell: Cell) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": step, "step_time": 2.0, "entropy": 0.1 * step} for step in range(1, 6)]
    return [{"step": 0, "eval/accuracy": 0.5}, *rows, {"step": 5, "eval/accuracy": 0.7 + 0.1 * cell.seed}]


@pytest.fixture
def collected(given: dict[str, Any], tmp_path: Path) -> Collected:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given | {"trends": [TREND]}), tmp_path / "study")
    store(recipe, OUTCOMES, change=varied, rows=logged)
    return collect(recipe)


def test_points_are_means_over_seeds(collected: Collected) -> None:
    (found,) = collected.trends
    points = {(point.series, point.x): point.values for point in found.points}
    assert list(points) == [("warm-up", 0), ("warm-up", 50), ("GRPO", 50)]
    sft = points["warm-up", 50]
    assert sft["accuracy"].estimate == pytest.approx((6 / 11 + 6 / 11) / 2)
    assert sft["faithfulness"].estimate == 0.25 and points["GRPO", 50]["faithfulness"].estimate == 0.5
    assert sft["distinct_truths"].estimate == pytest.approx((4 * 1 + 3 * 2) / 11)  # of questions 1, 4, 7, 10; 2, 5, 8
    assert sft["thinking"].estimate == pytest.approx(5 / 11)  # not well-formed; odd questions are coherent
    biases = []
    for seed in (0, 1):
        lengths: dict[str, list[int]] = {"0": [], "1": []}
        for number, flag in enumerate(OUTCOMES["sft", seed]):
            lengths[flag].append(10 + number + seed)
        biases.append(np.mean(lengths["0"]) - np.mean(lengths["1"]))
    assert sft["length_bias"].estimate == pytest.approx(np.mean(biases))
    assert sft["entropy"].estimate == pytest.approx(0.5) and math.isnan(points["warm-up", 0]["entropy"].estimate)
    assert points["warm-up", 0]["accuracy"].estimate == pytest.approx(0.2)  # one answer is unscored


def test_differences_are_paired_by_seed(collected: Collected) -> None:
    (found,) = collected.trends
    (point,) = found.differences
    assert (point.series, point.x) == ("GRPO minus warm-up", 50)
    expected = [(OUTCOMES["grpo", seed].count("1") - OUTCOMES["sft", seed].count("1")) / 11 for seed in (0, 1)]
    assert point.values["accuracy"].estimate == pytest.approx(np.mean(expected))
    assert point.values["faithfulness"].estimate == point.values["faithfulness"].low == 0.25  # in every resample


def test_intervals_agree_with_the_bootstrap_of_the_tables(collected: Collected) -> None:
    """The same resampling in two implementations with different draws."""
    generator = np.random.default_rng(0)
    flags = generator.random((3, 200)) < np.array([[0.5], [0.6], [0.7]])
    records = [
        [make_record(sample_id=str(i), image_key=str(i // 2), is_correct=bool(flag)) for i, flag in enumerate(row)]
        for row in flags
    ]
    cells = [Answered(seed, False, row, ()) for seed, row in enumerate(records)]
    trend = replace(collected.trends[0].trend, metrics=("accuracy",), differences=(), steps_worth=None)
    found = trend_result(trend, {"grpo": cells}, resamples=4000).points[0].values["accuracy"]
    table = seeds_and_clusters_bootstrap({"a": flags}, [str(i // 2) for i in range(200)], resamples=4000, seed=5)["a"]
    assert found.estimate == pytest.approx(table.estimate)
    assert found.standard_error == pytest.approx(table.standard_error, rel=0.06)
    assert found.low == pytest.approx(table.low, abs=0.01) and found.high == pytest.approx(table.high, abs=0.01)


def test_a_change_of_differences_is_paired_by_seed_and_image(collected: Collected) -> None:
    """Four arms of three seeds, against a bootstrap of question differences written out here."""
    generator = np.random.default_rng(1)
    flags = {name: generator.random((3, 120)) < rate for name, rate in zip("abcd", (0.4, 0.5, 0.5, 0.8))}
    arms = {
        name: [
            Answered(
                seed,
                False,
                [make_record(sample_id=str(i), image_key=str(i // 2), is_correct=bool(f)) for i, f in enumerate(row)],
                (),
            )
            for seed, row in enumerate(rows)
        ]
        for name, rows in flags.items()
    }
    trend = replace(
        collected.trends[0].trend,
        metrics=("accuracy",),
        series={"before": {0.4: "a", 6: "c", 1.5: "a"}, "after": {6: "d", 1.5: "b", 0.4: "b"}},
        differences=(("after", "before"),),
        steps_worth=None,
    )
    changes = {change.series: change for change in trend_result(trend, arms, resamples=4000).changes}
    assert list(changes) == ["before", "after", "after minus before"]
    assert {(change.first, change.last) for change in changes.values()} == {(0.4, 6)}
    found = changes["after minus before"].values["accuracy"]
    of_question = (flags["d"].astype(float) - flags["c"]) - (flags["b"].astype(float) - flags["a"])
    assert found.estimate == pytest.approx(of_question.mean())
    of_image = of_question.reshape(3, 60, 2).mean(axis=2)
    means = [of_image[np.ix_(*(generator.integers(n, size=n) for n in (3, 60)))].mean() for _ in range(4000)]
    assert found.standard_error == pytest.approx(np.std(means), rel=0.06)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.015)
    before = changes["before"].values["accuracy"].estimate
    assert before == pytest.approx(flags["c"].mean() - flags["a"].mean())


def test_changes_of_arms_that_are_trained_once(collected: Collected) -> None:
    (change,) = collected.trends[0].changes  # GRPO and the difference have one number
    assert (change.series, change.first, change.last) == ("warm-up", 0, 50)
    assert change.values["accuracy"].estimate == pytest.approx(6 / 11 - 0.2)
    assert math.isnan(change.values["entropy"].estimate)


def test_trends_are_tables_and_figures(collected: Collected, tmp_path: Path) -> None:
    written = {path.name: path for path in write_study(collected, tmp_path / "tables")}
    lines = list(csv.DictReader(written["trend-1.csv"].open(encoding="utf-8")))
    assert len(lines) == 6 * 4
    (line,) = [one for one in lines if (one["series"], one["metric"]) == ("GRPO minus warm-up", "faithfulness")]
    assert [line["reasonings"], line["value"], line["low"], line["high"]] == ["50", "25", "25", "25"]
    (change,) = csv.DictReader(written["change-1.csv"].open(encoding="utf-8"))
    assert (change["series"], change["reasonings"], change["accuracy, %"][:5]) == ("warm-up", "0 to 50", "+34.5")
    (worth,) = csv.DictReader(written["worth-1.csv"].open(encoding="utf-8"))
    # Both seeds start at 50 %, where the same curves begin: 0 steps.
    assert [worth["reasonings"], worth["worth in RL steps"]] == ["50", "0 [0, 0]"]
    with Image.open(written["trend-1.png"]) as light, Image.open(written["trend-1-dark.png"]) as dark:
        assert light.size == dark.size and light.width > 1000
    for page in (written["study.md"].read_text(), written["study.html"].read_text()):
        assert (
            "Cold start (home)" in page
            and "Cold start (home): change" in page
            and "worth in RL steps" in page
            and "+25.0 [+25.0, +25.0]" in page
        )


def test_no_difference_has_the_look_of_a_series(collected: Collected, tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr("medvqa_rl.study.trend_figure.save_figure", lambda figure, path: drawn.append(figure))
    plot_trend(collected.trends[0], tmp_path / "trend.png")
    lines = [line for axes in drawn[0].axes for line in axes.lines if not line.get_label().startswith("_")]
    looks = {(line.get_label(), line.get_color(), line.get_marker()) for line in lines}
    assert {name for name, _, _ in looks} == {"warm-up", "GRPO", "GRPO minus warm-up"}
    assert len(looks) == len({(color, marker) for _, color, marker in looks}) == 3


def test_arms_without_a_finished_cell_are_left_out(given: dict[str, Any], tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "tiny.yaml", given | {"trends": [TREND]}), tmp_path / "study")
    store(recipe, {key: flags for key, flags in OUTCOMES.items() if key[0] != "sft"}, change=varied, rows=logged)
    (found,) = collect(recipe).trends
    assert [(point.series, point.x) for point in found.points] == [("warm-up", 0), ("GRPO", 50)]
    assert found.differences == ()
