"""What judges said of a run's evaluations, in its report and its model card.

Run: pytest tests/report/pages/test_judged_report.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from synthetic import make_run, write

from medvqa_rl.cli.judge import evaluate as judge_eval_command
from medvqa_rl.cli.judge.evaluate import read_judge, run_judge_eval
from medvqa_rl.config import JudgeConfig
from medvqa_rl.report.card import model_card
from medvqa_rl.report.pages.report import render_report
from medvqa_rl.report.runs import read_run
from medvqa_rl.rewards.judges import Grade, Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import Rubric


class Kind:
    """Finds everything right and well reasoned."""

    def __init__(self, config: JudgeConfig, rubric: Rubric) -> None:
        self.identity = JudgeIdentity(config.model, "w", rubric.hash, 0.0)
        self.counters: dict[str, float] = {}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        return [Grade(3.0)] * len(requests)


def test_reports_and_cards_show_what_judges_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: JudgeConfig, rubrics: Sequence[Rubric]) -> dict[str, Judge]:
        return {rubric.name: Kind(config, rubric) for rubric in rubrics}

    monkeypatch.setattr(judge_eval_command, "load_judges", load)
    run = make_run(tmp_path / "run")
    assert "judged" not in render_report([read_run(run)])
    run_judge_eval([run], [read_judge("a <b> judge")], bias_samples=5)
    page = render_report([read_run(run)])
    assert page.count(", judged</summary>") == 2 and "a &lt;b&gt; judge" in page and "<b> judge" not in page
    assert "What moves the judges" in page and "3.00 [3.00, 3.00]" in page
    (run / "best").mkdir()
    write(run / "best" / "best.json", {"step": 40})
    card = model_card(read_run(run), run / "best")
    assert "These weights on phantom/home/val, after step 40. Judged by a \\<b\\> judge" in card
    assert "reasoning 3.00 \\[3.00, 3.00\\] of 3, 100.0 \\[" in card and "; 0 unscored." in card
    damaged = run / "eval" / "step_000040" / "judged.json"
    damaged.write_text(damaged.read_text().replace('"unscored": 0', '"unscored": "none"', 1))
    broken = read_run(run)
    problem = "eval/step_000040/judged.json has 'none' under judges.0.reasoning.unscored (should be a valid integer)"
    assert broken.problems == [f"{problem}: it is left out."]
    page = render_report([broken])
    assert page.count(", judged</summary>") == 1 and "judges.0.reasoning.unscored" in page
    card = model_card(broken, run / "best")
    assert "after step 40. Judged by" not in card and "judges.0.reasoning.unscored" in card.replace("\\", "")
