"""A run that an embedded judge rewards and another evaluates: what is logged, cached, refused and resumed.

Run: pytest tests/learning/test_judged_run.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medvqa_rl.config.yaml import build_config
from medvqa_rl.core.answers import parse_completion
from medvqa_rl.evaluation.cells import run_eval
from medvqa_rl.evaluation.judging.calibration import Worth, remember
from medvqa_rl.evaluation.judging.instrument import rewarding_judges
from medvqa_rl.learning.grpo import train
from medvqa_rl.rewards.judges import Grade, JudgeRequest
from medvqa_rl.rewards.judges.load import caches_folder, load_judge, load_judges
from medvqa_rl.rewards.judges.rubric import REASONING, STEP
from medvqa_rl.rewards.process import process_score
from medvqa_rl.rewards.statements import split_statements


def settings(folder: Path, **judge: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "model": {"path": "phantom:instruct", "device": "cpu"},
        "data": {"num_val": 6, "num_test": 6},
        "rollout": {"num_generations": 4, "max_completion_length": 48},
        "rewards": {"semantic": 0.5},
        "judge": {"cache_dir": str(folder / "cache"), "device": "cpu", **judge},
        "eval_judge": {"model": "phantom:judge_eval", "cache": False, "device": "cpu"},
        "loss": {"beta": 0.0},
        "eval": {"bootstrap": 50, "batch_size": 6},
        "train": {"steps": 2, "prompts_per_step": 2, "save_steps": 1, "eval_steps": 2, "log_completions_steps": 1},
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_judged_run_records_judge_and_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config(settings(tmp_path), purpose="train")
    run = train(config)
    judge = load_judge(config.judge)
    known = json.loads((run / "judge.json").read_text())
    assert known["reward"] == judge.identity.to_json()
    assert known["evaluation"]["name"] == "phantom:judge_eval"
    assert known["evaluation"]["fingerprint"] != known["reward"]["fingerprint"]

    rows = lines(run / "samples" / "step_000002.jsonl")
    requests = [
        JudgeRequest(row["question"], tuple(row["options"]), parse_completion(row["completion"]).think or "")
        for row in rows
    ]
    grades = judge.grade(requests)
    assert [row["rewards"]["semantic"] for row in rows] == [grade.score for grade in grades]
    for row in rows:
        parts = row["rewards"]
        assert row["reward"] == pytest.approx(parts["format"] + parts["correctness"] + 0.5 * parts["semantic"])
        assert row["extra"]["judge"] == str(judge.identity)
    metrics = [row for row in lines(run / "metrics.jsonl") if "judge/asked" in row]
    assert [row["judge/asked"] for row in metrics] == [8, 16]
    assert metrics[-1]["rewards/semantic/mean"] == pytest.approx(sum(grade.score for grade in grades) / 8)
    assert judge.counters["cached"] == len(requests), "the run has cached its grades"

    capsys.readouterr()
    run_eval(config, checkpoint=run / "best", output=tmp_path / "eval")
    assert "Warning" not in capsys.readouterr().out
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["judges"] == known
    records = lines(tmp_path / "eval" / "samples.jsonl")
    other = load_judge(config.eval_judge) if config.eval_judge else judge
    said = other.grade([JudgeRequest(r["question"], tuple(r["options"]), r["think"] or "") for r in records])
    assert [record["verdict"] for record in records] == [grade.score for grade in said]
    expected = sum(record["is_well_formed"] + record["verdict"] for record in records) / len(records)
    assert results["thinking"]["reward"] == pytest.approx(expected)


def test_a_graded_run_records_scores_and_judge(tmp_path: Path) -> None:
    given = settings(tmp_path)
    given["rewards"] = {"reasoning": 0.6, "reasoning_gate": 0.25}
    given["train"] |= {"steps": 1, "eval_steps": 0}
    config = build_config(given, purpose="train")
    run = train(config)
    grader = load_judges(config.judge, [REASONING])["reasoning"]
    known = json.loads((run / "judge.json").read_text())
    assert known["reasoning"] == grader.identity.to_json() and "reward" not in known
    rows = lines(run / "samples" / "step_000001.jsonl")
    read = [parse_completion(row["completion"]) for row in rows]
    requests = [
        JudgeRequest(row["question"], tuple(row["options"]), said.think or "", answer=said.answer or "", gold="unseen")
        for row, said in zip(rows, read)
    ]
    grades = grader.grade(requests)
    limits = [1.0 if row["rewards"]["correctness"] else 0.25 for row in rows]
    for row, grade, limit in zip(rows, grades, limits):
        parts = row["rewards"]
        assert parts["reasoning"] == pytest.approx(min(grade.score / 3, limit))
        assert row["reward"] == pytest.approx(parts["format"] + parts["correctness"] + 0.6 * parts["reasoning"])
        assert row["extra"]["reasoning_score"] == grade.score and row["extra"]["reasoning_reason"] == grade.reason
        assert row["extra"]["reasoning_judge"] == str(grader.identity)
    (metrics,) = lines(run / "metrics.jsonl")
    assert metrics["rewards/reasoning/ungated"] == pytest.approx(sum(grade.score for grade in grades) / 3 / 8)
    assert metrics["rewards/reasoning/mean"] == pytest.approx(sum(row["rewards"]["reasoning"] for row in rows) / 8)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert rewarding_judges(checkpoint) == {"reasoning": grader.identity}


def test_a_copy_of_the_reward_judge_triggers_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = settings(tmp_path)
    given["train"] |= {"steps": 1, "eval_steps": 0}
    run = train(build_config(given, purpose="train"))
    given["eval_judge"] = {"model": "phantom:judge", "cache": False}
    given["rewards"] = {}
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert [found.name for found in rewarding_judges(checkpoint).values()] == ["phantom:judge"]
    capsys.readouterr()
    run_eval(build_config(given), checkpoint=checkpoint, output=tmp_path / "eval")
    assert "Warning: phantom:judge evaluates a model that it rewarded in training" in " ".join(
        capsys.readouterr().out.split()
    )


def test_resuming_with_another_judge_is_refused(tmp_path: Path) -> None:
    given = settings(tmp_path)
    given["train"] |= {"steps": 1, "eval_steps": 0}
    train(build_config(given, purpose="train"))
    given["train"]["steps"] = 2
    given["judge"]["model"] = "phantom:judge_eval"
    with pytest.raises(ValueError, match=r"judge\.model"):
        train(build_config(given, purpose="train"), resume=True)


def test_an_unusable_judge_fails_before_anything_is_written(tmp_path: Path) -> None:
    config = build_config(settings(tmp_path, model=str(tmp_path / "nowhere")), purpose="train")
    with pytest.raises(ValueError, match=r"judge\.model is .*nowhere"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_is_not_worth_using_is_warned_about_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a dry run; the calibration of another strictness is that of another judge."""
    found = Worth(False, "Not worth using: it says No to all 40 texts of pairs, of which 75 % are labelled Yes.")
    given = settings(tmp_path)
    config = build_config(given, purpose="train")
    remember(caches_folder(config.judge), load_judge(config.judge).identity, found)
    train(config, dry_run=True)
    assert f"Warning: by its calibration the judge phantom:judge, which rewards, should not. {found.summary} Set" in (
        " ".join(capsys.readouterr().out.split())
    )
    train(build_config(settings(tmp_path, strictness=1.0), purpose="train"), dry_run=True)
    assert "calibration" not in capsys.readouterr().out


