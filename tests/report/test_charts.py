"""Which curves a report draws of the reward parts.

Run: pytest tests/report/test_charts.py
"""

from __future__ import annotations

from pathlib import Path

from synthetic import step_row

from medvqa_rl.report.charts import charts
from medvqa_rl.report.runs import StoredRun


def run(name: str) -> StoredRun:
    rows = [
        step_row(step, **{"rewards/ecr/mean": 0.1 * step, "rewards/ecr/corr_correctness": -0.2 * step})
        for step in (1, 2, 3)
    ]
    return StoredRun(Path(name), metrics=rows)


def test_one_run_has_its_parts_and_their_correlations_in_one_picture_each() -> None:
    drawn = {chart.title: chart for chart in charts([run("one")])}
    assert [curve.label for curve in drawn["Reward parts"].curves] == ["correctness", "ecr", "format"]
    (curve,) = drawn["Correlation of parts with right answers"].curves
    assert curve.label == "ecr" and curve.values.tolist() == [-0.2, -0.4, -0.2 * 3]


def test_several_runs_have_one_picture_for_each_part() -> None:
    drawn = {chart.title: chart for chart in charts([run("one"), run("two")])}
    assert {"Reward: ecr", "Reward: format", "Reward: correctness"} <= drawn.keys()
    curves = drawn["Correlation with right answers: ecr"].curves
    assert [curve.label for curve in curves] == ["one", "two"]
