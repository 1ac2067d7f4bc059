"""Records of other tools are recognised by their shape and read as the same question.

Run: pytest tests/data/reading/test_records.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvqa_rl.core.types import Sample
from medvqa_rl.data.export import trl_row
from medvqa_rl.data.reading.cells import image_cells, read_answers, without_placeholders
from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.records import SHAPES, Standard, recognise
from medvqa_rl.data.reading.rows import Unusable

Q, A, I = "Is it?", "yes", "a.png"
USER = {"role": "user", "content": f"<image>{Q}"}
PARTS = {"role": "user", "content": [{"type": "image", "image": I}, {"type": "text", "text": Q}]}

ANSWER = {"role": "assistant", "content": A}
TRL = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": Q}]}
LONGER = {"role": "user", "content": f"{Q} Think first."}

RECORDS: list[tuple[str, dict[str, Any]]] = [
    ("LLaVA", {"image": I, "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}),
    ("chat", {"messages": [{"role": "system", "content": "x"}, USER, ANSWER], "images": [I]}),
    ("chat", {"messages": [PARTS, {"role": "assistant", "content": [{"type": "text", "text": A}]}]}),
    ("chat", {"messages": [PARTS], "solution": A}),
    ("chat", {"messages": [PARTS, {"role": "assistant", "content": "Because ..."}], "answer": A}),
    ("TRL", {"prompt": [TRL], "images": [I], "solution": A}),
    ("TRL", {"prompt": Q, "image": I, "solution": A}),
    ("verl", {"prompt": [USER], "images": [I], "reward_model": {"ground_truth": A}, "extra_info": {"index": 1}}),
    ("verl", {"prompt": [LONGER], "image": I, "reward_model": {"ground_truth": A}, "extra_info": {"question": Q}}),
    ("swift", {"query": Q, "response": A, "images": [I]}),
    ("EasyR1", {"problem": f"<image>{Q}", "answer": A, "images": [I]}),
    ("EasyR1", {"problem": Q, "solution": f"<answer>{A}</answer>", "image": I}),
    ("", {"question": Q, "answer": A, "image": I}),
    ("", {"Frage": Q, "Antwort": A, "Bild": I}),
    ("", {"question": Q, "prompt": "x", "label": A, "image_1": I}),
]


@pytest.mark.parametrize(("shape", "record"), RECORDS, ids=[f"{n} {name}" for n, (name, _) in enumerate(RECORDS)])
def test_shapes(shape: str, record: dict[str, Any]) -> None:
    before = json.dumps(record)
    name, _ = recognise(record)
    assert (shape in name) if shape else name == ""
    fields = Standard(Path("t.jsonl"))(record)
    assert without_placeholders(fields["question"]) == Q
    assert read_answers(fields, {}) == [A] and image_cells(fields, {}) == [I]
    assert json.dumps(record) == before


def test_our_own_export() -> None:
    sample = Sample(
        "1", Q, "B", "choice", (), ("no", "yes"), groups={"organ": "lung", "other": "x"}, alternatives=("A",)
    )
    name, fields = recognise(trl_row(sample, ["images/a.png"], "think_answer"))
    assert "export" in name and fields["question"] == Q and fields["answer"] == ["B", "A"]
    assert fields["options"] == ["no", "yes"] and fields["organ"] == "lung" and "prompt" not in fields


@pytest.mark.parametrize("answers", [1, 2])
def test_a_conversation_of_several_questions_is_not_cut(answers: int) -> None:
    turns = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}] * 2
    with pytest.raises(Unusable, match="not one question and one answer"):
        recognise({"image": I, "conversations": turns[: 2 + answers]})
    with pytest.raises(Unusable, match="not one question and one answer"):
        recognise({"image": I, "messages": [{"role": "assistant", "content": A}]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "text", "type", "ground_truth"]), inner)
    ),
    max_leaves=8,
)
KEYS = ["prompt", "images", "solution", "messages", "conversations", "reward_model", "extra_info", "problem", "query"]
KEYS += ["response", "question", "options", "answer_type", "groups", "answers", "answer", "label", "Answer"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON))
@settings(max_examples=100, deadline=None)
def test_any_record_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        name, fields = recognise(record)
        assert name in ("", *SHAPES) and isinstance(fields, dict)
        Standard(Path("t"))(record)
    except Unusable:
        pass
    except ValueError as error:
        assert "can both be " in str(error) and ": say which it is with --columns " in str(error)


def test_what_is_said_of_a_table() -> None:
    standard, report = Standard(Path("t.csv")), TableReport("t.csv", total=3, about="separated by tabs")
    for record in (RECORDS[13][1], {"Frage": Q, "Antwort": A, "Bild": I, "n": 1}):
        standard(record)
    standard.check()
    assert standard.about(report) == (
        "t.csv: 3 rows, separated by tabs; question is 'Frage', answer is 'Antwort', image is 'Bild'."
    )
    standard(RECORDS[0][1])
    assert standard.about(report).startswith("t.csv: 3 rows of LLaVA/ShareGPT conversations (1), separated by tabs")


def test_missing_and_ambiguous_columns_say_what_to_add() -> None:
    standard = Standard(Path("t.csv"))
    standard({"Bild": I, "x": Q, "y": A})
    with pytest.raises(ValueError) as error:
        standard.check()
    assert str(error.value) == (
        "The table t.csv has no column question, answer; it has Bild, x, y: rename its columns, or say which they are "
        "with --columns question=COLUMN,answer=COLUMN (in a config data.columns.question and data.columns.answer)."
    )
    standard = Standard(Path("t.csv"), {"question": "x", "answer": "z"})
    standard({"Bild": I, "x": Q, "y": A})
    with pytest.raises(ValueError, match="has no column 'z', which is to be answer; it has Bild, x, y: give one of"):
        standard.check()
    with pytest.raises(ValueError) as error:
        Standard(Path("t.csv"))({"image": I, "question": Q, "label": A, "solution": A})
    assert str(error.value) == (
        "The columns 'label' and 'solution' of t.csv can both be answer: say which it is with --columns answer=label "
        "(in a config data.columns.answer)."
    )
    fields = Standard(Path("t.csv"), {"answer": "label"})({"image": I, "question": Q, "label": A, "solution": "no"})
    assert fields == {"image": I, "question": Q, "answer": A, "solution": "no"}


def test_columns_that_are_given_switch_shapes_off() -> None:
    record = {"problem": Q, "solution": A, "answer": "no", "image": I}
    assert Standard(Path("t"))(record)["answer"] == "no"
    assert Standard(Path("t"), {"answer": "solution"})(record) == {"question": Q, "answer": A, "image": I}
