"""Edits that must not move a judge, by table and by the phantom oracle, and what is said where they do.

Run: pytest tests/evaluation/judging/test_judge_bias.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from medvqa_rl.core.answers import is_correct
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import Sample
from medvqa_rl.data.phantom.claims import is_coherent
from medvqa_rl.data.phantom.reasonings import draw_reasoning
from medvqa_rl.evaluation.judging import judge_bias as bias
from medvqa_rl.evaluation.judging.instrument import judge_request
from medvqa_rl.evaluation.judging.judge_bias import CHECKS, EMBEDDED_CHECKS, Check, build_cases, moved
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.rewards.judges import Grade, JudgeRequest
from tests.records import make_record

OPTIONS = ("lung", "brain", "liver")
CHOICE = JudgeRequest(
    "Which organ?", OPTIONS, "There is a mass. Therefore it is the brain.", answer="B", gold="A: lung"
)
OPEN = JudgeRequest("What is seen?", (), "The image shows a mass.", answer="mass", gold="a mass")


REVERSED = {"options": OPTIONS[::-1], "gold": "C: lung", "answer": "C"}


def draws() -> Draws:
    return Draws("test", 0)


def record(index: int = 0, is_right: bool = False) -> EvalRecord:
    return make_record(
        sample_id=f"q{index}",
        image_key=f"i{index}",
        options=OPTIONS,
        gold="A",
        think="There is a mass. Therefore it is the brain.",
        answer="A" if is_right else "B",
        is_correct=is_right,
    )


@pytest.mark.parametrize(
    ("edit", "case", "expected"),
    [
        (bias.reworded_answer, CHOICE, {"answer": "brain"}),
        (bias.reworded_answer, replace(CHOICE, answer="Brain."), {"answer": "B"}),
        (bias.exchanged, replace(CHOICE, answer="B: brain"), {"gold": "B: brain", "answer": "A: lung"}),
        (bias.exchanged, OPEN, {"gold": "mass", "answer": "a mass"}),
        (bias.reordered_options, CHOICE, {"options": OPTIONS[::-1], "gold": "C: lung", "answer": "B"}),
        (bias.reordered_options, replace(CHOICE, answer="lung"), REVERSED),
        (bias.reworded_reasoning, CHOICE, {"reasoning": "One can see a mass. Hence it is the brain."}),
        (bias.reworded_reasoning, OPEN, {"reasoning": "The image displays a mass."}),
    ],
)  # fmt: skip
def test_edits_by_hand(edit: bias.Edit, case: JudgeRequest, expected: dict[str, object]) -> None:
    assert edit(case, draws()) == replace(case, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "case"),
    [
        (bias.longer("reasoning", 3), replace(OPEN, reasoning=" ")),
        (bias.longer("correctness", 2), replace(OPEN, answer="")),
        (bias.reworded_answer, replace(OPEN, answer="")),
        (bias.confident("correctness"), replace(OPEN, answer=" ")),
        (bias.exchanged, replace(OPEN, answer="")),
        (bias.reordered_options, OPEN),
        (bias.reordered_options, replace(CHOICE, answer="spleen")),
        (bias.reworded_reasoning, replace(OPEN, reasoning="A mass.")),
        (bias.phantom_longer, replace(OPEN, reasoning="The image is sharp. The view is complete. The organ is lung.")),
        (bias.phantom_reworded, replace(OPEN, reasoning="The organ is lung. So the answer is lung.")),
        (bias.phantom_reworded, replace(OPEN, reasoning="A. B. C.")),
    ],
)
def test_edits_that_do_not_apply(edit: bias.Edit, case: JudgeRequest) -> None:
    assert edit(case, draws()) is None


@given(st.sampled_from(["A", "B", "C", "brain", "B: brain", "(c)"]), st.integers(0, 2**32))
def test_edits_of_an_option_preserve_its_meaning(answer: str, seed: int) -> None:
    """The scorer, which knows nothing of edits, finds the same right and wrong answers."""
    case = replace(CHOICE, answer=answer)
    sample = Sample("q", case.question, "A", "choice", options=OPTIONS)
    for edit in (bias.reworded_answer, bias.reordered_options):
        other = edit(case, Draws("test", seed))
        assert other is not None
        gold = replace(sample, answer=other.gold[0], options=other.options)
        assert is_correct(gold, other.answer) == is_correct(sample, answer)


def test_edits_for_the_embedded_judges_preserve_the_oracle_label() -> None:
    count = {check.name: 0 for check in EMBEDDED_CHECKS}
    for index in range(300):
        drawn = draw_reasoning(5, "test", index)
        case = JudgeRequest(drawn.sample.question, drawn.sample.options, drawn.text, answer="", gold="")
        for check in EMBEDDED_CHECKS[:2]:
            other = check.edit(case, Draws("test", index))
            if other is not None:
                count[check.name] += 1
                assert other.reasoning != case.reasoning
                assert is_coherent(other.reasoning) == drawn.is_coherent, (check.name, drawn.text, other.reasoning)
    assert min(count["longer"], count["reworded"]) > 100


def test_wrong_and_confident_asks_about_wrong_answers_only_and_edits_are_addressed() -> None:
    cases = [(one, judge_request(one)) for one in (record(0), record(1, True), record(2))]
    for check in (*CHECKS, *EMBEDDED_CHECKS):
        plain, edited, clusters = build_cases(check, cases, 0)
        assert len(plain) == len(edited) == len(clusters)
        assert set(clusters) <= ({"i0", "i2"} if check.only_wrong else {"i0", "i1", "i2"})
        assert build_cases(check, cases[2:], 0)[1] == edited[-1:], "what is drawn depends on the question alone"
    longer = CHECKS[0]
    seeds = {build_cases(longer, cases, seed)[1][0].reasoning for seed in range(5)}
    assert len(seeds) > 1 and all(text.endswith(str(record().think)) for text in seeds)
    plain, edited, _ = build_cases(CHECKS[6], cases, 0)
    assert plain[0].answer == "B: brain" and edited[0].answer == "A: lung", "neither place is told by its form"


def grades(scores: str) -> list[Grade]:
    return [Grade.failed("?") if score == "?" else Grade(float(score)) for score in scores]


def test_the_effect_of_an_edit_by_hand() -> None:
    check = Check("longer", "reasoning", bias.longer("reasoning", 3))
    found = moved(check, grades("00112233?1"), grades("12112230?3"), [f"i{n}" for n in range(10)])
    assert (found["n"], found["unscored"], found["images"]) == (10, 1, 9)
    assert found["changed"]["estimate"] == pytest.approx(4 / 9)
    assert found["raised"]["estimate"] == pytest.approx(3 / 9) and found["lowered"]["estimate"] == pytest.approx(1 / 9)
    assert found["shift"]["estimate"] == pytest.approx((1 + 2 - 3 + 2) / 9)
    assert found["p"] == pytest.approx(binomtest(3, 4).pvalue)
    for name in ("changed", "raised", "lowered", "shift"):
        assert found[name]["low"] <= found[name]["estimate"] <= found[name]["high"]


def test_answers_are_compared_as_yes_and_no() -> None:
    check = Check("longer", "correctness", bias.longer("correctness", 2))
    found = moved(check, grades("0233"), grades("2332"), list("abcd"))
    assert found["changed"]["estimate"] == 0.5 and found["raised"]["estimate"] == found["lowered"]["estimate"] == 0.25
    nothing = moved(check, grades("??"), grades("3?"), list("ab"))
    assert nothing["unscored"] == 2 and nothing["changed"] is None and nothing["p"] is None
    assert math.isnan(bias.level(Grade.failed("?"), "correctness"))
