"""Folders of runs are read as far as they are whole, and what is missing is said.

Run: pytest tests/report/test_runs.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_run, write

from medvqa_rl.report.pages.report import render_report
from medvqa_rl.report.runs import read_groups, read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return make_run(tmp_path / "copy")


def test_a_whole_run(run: Path) -> None:
    found = read_run(run)
    assert found.problems == [] and found.name == "one"
    assert [row["step"] for row in found.steps] == list(range(1, 41))
    assert [row["step"] for row in found.evals] == [0, 40]
    assert [evaluation.step for evaluation in found.evaluations] == [0, 40]
    assert len(found.evaluations[0].records()) == 20
    groups, problems = read_groups(found)
    assert problems == [] and [group.step for group in groups] == [20] * 4 + [40] * 4
    assert [item.is_correct for item in groups[0].completions] == [True, False, False]
    assert [item.has_answer for item in groups[0].completions] == [True, True, False]
    assert groups[0].tags["modality"] and groups[0].completions[0].rewards == {"format": 1.0, "correctness": 1.0}


def test_a_prompt_that_comes_twice_in_a_step_makes_two_groups(copy: Path) -> None:
    path = copy / "samples" / "step_000020.jsonl"
    first = path.read_text().splitlines(keepends=True)[:3]
    path.write_text("".join(first + first))
    assert [len(group.completions) for group in read_groups(read_run(copy))[0]][:2] == [3, 3]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("env.json", None, "env.json is missing."),
        ("env.json", "{", "env.json is not JSON (EOF while parsing an object"),
        ("data.json", "[]", "data.json has [] (should be an object): it is left out."),
        ("metrics.jsonl", None, "metrics.jsonl is missing: there are no curves."),
        ("metrics.jsonl", "", "metrics.jsonl has no step."),
        ("config.resolved.json", None, "config.resolved.json is missing."),
        (
            "eval/step_000040/results.json",
            '{"accuracy": 1}',
            "eval/step_000040/results.json is damaged",
        ),
        ("status.json", None, "status.json is missing."),
    ],
)
def test_missing_files_are_named_and_the_rest_is_read(
    copy: Path, name: str, content: str | None, expected: str
) -> None:
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    found = read_run(copy)
    assert len(found.problems) == 1 and found.problems[0].startswith(expected)
    page = render_report([found])
    assert expected in page and "is incomplete. The page shows what could be read" in page
    assert "Completions sampled during training" in page


def test_damaged_lines_are_left_out(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[5], lines[9], lines[10] = b'{"step": 5, "rew\n', b"\xff\xfe\n", b"[1]\n"
    (copy / "metrics.jsonl").write_bytes(b"".join(lines)[:-20])
    samples = copy / "samples" / "step_000020.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    del rows[4]["reward"]
    samples.write_text("\n".join([json.dumps(row) for row in rows] + ["null"]))
    found = read_run(copy)
    assert found.problems == ["metrics.jsonl: lines 6, 10, 11, 42 cannot be read and are skipped."]
    assert len(found.steps) == 37
    groups, problems = read_groups(found)
    assert len(groups) == 8 and len(groups[1].completions) == 2
    assert problems == [f"step_000020.jsonl: line {number} cannot be read and is skipped." for number in (13, 5)]


def test_completions_of_an_older_version_have_no_tags(copy: Path) -> None:
    path = copy / "samples" / "step_000040.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "\n".join(json.dumps({k: v for k, v in row.items() if k not in ("groups", "answer_type")}) for row in rows)
    )
    groups, problems = read_groups(read_run(copy))
    assert problems == [] and groups[-1].tags == {} and groups[0].tags


def test_records_that_cannot_be_read_are_named_where_they_are_compared(copy: Path) -> None:
    (copy / "eval" / "step_000000" / "samples.jsonl").unlink()
    assert "phantom/home/val cannot be compared: There are no evaluation records" in render_report([read_run(copy)])


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_folders_that_are_no_runs_are_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=r"There is no folder|is not a run folder: it has no status\.json"):
        read_run(tmp_path / "x")


def test_a_folder_of_runs_is_refused_with_a_hint(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"it contains runs \(copy\), give one of them"):
        read_run(copy.parent)


@settings(max_examples=40)
@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_make_a_page(tmp_path_factory: pytest.TempPathFactory, one: bytes, two: bytes, three: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    write(folder / "status.json", {})
    (folder / "metrics.jsonl").write_bytes(one)
    (folder / "config.resolved.json").write_bytes(two)
    (folder / "samples").mkdir()
    (folder / "samples" / "step_000001.jsonl").write_bytes(three)
    assert "</html>" in render_report([read_run(folder)])


def test_resumes_are_read_and_damaged_ones_reported(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    good = {"step": 4, "settings": {"data.path": ["/a/b", "/c/d"]}, "promise": "The results are equal."}
    (folder / "resumes.jsonl").write_text(json.dumps(good) + '\n{"step": 5}\nx\n', encoding="utf-8")
    run = read_run(folder)
    assert run.resumes == [good]
    assert [problem for problem in run.problems if "resumes" in problem] == [
        "resumes.jsonl: line 3 cannot be read and is skipped.",
        "resumes.jsonl: line 2 cannot be read and is skipped.",
    ]


@pytest.mark.parametrize(
    ("name", "changed", "found"),
    [
        ("env.json", {"packages": {"torch": 2}}, "has 2 under packages.torch (should be a valid string): it is left"),
        ("status.json", {"step": "4"}, "has '4' under step (should be a valid integer): it is left out."),
        ("eval/step_000040/results.json", {"accuracy": "1"}, "has '1' under accuracy"),
        ("eval/step_000040/results.json", {"mean_length": "x"}, "has 'x' under mean_length"),
        ("eval/step_000040/results.json", {"by": {"modality": {"CT": {}}}}, "has no field by.modality.CT.accuracy"),
    ],
)
def test_a_field_of_another_type_is_named(copy: Path, name: str, changed: dict[str, object], found: str) -> None:
    path = copy / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    (problem,) = read_run(copy).problems
    assert problem.startswith(name) and found in problem


def test_a_completion_whose_correctness_is_a_number_is_left_out(copy: Path) -> None:
    path = copy / "samples" / "step_000020.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["is_correct"] = 7
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_groups(read_run(copy))[1] == ["step_000020.jsonl: line 1 cannot be read and is skipped."]
