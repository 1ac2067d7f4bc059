"""Evaluation records are read with the types that were written, or refused with line and field named."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer, parse_record, read_records, record_line

RECORD = EvalRecord(
    sample_id="a", image_key="i", question="Is it?", options=("left", "right"), gold="B", output="B", think=None,
    answer="B", is_correct=True, is_well_formed=True, has_answer=True, is_truncated=False, num_tokens=2, token_f1=None,
    answer_type="choice", groups={"modality": "CT"}, choice="B",
    sampled=(SampledAnswer("A", "A", "A", is_correct=False, num_tokens=1, is_truncated=False),),
)  # fmt: skip


def test_a_written_record_is_read_back() -> None:
    assert parse_record(record_line(RECORD), "Line 1") == RECORD
    unscored = replace(RECORD, is_correct=None, nll=float("inf"), similarity=-0.5, alternatives=("A",))
    assert parse_record(record_line(unscored), "Line 1") == unscored


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_correct": 7}, "Line 3 has 7 under is_correct (should be a valid boolean)"),
        ({"is_correct": "true"}, "Line 3 has 'true' under is_correct"),
        ({"gold": 1}, "Line 3 has 1 under gold (should be a valid string)"),
        ({"options": "left"}, "Line 3 has 'left' under options"),
        ({"options": ["left", None]}, "Line 3 has None under options.1"),
        ({"groups": {"modality": ["CT"]}}, "Line 3 has ['CT'] under groups.modality"),
        ({"sampled": [{"output": 1}]}, "Line 3 has 1 under sampled.0.output"),
        ({"num_tokens": -1}, "Line 3 has -1 under num_tokens"),
        ({"num_tokens": 1.5}, "Line 3 has 1.5 under num_tokens"),
        ({"num_tokens": 10**400}, "Line 3 has 1000"),
        ({"token_f1": 1.5}, "Line 3 has 1.5 under token_f1"),
        ({"token_f1": float("nan")}, "Line 3 has nan under token_f1"),
        ({"answer_type": "multiple"}, "Line 3 has 'multiple' under answer_type"),
        ({"template": "<script>"}, "Line 3 has '<script>' under template"),
        ({"gold": "C"}, "Line 3 has the gold answer 'C', but its options are A, B"),
        ({"alternatives": ["AB"]}, "Line 3 has the gold answer 'AB', but its options are A, B"),
        ({"colour": 1}, "Line 3 has the unknown field colour"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(changed: dict[str, Any], message: str) -> None:
    row = {**json.loads(record_line(RECORD)), **changed}
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        parse_record(json.dumps(row), "Line 3")


def test_a_missing_field_is_named() -> None:
    row = json.loads(record_line(RECORD))
    del row["is_correct"]
    with pytest.raises(ValueError, match=r"^Line 3 has no field is_correct: evaluate again"):
        parse_record(json.dumps(row), "Line 3")


@pytest.mark.parametrize("line", [b"{", b"[" * 5000, b"\xff", b"", b"\x1b[2J"])
def test_what_is_not_json_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"^Line 3 is not JSON \(.*\): evaluate again") as caught:
        parse_record(line, "Line 3")
    assert str(caught.value).isprintable()


def test_half_a_character_is_written_as_a_question_mark() -> None:
    read = parse_record(record_line(replace(RECORD, output="a\ud800b", why="\U0001f600")), "Line 1")
    assert (read.output, read.why) == ("a?b", "\U0001f600")
    row = {**json.loads(record_line(RECORD)), "output": "a\ud800b"}
    assert parse_record(json.dumps(row), "Line 1").output == "a?b"  # of an older version


@given(st.text(), st.text())
def test_any_text_survives(output: str, question: str) -> None:
    record = replace(RECORD, output=output, question=question)
    assert parse_record(record_line(record), "Line 1") == record


def test_a_question_occurs_once_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(record_line(RECORD) + record_line(replace(RECORD, sample_id="b\x85")))
    assert [record.sample_id for record in read_records(path)] == ["a", "b\x85"]
    path.write_text(2 * record_line(RECORD))
    with pytest.raises(ValueError, match=r"Line 2 of .*samples.jsonl has the sample_id 'a' a second time"):
        read_records(path)
    path.write_bytes(b"")
    assert read_records(path) == []
