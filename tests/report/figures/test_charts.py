"""Which curves a report draws of the reward parts.

Run: pytest tests/report/figures/test_charts.py
"""

from __future__ import annotations

from pathlib import Path

from synthetic import step_row

from medvqa_rl.report.figures.charts import charts
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
    (curve,) = drawn["Correlation of reward parts with correctness"].curves
    assert curve.label == "ecr" and curve.values.tolist() == [-0.2, -0.4, -0.2 * 3]


def test_several_runs_have_one_picture_for_each_part() -> None:
    drawn = {chart.title: chart for chart in charts([run("one"), run("two")])}
    assert {"Reward: ecr", "Reward: format", "Reward: correctness"} <= drawn.keys()
    curves = drawn["Correlation with correctness: ecr"].curves
    assert [curve.label for curve in curves] == ["one", "two"]


def test_prompts_are_drawn_apart_where_a_run_mixes_them() -> None:
    rows = [
        step_row(1, **{"prompts/short/reward": 0.5, "prompts/short/correct": 0.25, "prompts/short/format": 1.0}),
        step_row(2, **{"prompts/explain/reward": 1.5, "prompts/short/reward": 0.75}),
    ]
    drawn = {chart.title: chart for chart in charts([StoredRun(Path("mixed"), metrics=rows)])}
    explain, short = drawn["Reward by prompt"].curves
    assert (explain.label, explain.steps.tolist(), explain.values.tolist()) == ("explain", [2], [1.5])
    assert (short.label, short.steps.tolist(), short.values.tolist()) == ("short", [1, 2], [0.5, 0.75])
    assert drawn["Correct answers by prompt"].is_share and drawn["Correct format by prompt"].is_share
    assert "Reward by prompt" not in {chart.title for chart in charts([run("one")])}