def test_failed_grades_stop_the_run_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medvqa_rl.learning.run.errors import UnscoredError
    from medvqa_rl.rewards.judges.cache import CachedJudge

    monkeypatch.setattr(CachedJudge, "grade", lambda self, requests: [Grade.failed("down") for _ in requests])
    given = settings(tmp_path)
    given["train"]["eval_steps"] = 0
    with pytest.raises(UnscoredError, match=r"100% of the completions could not be scored by semantic") as stopped:
        train(build_config(given, purpose="train"))
    assert "check that the judge phantom:judge answers" in str(stopped.value)
    assert str(stopped.value).endswith("continue with --resume.")


def test_a_process_reward_moves_the_steps_of_a_run_and_resumes_exactly(tmp_path: Path) -> None:
    """The judge's verdicts on the steps, as stored, explain the advantages; and a resumed run ends the same."""
    given = settings(tmp_path)
    given["rewards"] = {"process": 2.0, "process_discount": 0.5}
    given["train"] |= {"eval_steps": 0}
    whole = train(build_config(given, purpose="train"))
    judge = load_judges(build_config(given).judge, [STEP])["step"]
    assert json.loads((whole / "judge.json").read_text())["step"] == judge.identity.to_json()
    rows = lines(whole / "samples" / "step_000002.jsonl")
    for row in rows:
        think = parse_completion(row["completion"]).think or ""
        said = split_statements(think)
        requests = [
            JudgeRequest(row["question"], tuple(row["options"]), think[: step.end], step=step.text) for step in said
        ]
        verdicts = [int(grade.score) for grade in judge.grade(requests)]
        assert row["extra"]["process_steps"] == verdicts
        assert row["rewards"]["process"] == pytest.approx(process_score(verdicts, 0.5))
        assert row["reward"] == row["rewards"]["format"] + row["rewards"]["correctness"]
    metrics = lines(whole / "metrics.jsonl")
    assert metrics[-1]["rewards/process/steps"] == sum(len(row["extra"]["process_steps"]) for row in rows) / 8
    assert judge.counters["cached"] == judge.counters["asked"], "the run has cached its verdicts"

    again = dict(given, output_dir=str(tmp_path / "again"), train={**given["train"], "steps": 1})
    train(build_config(again, purpose="train"))
    again["train"] = given["train"]
    resumed = train(build_config(again, purpose="train"), resume=True)
    ends = [load_file(run / "checkpoints" / "step_000002" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    without = dict(given, output_dir=str(tmp_path / "without"), rewards={})
    plain = train(build_config(without, purpose="train"))
    other = load_file(plain / "checkpoints" / "step_000002" / "model.safetensors")
    assert not all(torch.equal(ends[0][name], other[name]) for name in other), "the process reward changes the weights"
