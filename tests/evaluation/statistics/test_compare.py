"""Comparison of runs: numbers computed by hand, how evaluations are matched, and invalid input.

Run: pytest tests/evaluation/statistics/test_compare.py
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medvqa_rl.cli.app import app
from medvqa_rl.config import EvalConfig
from medvqa_rl.evaluation.records import EvalRecord, write_records
from medvqa_rl.evaluation.statistics.compare import Evaluated, compare, match
from medvqa_rl.evaluation.statistics.intervals_and_tests import cluster_permutation, holm
from medvqa_rl.evaluation.statistics.summary import paired_gain
from tests.records import make_record

CONFIG = EvalConfig(bootstrap=200)


def record(number: int, right: bool, *, dataset: str = "data", template: str = "think_answer") -> EvalRecord:
    """Three questions per image, CT and MRI in turn."""
    return make_record(
        sample_id=f"s{number}",
        image_key=f"image {number // 3}",
        question=f"Question {number}?",
        answer="yes" if right else "[no] <b>",
        is_correct=right,
        groups={"modality": "CT" if number % 2 else "MRI"},
        dataset=dataset,
        template=template,
    )


def run(name: str, wrong: Sequence[int] = (), count: int = 24, **more: str) -> Evaluated:
    return Evaluated(name, Path(name), [record(number, number not in wrong, **more) for number in range(count)])


A = run("a", wrong=range(12))
B = run("b", wrong=(0, 1, 20))
C = run("c", wrong=range(1, 13))


def save(folder: Path, evaluated: Evaluated, *, finished: bool = True) -> Path:
    folder.mkdir(parents=True)
    write_records(evaluated.records, folder / "samples.jsonl")
    (folder / "evaluation.json").write_text("{}")
    if finished:
        (folder / "results.json").write_text("{}")
    return folder


def test_a_comparison_by_hand() -> None:
    comparison = compare([A, B, C], CONFIG)
    assert comparison["baseline"] == "a" and comparison["dataset"] == "data"
    assert [(row["name"], row["accuracy"]) for row in comparison["runs"]] == [("a", 0.5), ("b", 21 / 24), ("c", 0.5)]
    first, second = comparison["pairs"]
    gain = paired_gain(A.records, B.records, CONFIG)
    assert {name: first[name] for name in gain} == gain
    assert (first["improved"], first["worsened"], first["gain"]) == (10, 1, pytest.approx(9 / 24))
    assert (second["improved"], second["worsened"], second["gain"]) == (1, 1, 0.0)
    # Five of eight images change, by +1, +3, +3, +3 and -1: the exact share of 2^5 sign patterns.
    sums = [1, 3, 3, 3, -1]
    totals = [sum(s * (1 if bits >> i & 1 else -1) for i, s in enumerate(sums)) for bits in range(32)]
    p = sum(abs(total) >= 9 for total in totals) / 32
    assert first["permutation_p"] == pytest.approx(p)
    assert second["permutation_p"] == 1.0
    assert (first["holm_p"], second["holm_p"]) == (pytest.approx(2 * p), 1.0)
    assert [row["sample_id"] for row in first["flipped"]] == [f"s{number}" for number in (*range(2, 12), 20)]
    assert [row["direction"] for row in first["flipped"]] == ["improved"] * 10 + ["worsened"]
    assert first["flipped"][0] == {
        "sample_id": "s2",
        "image_key": "image 0",
        "direction": "improved",
        "question": "Question 2?",
        "options": [],
        "gold": "yes",
        "before": "[no] <b>",
        "after": "yes",
        "groups": {"modality": "MRI"},
    }


def test_groups_have_their_own_tests_adjusted_by_holm() -> None:
    by = compare([A, B], CONFIG)["pairs"][0]["by"]
    assert set(by) == {"answer_type", "answer_kind", "modality"}
    assert {value: row["n"] for value, row in by["modality"].items()} == {"CT": 12, "MRI": 12}
    members = [(one, other) for one, other in zip(A.records, B.records) if one.groups["modality"] == "CT"]
    before, after = [one.is_correct for one, _ in members], [other.is_correct for _, other in members]
    p = {"CT": cluster_permutation(before, after, [one.image_key for one, _ in members])}
    assert by["modality"]["CT"]["permutation_p"] == pytest.approx(p["CT"])
    p["MRI"] = by["modality"]["MRI"]["permutation_p"]
    assert {value: row["holm_p"] for value, row in by["modality"].items()} == pytest.approx(holm(p))


def test_unscored_questions_are_left_out_of_pairs_but_not_forgotten() -> None:
    broken = Evaluated("b", Path("b"), [replace(B.records[0], is_correct=None), *B.records[1:]])
    comparison = compare([A, broken], CONFIG)
    assert comparison["pairs"][0]["n"] == 23
    assert (comparison["runs"][1]["n"], comparison["runs"][1]["num_scored"]) == (24, 23)


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    folders = [str(save(tmp_path / run.name, run)) for run in (A, B, C)]
    result = CliRunner().invoke(app, ["compare", *folders, "--output", str(tmp_path / "out.json"), "--flips", "2"])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for part in ("87.5", "+37.5", "permut. p", "modality: CT", "3 of 11 questions that flipped", "[no] <b>"):
        assert part in text
    stored = json.loads((tmp_path / "out.json").read_text())["comparisons"]
    assert len(stored) == 1 and len(stored[0]["pairs"][0]["flipped"]) == 11
    assert not any(isinstance(value, float) and math.isnan(value) for value in stored[0]["pairs"][0].values())


def test_evaluations_of_the_same_weights_are_named(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, run(name, wrong=(3,))) for name in ("a", "b")]
    for folder in folders:
        (folder / "results.json").write_text(json.dumps({"model": {"weights": "abc"}}))
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "--output", str(out)])
    text = " ".join(result.output.split())
    assert result.exit_code == 0 and text.count("are evaluations of the same weights.") == 1
    (pair,) = json.loads(out.read_text())["comparisons"][0]["pairs"]
    bound = 1 - 0.025 ** (1 / pair["num_clusters"])
    assert pair["same_weights"] and pair["gain_high"] == -pair["gain_low"] == pytest.approx(bound)
    (folders[1] / "results.json").write_text(json.dumps({"model": {"weights": "other"}}))
    assert "same weights" not in CliRunner().invoke(app, ["compare", *map(str, folders)]).output
    (folders[1] / "results.json").write_text(json.dumps({"model": 3}))
    result = CliRunner().invoke(app, ["compare", *map(str, folders)])
    assert result.exit_code == 2 and "results.json has 3 under model" in " ".join(result.output.split())


def test_different_questions_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    folders = [str(save(tmp_path / "a", A)), str(save(tmp_path / "short", run("short", count=20)))]
    result = CliRunner().invoke(app, ["compare", *folders])
    assert result.exit_code == 2
    assert "The two evaluations have different questions (24 and 20, 20 in common)" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "1 evaluation is given, but comparing needs two or more"),
        (["a", "none"], "There is no evaluation in none"),
        (["a", "open"], "The evaluation in open is not finished: continue it with eval --resume."),
        (["a", "empty"], "holds no records: evaluate again"),
        (["a", "steps"], "steps holds two evaluations of data with the template think_answer, in steps/1 and steps/2"),
        (
            ["a", "many"],
            "no evaluation of the same data with the same template in common: a has data with think_answer",
        ),
    ],
)
def test_incompatible_evaluations_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a"), A)
    save(Path("open"), A, finished=False)
    save(Path("empty"), replace(A, records=[]))
    for number in (1, 2):
        save(Path("steps", str(number)), A)
        save(Path("many", str(number)), run("m", dataset="other", template=("think_answer", "direct")[number - 1]))
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_runs_with_several_evaluations_are_matched_by_data_and_template(tmp_path: Path) -> None:
    for name in ("x", "y"):
        for dataset in ("one", "two"):
            save(tmp_path / name / f"{dataset}-{name}", run(name, dataset=dataset))
    save(tmp_path / "y" / "three", run("y", dataset="three"))
    matched = match([tmp_path / "x", tmp_path / "y"])
    assert [[run.folder.name for run in runs] for runs in matched] == [["one-x", "one-y"], ["two-x", "two-y"]]
    # Two single evaluations are compared whatever their prompts.
    save(tmp_path / "direct", run("d", template="direct"))
    ((one, other),) = match([tmp_path / "x" / "one-x", tmp_path / "direct" / "samples.jsonl"])
    assert (one.folder.name, other.folder.name) == ("one-x", "direct")
