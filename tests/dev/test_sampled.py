"""Sampled answers of a study, counted by hand.

Run: pytest tests/dev/test_sampled.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dev.sampled import measures, read_cells, table
from medvqa_rl.data.phantom.world import Scene
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer, write_records
from tests.records import make_record

SCENES = {"a": Scene("a", "CT", "brain", ()), "b": Scene("b", "MRI", "liver", ())}
THOUGHT = "<think>The modality is CT. The organ is brain.</think><answer>A</answer>"


def answered(question: str, *, is_correct: bool, tokens: int, is_truncated: bool = False) -> EvalRecord:
    answer = SampledAnswer(THOUGHT, "A", "A", is_correct, tokens, is_truncated)
    greedy = {"output": "loop loop loop", "is_correct": not is_correct, "num_tokens": 99, "is_truncated": True}
    return make_record(sample_id=question, image_key=question, sampled=(answer,), **greedy)


def written(folder: Path, name: str, records: list[EvalRecord]) -> None:
    (folder / name).mkdir()
    write_records(records, folder / name / "samples.jsonl")


def test_the_sampled_answers_are_counted_and_compared(tmp_path: Path) -> None:
    one = answered("a", is_correct=True, tokens=10)
    written(tmp_path, "grpo-seed0", [answered("b", is_correct=False, tokens=30, is_truncated=True), one])
    written(tmp_path, "ecr-seed0", [one, answered("b", is_correct=True, tokens=20)])
    written(tmp_path, "ecr-seed1", [one, answered("b", is_correct=False, tokens=20)])  # the baseline has no seed 1
    cells = read_cells(tmp_path, SCENES)
    found = measures(cells["grpo"]["seed0"])
    expected = {"accuracy": 50, "tokens": 20, "tokens of wrong answers": 30, "cut off": 50, "true claims": 50}
    assert {column: found[column] for column in expected} == pytest.approx(expected)
    assert found["different true claims"] == (2 + 0) / 2 and found["claims per reasoning"] == 2
    rows = {row["arm"]: row for row in table(cells, "grpo")}
    assert (rows["ecr"]["seeds"], rows["ecr"]["accuracies"], rows["ecr"]["accuracy"]) == (2, "100.0 50.0", "75.00")
    assert (rows["ecr"]["minus baseline"], rows["grpo"]["minus baseline"]) == ("50.00", "0.00")
