"""``judge eval``: finished evaluations judged by the embedded judges and by others, and what it refuses.

Run: pytest tests/cli/judge/test_evaluate.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.cli.judge import evaluate as judge_eval_command
from medvqa_rl.cli.judge.evaluate import evaluations_in, read_judge, run_judge_eval
from medvqa_rl.config import JudgeConfig
from medvqa_rl.data.phantom.reasonings import draw_reasoning
from medvqa_rl.evaluation.records import EvalRecord, write_records
from medvqa_rl.rewards.judges import Grade, Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.embedded import EmbeddedJudge
from medvqa_rl.rewards.judges.load import load_judge
from medvqa_rl.rewards.judges.rubric import Rubric
from tests.records import make_record

NO_CACHE = [JudgeConfig(model=name, cache=False) for name in ("phantom:judge_eval", "phantom:judge")]


def records(count: int = 16, dataset: str = "phantom/home/test") -> list[EvalRecord]:
    found = []
    for index in range(count):
        drawn = draw_reasoning(7, "judge eval", index)
        sample, is_right = drawn.sample, bool(index % 3)
        answer = sample.answer if is_right else "nothing"
        found.append(
            make_record(
                sample_id=f"q{index}",
                image_key=f"i{index // 2}",
                question=sample.question,
                options=sample.options,
                gold=sample.answer,
                think=drawn.text,
                answer=answer,
                is_correct=is_right,
                answer_type=sample.answer_type,
                dataset=dataset,
            )
        )
    return found


def write_evaluation(folder: Path, some: Sequence[EvalRecord], results: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    write_records(some, folder / "samples.jsonl")
    (folder / "results.json").write_text(json.dumps(results or {}))
    return folder


def test_notes_on_several_evaluations_are_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_evaluation(tmp_path / name, records(8)) for name in "ab"]
    run_judge_eval(folders, NO_CACHE[:1], bias_samples=0)
    printed = capsys.readouterr().out
    assert printed.count("95 % intervals resample images") == 1
    assert printed.count("Written:") == 2


def test_the_embedded_judges_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = records()
    folder = write_evaluation(tmp_path / "eval", some)
    run_judge_eval([folder], NO_CACHE, bias_samples=10)
    found = json.loads((folder / "judged.json").read_text())
    for config, row in zip(NO_CACHE, found["judges"]):
        judge = load_judge(config)
        requests = [
            JudgeRequest(one.question, one.options, one.think or "", answer=one.answer or "", gold=one.reference)
            for one in some
        ]
        grades = EmbeddedJudge(judge).grade(requests)
        assert row["judge"]["fingerprint"] == judge.identity.fingerprint and row["correctness"] is None
        assert row["reasoning"]["mean"]["estimate"] == pytest.approx(sum(grade.score for grade in grades) / 16)
        assert {check["check"] for check in row["bias"]["checks"]} >= {"longer", "reworded"}
    said = [json.loads(line) for line in (folder / "judged.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in said] == [one.sample_id for one in some]
    assert said[0]["judges"][1]["reasoning"] == {
        "score": int(grades[0].score),
        "reason": grades[0].reason,
    }
    assert found["agreement"]["reasoning"]["n"] == 16 and found["evaluation"]["judged"] == 16
    text = (folder / "judged.md").read_text()
    assert "Agreement of the two judges" in text and "see the reasoning alone" in text
    assert found["judges"][0]["judge"]["rubrics"]["reasoning"] in text
    assert "What moves the judges" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"is judged already: overwrite that with --replace"):
        run_judge_eval([folder], NO_CACHE)
    run_judge_eval([folder], NO_CACHE, samples=4, bias_samples=0, replace=True)
    again = json.loads((folder / "judged.json").read_text())
    assert again["evaluation"]["judged"] == 4 and again["judges"][0]["bias"] is None


def test_the_judge_that_rewarded_is_never_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = load_judge(NO_CACHE[1]).identity
    inside = write_evaluation(tmp_path / "run" / "eval" / "step_000010", records(4))
    (tmp_path / "run" / "judge.json").write_text(json.dumps({"reward": asdict(identity)}))
    apart = write_evaluation(tmp_path / "apart", records(4), {"judges": {"reasoning": asdict(identity)}})
    for folder in (inside, apart):
        with pytest.raises(
            ValueError, match=r"The only judge, phantom:judge, rewarded the model whose answers are in"
        ):
            run_judge_eval([folder], NO_CACHE[1:])
        assert not (folder / "judged.json").exists()
        run_judge_eval([folder], NO_CACHE, bias_samples=0)
        assert "Warning: phantom:judge rewarded the model" in capsys.readouterr().out
        assert "Warning: phantom:judge rewarded" in (folder / "judged.md").read_text()
        run_judge_eval([folder], NO_CACHE[:1], bias_samples=0, replace=True)
        assert "Warning" not in capsys.readouterr().out
    other = write_evaluation(tmp_path / "other", records(4), {"judges": {"evaluation": asdict(identity)}})
    run_judge_eval([other], NO_CACHE[1:], bias_samples=0)


def test_records_of_judges_are_checked(tmp_path: Path) -> None:
    identity = {"name": "x", "fingerprint": "f", "prompt_hash": "p", "strictness": 0.0}
    folder = write_evaluation(tmp_path / "run" / "eval" / "step_000010", records(4))
    for stored, expected in (
        ("[]", r"judge\.json has \[\]"),
        (json.dumps({"reward": identity | {"fingerprint": 7}}), r"has 7 under reward\.fingerprint"),
        (json.dumps({"reward": {"name": "x"}}), r"has no field reward\.fingerprint"),
    ):
        (tmp_path / "run" / "judge.json").write_text(stored)
        with pytest.raises(ValueError, match=f"{expected}.*: restore it, or remove it"):
            run_judge_eval([folder], NO_CACHE, bias_samples=0)
    (tmp_path / "run" / "judge.json").unlink()
    (folder / "results.json").write_text(json.dumps({"judges": {"reward": 3}}))
    with pytest.raises(ValueError, match=r"results\.json has 3 under judges\.reward .*: evaluate again"):
        run_judge_eval([folder], NO_CACHE, bias_samples=0)
    assert not (folder / "judged.json").exists()


class Writer:
    """A grader that finds every answer right and all reasoning fair, and fails where it is told to."""

    def __init__(self, config: JudgeConfig, rubric: Rubric) -> None:
        self.identity = JudgeIdentity(config.model, f"weights of {config.model}", rubric.hash, 0.0)
        self.counters: dict[str, float] = {}
        self._score = 3.0 if rubric.name == "correctness" else 2.0

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        return [Grade.failed("busy") if request.question == "fail" else Grade(self._score) for request in requests]


def test_judges_that_see_answers_are_held_to_the_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: JudgeConfig, rubrics: Sequence[Rubric]) -> dict[str, Judge]:
        return {rubric.name: Writer(config, rubric) for rubric in rubrics}

    monkeypatch.setattr(judge_eval_command, "load_judges", load)
    some = records(9, "vqa_rad/test")
    folder = write_evaluation(tmp_path / "eval", [replace(some[0], question="fail"), *some[1:]])
    runner = CliRunner()
    result = runner.invoke(app, ["judge", "eval", str(folder), "--judge", "big", "--judge", "model=small,device=cpu"])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / "judged.json").read_text())
    first = found["judges"][0]
    assert first["correctness"]["unscored"] == 1 and first["correctness"]["right"]["estimate"] == 1.0
    assert first["correctness"]["failures"] == {"busy": 1}
    closed = first["correctness"]["against_scorer"]["choice and closed"]
    right = [bool(one.is_correct) for one in some[1:] if one.answer_type != "open"]
    assert closed["n"] == len(right) + (some[0].answer_type != "open")
    assert closed["accuracy"]["estimate"] == pytest.approx(sum(right) / len(right)), "it always says right"
    assert 0 < sum(right) < len(right) and closed["false_yes_rate"]["estimate"] == 1.0
    assert found["agreement"]["correctness"]["same"]["estimate"] == 1.0
    result = runner.invoke(app, ["judge", "eval", str(folder), "--replace"])
    assert (
        result.exit_code == 2
        and "the embedded judges (phantom:judge_eval, phantom:judge) only know the phantom"
        in (" ".join(result.output.split()))
    )
    for judges, message in (
        (["big", "big"], "The two judges big and big are the same model"),
        (["a", "b", "c"], "3 judges are named"),
    ):
        with pytest.raises(ValueError, match=message):
            run_judge_eval([folder], [read_judge(name) for name in judges], replace=True)


def test_a_judge_is_named_by_model_or_settings() -> None:
    assert read_judge("phantom:judge") == JudgeConfig()
    given = read_judge("model=m, endpoint=http://localhost:8000/v1,concurrency=2")
    assert given == JudgeConfig(model="m", endpoint="http://localhost:8000/v1", concurrency=2)
    for text, message in (
        ("modle=x", "judge.modle"),
        ("endpoint=nowhere,model=m", "must be the address of a server"),
        ("phantom:nobody", "the embedded judges are"),
    ):
        with pytest.raises(ValueError, match=message):
            read_judge(text)


def test_a_judge_elsewhere_is_refused_where_the_network_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_eval_command, "is_off", lambda: True)
    assert read_judge("model=m,endpoint=http://localhost:8000/v1").endpoint == "http://localhost:8000/v1"
    with pytest.raises(ValueError, match="but network is off, so nothing may leave this machine"):
        read_judge("model=m,endpoint=http://example.org/v1")


def test_of_a_run_the_first_and_the_last_evaluation_are_judged(tmp_path: Path) -> None:
    for name in ("step_000000", "step_000010", "step_000020", "test"):
        write_evaluation(tmp_path / "eval" / name, records(1))
    assert [one.folder.name for one in evaluations_in(tmp_path)] == ["step_000000", "step_000020", "test"]
    assert [one.folder.name for one in evaluations_in(tmp_path / "eval" / "step_000010")] == ["step_000010"]


def test_unjudgeable_evaluations_are_refused_before_a_judge_is_loaded(tmp_path: Path) -> None:
    silent = write_evaluation(tmp_path / "silent", [replace(one, think=None) for one in records(3)])
    with pytest.raises(ValueError, match="contains reasoning, and the embedded judges read nothing else"):
        run_judge_eval([silent], NO_CACHE)
    lost = write_evaluation(tmp_path / "lost", [replace(one, is_correct=None) for one in records(3)])
    with pytest.raises(ValueError, match="is scored: see unscored_reason"):
        run_judge_eval([lost], NO_CACHE)
    with pytest.raises(ValueError, match="There is no evaluation in"):
        run_judge_eval([tmp_path / "nothing"], NO_CACHE)
