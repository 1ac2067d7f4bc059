"""Scoring rules of other harnesses on hand-made answers, with the values that their code, as read, gives.

The harnesses were not run. Their functions, as read, gave the same credit as ours on 200,000 random texts.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.config import EvalConfig
from medvqa_rl.evaluation.measures import lmms_eval, medevalkit
from medvqa_rl.evaluation.measures.harness_texts import Verdict, boxed, tagged
from medvqa_rl.evaluation.measures.protocols import (
    TITLES,
    difference_lines,
    read_protocols,
    score_by,
    summarise_protocol,
)
from medvqa_rl.evaluation.statistics.tables import protocols_table
from tests.records import make_record

OPTIONS = ("left lung", "Right lung", "liver", "spleen")


def answered(text: str) -> str:
    return f"<think>I look.</think><answer>{text}</answer>"


@pytest.mark.parametrize(
    ("gold", "output", "credit", "why"),
    [
        ("yes", answered("Yes."), 1.0, "'yes' occurs in 'yes'."),
        ("no", answered("abnormal"), 1.0, "'no' occurs in 'abnormal' inside a word."),
        ("yes", answered("yes, abnormal"), 0.0, "Both yes and no occur in 'yes, abnormal'."),
        ("yes", answered("present"), 0.0, "Neither yes nor no occurs in 'present'."),
        ("No", r"yes \boxed{no} yes", 1.0, "'no' occurs in 'no'."),
        ("pneumonia", answered("Pneumonia"), 1.0, "'pneumonia' is the gold answer."),
        ("pneumonia", answered("pneumonia."), 0.0, "'pneumonia.' is not 'pneumonia'."),
        ("pneumonia", "The answer is pneumonia", 0.0, "' pneumonia' is not 'pneumonia'."),
        ("pneumonia", answered("the pneumonia"), 0.0, "'the pneumonia' is not 'pneumonia'."),
    ],
)
def test_medevalkit_on_vqa_rad_and_path_vqa(gold: str, output: str, credit: float, why: str) -> None:
    for dataset in ("vqa_rad", "vqa_rad_hub", "path_vqa"):
        assert medevalkit.score(make_record(gold=gold, output=output), dataset) == Verdict(credit, why)


@pytest.mark.parametrize(
    ("gold", "kind", "output", "credit"),
    [
        ("Yes", "closed", answered("Yes"), 1.0),
        ("Yes", "closed", answered("Yes."), 1.0),
        ("Yes", "closed", answered("Yes, it is"), 0.0),  # only "yes" in lower case is looked for inside
        ("yes", "closed", answered("Yes, it is"), 1.0),
        ("Left Lung", "closed", answered("left lung."), 1.0),
        ("Left Lung", "open", answered("left lung"), 1.0),
        ("Left Lung", "open", answered("left lung."), 0.0),
        ("Left Lung", "open", "left lung\n", 0.0),
    ],
)
def test_medevalkit_on_slake(gold: str, kind: Any, output: str, credit: float) -> None:
    assert medevalkit.score(make_record(gold=gold, answer_type=kind, output=output), "slake_en").credit == credit


@pytest.mark.parametrize(
    ("gold", "output", "credit", "why"),
    [
        ("B", "B", 1.0, "'b' is the gold letter."),
        (
            "B",
            "b.\n\nBecause of its shape.",
            1.0,
            None,
        ),  # what stands before the first full stop
        ("B", "It is on the left.\n\nB. Right lung", 1.0, "'b' is the gold letter."),
        ("B", answered("Right lung"), 1.0, "It reads the option 'right lung'."),
        ("B", answered("A"), 0.0, "It reads the letter A."),
        ("B", answered("B: left lung"), 0.0, "'b: left lung' is no option; A is the most similar (0.86)."),
        ("B", answered("the lung on the right"), 0.0, None),
        ("A", answered("12345"), 1.0, "'12345' is no option; A is the most similar (0.00)."),  # a default of A
        ("C", answered("a deliverer"), 1.0, "'a deliverer' is no option; C is the most similar (0.62)."),
    ],
)
def test_medevalkit_on_choices(gold: str, output: str, credit: float, why: str | None) -> None:
    verdict = medevalkit.score(make_record(gold=gold, options=OPTIONS, output=output), "pmc_vqa")
    assert verdict.credit == credit and why in (None, verdict.why)


def test_medevalkit_compares_options_with_their_letters_in_two_sets() -> None:
    record = make_record(gold="B", options=OPTIONS, output=answered("B. Right lung"))
    assert medevalkit.score(record, "omnimed").credit == 1.0
    text = make_record(gold="B", options=("no", "pneumonia"), output=answered("pneumonia"))
    assert medevalkit.score(text, "medxpertqa").why == "'pneumonia' is no option; B is the most similar (0.86)."
    assert medevalkit.score(text, "pmc_vqa").why == "It reads the option 'pneumonia'."


@pytest.mark.parametrize(
    ("output", "medevalkit_credit", "lmms_credit", "why"),
    [
        ("(B)", 1.0, 1.0, "It reads B; the gold letter is B."),
        ("B.", 1.0, 1.0, "It reads B; the gold letter is B."),
        ("A or B", 1.0, 1.0, "It reads B, the last of A, B; the gold letter is B."),
        ("B or A", 0.0, 0.0, "It reads A, the last of A, B; the gold letter is B."),
        ("I choose B.because", 0.25, 1.0, "It reads B; the gold letter is B."),
        ("No DNA in it", 0.25, 0.0, "It reads A; the gold letter is B."),  # the A that ends "DNA"
        ("it is the right lung of the patient", 1.0, 1.0, "It reads B; the gold letter is B."),
        ("right lung", 0.25, 0.25, "No option is found in 'right lung': one of 4 is drawn."),  # too short
    ],
)
def test_both_on_choices_of_mmmu(output: str, medevalkit_credit: float, lmms_credit: float, why: str) -> None:
    record = make_record(gold="B", options=OPTIONS, output=output)
    assert medevalkit.score(record, "mmmu_medical").credit == medevalkit_credit
    assert lmms_eval.score(record, "mmmu_medical") == Verdict(lmms_credit, why)


@pytest.mark.parametrize(
    ("golds", "answer", "credit"),
    [
        (("24/7",), "it is 24/7", 1.0),
        (("heart",), "So the answer is the heartburn", 1.0),  # inside a word
        (("1000",), "about 1,000 cells", 1.0),
        (("3.14",), "= 3.1415", 1.0),  # to two decimals
        (("3.14",), "3.2", 0.0),
        (("a",), "apple", 0.0),  # a single letter needs a blank beside it
        (("a",), "an apple", 1.0),
        (("a",), "that is a cell", 1.0),
        (("liver", "spleen"), "the spleen", 1.0),
        (("liver",), "it is the spleen, not the liver, so spleen", 0.0),  # the shortest tail: after "so"
    ],
)
def test_open_answers_of_mmmu(golds: tuple[str, ...], answer: str, credit: float) -> None:
    record = make_record(gold=golds[0], alternatives=golds[1:], answer_type="open", output=answer)
    assert lmms_eval.score(record, "mmmu_medical").credit == credit
    assert medevalkit.score(record, "mmmu_medical").credit == 0.0, "it compares single characters"


@pytest.mark.parametrize(
    ("gold", "answer", "credit"),
    [
        ("Yes", "true", 1.0),
        ("CT", "ct (computed tomography)", 1.0),
        ("X-Ray", "xray", 1.0),
        ("Left Lung, Right", "left lung right", 1.0),
        ("Left Lung, Right Lung", "Right Lung, Left Lung", 0.0),
        ("Left Lung", "the left lung", 0.0),
        ("是", "正常", 1.0),  # normal is yes
        ("异常", "没有", 1.0),  # abnormal is none
        ("胸腔（肺部）", "胸腔。", 1.0),
    ],
)
def test_lmms_eval_on_slake(gold: str, answer: str, credit: float) -> None:
    for record in (make_record(gold=gold, output=answer), make_record(gold=gold, output="long", answer=answer)):
        assert lmms_eval.score(record, "slake_zh").credit == credit


def test_sets_without_a_task_have_no_rule() -> None:
    record = make_record(output="yes")
    assert medevalkit.score(record, "vqa_med") == Verdict(None, "MedEvalKit has no task for vqa_med.")
    assert lmms_eval.score(record, "vqa_rad") == Verdict(None, "lmms-eval has no task for vqa_rad.")
    assert lmms_eval.score(record, "pmc_vqa").credit is None
    assert score_by("lmms_eval", make_record(output="yes", dataset="own/ours/test")).credit == 1.0


def test_how_answers_are_cut_out() -> None:
    assert tagged("<answer>a<answer>b</answer> c <answer>d</answer>", "answer") == "a<answer>b d"
    assert tagged("<answer> </answer>", "answer") == "<answer> </answer>" and tagged("x", "answer") == "x"
    assert boxed(r"\boxed{a} \boxed{ b{c} } d") == "b{c}" and boxed(r"\boxed{a") is None and boxed("a}") is None
    assert medevalkit.cut("**Answer**: The final answer is B") == " b" and medevalkit.cut("boxed") == "None"


@given(st.text(), st.sampled_from(("vqa_rad", "slake_zh", "pmc_vqa", "omnimed", "mmmu_medical", "own")))
def test_any_output_has_a_verdict(text: str, dataset: str) -> None:
    for record in (
        make_record(output=text, gold="yes"),
        make_record(output=text, gold="A", options=OPTIONS),
        make_record(output=text, gold="x", answer_type="open"),
    ):
        for protocol in TITLES:
            verdict = score_by(protocol, make_record(**{**record.__dict__, "dataset": f"{dataset}/test"}))
            assert verdict.credit is None or 0 <= verdict.credit <= 1
            assert verdict.why.endswith(".")


def records() -> list[Any]:
    """Five scored questions and one unscored: MedEvalKit's rules for own data find 1, 0, 1 and 1 right, lmms-eval's 0,
    0, 1 and one of four."""
    made = [
        {"gold": "no", "output": answered("abnormal"), "answer": "abnormal", "is_correct": False},
        {"gold": "lung", "output": answered("lung."), "answer": "lung.", "is_correct": True, "answer_type": "open"},
        {"gold": "yes", "output": answered("yes"), "answer": "yes", "is_correct": True},
        {"gold": "A", "output": answered("12"), "answer": "12", "is_correct": False, "options": OPTIONS},
        {"gold": "yes", "is_correct": None, "unscored_reason": "image"},
    ]
    return [
        make_record(sample_id=f"q{number}", image_key=f"image{number}", dataset="own/ours/test", why="Ours.", **one)
        for number, one in enumerate(made)
    ]


def test_the_summary_counts_and_lists_the_differences() -> None:
    summary, different = summarise_protocol("medevalkit", records(), EvalConfig(bootstrap=100))
    assert summary["accuracy"] == 3 / 4 and summary["ours"] == 2 / 4 and summary["num_scored"] == 4
    assert 0 <= summary["accuracy_low"] < 3 / 4 < summary["accuracy_high"] <= 1
    assert [(row["sample_id"], row["ours"], row["theirs"]) for row in different] == [
        ("q0", "wrong", "right"),
        ("q1", "right", "wrong"),
        ("q3", "wrong", "right"),
    ]
    assert different[1]["why"] == "'lung.' is not 'lung'." and different[1]["our_why"] == "Ours."
    assert [json.loads(line) for line in difference_lines(different).splitlines()] == different
    assert summary["num_different"] == 3 and all("MedEvalKit@" in source for source in summary["sources"])


def test_a_choice_at_random_counts_with_its_expectation() -> None:
    summary, different = summarise_protocol("lmms_eval", records(), EvalConfig(bootstrap=100))
    assert summary["accuracy"] == (0 + 1 + 1 + 0.25) / 4
    assert [(row["sample_id"], row["theirs"]) for row in different] == [("q3", "0.25 expected")]


def test_questions_without_a_rule_are_left_out_and_named() -> None:
    asked = [make_record(sample_id="a", dataset="vqa_rad/official/test", output="yes", is_correct=True)]
    summary, different = summarise_protocol("lmms_eval", asked, EvalConfig())
    assert summary["num_scored"] == 0 and summary["accuracy"] != summary["accuracy"] and not different
    assert summary["no_rule"] == {"lmms-eval has no task for vqa_rad.": 1}
    table = protocols_table({"protocols": {"lmms_eval": summary}})
    assert table.notes == ["1 question without a rule: lmms-eval has no task for vqa_rad."]


def test_names_are_read_or_refused() -> None:
    assert read_protocols("lmms_eval, medevalkit") == ("medevalkit", "lmms_eval")
    with pytest.raises(ValueError, match="--protocol has 'vlmevalkit', but must be medevalkit or lmms_eval"):
        read_protocols("medevalkit,vlmevalkit")
