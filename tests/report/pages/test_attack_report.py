"""An attack on a run's rewards, in its report.

Run: pytest tests/report/pages/test_attack_report.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import EVIL, make_run, write

from medvqa_rl.report.folder import version_of
from medvqa_rl.report.pages.report import render_report
from medvqa_rl.report.runs import read_run
from medvqa_rl.rewards.attack.results import FILE, TOTAL, AttackResult, AttackRow, RewardRow, Worst


def result(**changes: Any) -> dict[str, Any]:
    """The content of reward_attack.json: a completion with markup exceeds by 0.5."""
    rows = {"right": 1.0, "wrong": 0.5, "highest": 1.25, "attack": "verbose", "exceeding": 0.5}
    found = AttackResult(
        dataset="phantom/home/train",
        questions=2,
        skipped=0,
        seed=0,
        max_completion_length=96,
        bound=0.0,
        excess=0.5,
        left_out=["looking"],
        rewards=[RewardRow(name="ecr", weight=2.0, **rows), RewardRow(name=TOTAL, weight=None, **rows)],
        attacks=[
            AttackRow(
                **{"name": "verbose", "questions": 2, "mean": 1.25, "excess": 0.5, "worst": "q1", "exceeding": 0.5},
                taken_for_right=0.0,
                unscored=0.0,
            )
        ],
        worst=Worst(
            **{"attack": "verbose", "sample_id": "q1", "question": "Where?", "options": [], "gold": "left"},
            text=EVIL.removesuffix("\ud800"),  # which JSON cannot hold
            scores={"ecr": 1.0, TOTAL: 1.5},
            right={"ecr": 0.5, TOTAL: 1.0},
        ),
        cure=0.5,
    )
    return found.model_dump() | changes


def test_the_report_shows_the_attack(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    assert 'href="#attack"' not in render_report([read_run(run)])
    before = version_of(run)
    write(run / FILE, result())
    assert version_of(run) != before  # view sends the page again
    page = render_report([read_run(run), read_run(other)])
    assert 'href="#attack"' in page and "Rewards under attack" in page
    assert "exceeds the honest right one by 0.5; the bound is 0." in page
    assert "With rewards.correctness=0.5, no completion of this suite exceeds the bound." in page
    assert "<img src=x" not in page and "Completion: &lt;/script&gt;" in page
    assert page.count("<summary>Totals by attack</summary>") == 1
    for cell in ("<td>ecr</td>", "<td>2</td>", "<td>1.25</td>", "<td>verbose</td>", "<td>+0.50</td>"):
        assert cell.replace("<td>", "").replace("</td>", "") in page


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", f"{FILE} is not JSON"),
        (json.dumps(result(excess="much")), f"{FILE} has 'much' under excess (should be a valid number)"),
        (json.dumps(result(attacks=[])), f"{FILE} has [] under attacks"),
        (json.dumps(result(version=2)), f"{FILE} has 2 under version"),
        (json.dumps({"dataset": "x"}), f"{FILE} has no field questions"),
    ],
)
def test_a_damaged_file_is_left_out(tmp_path: Path, content: str, problem: str) -> None:
    run = make_run(tmp_path / "run")
    (run / FILE).write_text(content)
    found = read_run(run)
    assert len(found.problems) == 1 and found.problems[0].startswith(problem)
    assert found.problems[0].endswith("it is left out.")
    page = render_report([found])
    assert 'href="#attack"' not in page and "Totals by attack" not in page


def test_scores_without_the_names_of_the_table_are_no_obstacle(tmp_path: Path) -> None:
    run, content = make_run(tmp_path / "run"), result()
    content["worst"]["scores"] = content["worst"]["right"] = {}
    write(run / FILE, content)
    assert "ecr rewards it as much as the right one" in render_report([read_run(run)])
