"""What judges say of an evaluation, counted by hand.

Run: pytest tests/evaluation/judging/test_judged.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa

from medvqa_rl.evaluation.judging.instrument import judge_request
from medvqa_rl.evaluation.judging.judged import (
    NamedJudges,
    check_bias,
    chosen_records,
    judge_records,
    summarise_agreement,
    summarise_judged,
)
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.rewards.judges import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, REASONING
from tests.records import make_record


def record(index: int, is_right: bool, kind: str = "choice") -> EvalRecord:
    return make_record(
        sample_id=f"q{index}",
        image_key=f"i{index // 2}",
        options=("lung", "brain") if kind == "choice" else (),
        gold="A" if kind == "choice" else "lung",
        think=f"Because of {index}.",
        answer=f"answer {index}",
        is_correct=is_right,
        answer_type=kind,
    )


@dataclass
class Fixed:
    """Gives the grades it is told, by the request's answer; others get the default."""

    scores: Mapping[str, float]
    name: str = "fixed"
    default: float = 1.0
    seen: list[JudgeRequest] = field(default_factory=list)

    @property
    def identity(self) -> JudgeIdentity:
        return JudgeIdentity(self.name, f"weights of {self.name}", "hash", 0.0)

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(len(self.seen))}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.seen += requests
        return [Grade(self.scores.get(request.answer, self.default)) for request in requests]


RIGHT = [True, True, True, False, False, False]
RECORDS = [record(index, right) for index, right in enumerate(RIGHT)] + [record(6, True, "open")]


def judge(reasoning: Sequence[float], correctness: Sequence[float], name: str = "fixed") -> NamedJudges:
    said = [{f"answer {n}": score for n, score in enumerate(scores)} for scores in (reasoning, correctness)]
    return NamedJudges(name, {"reasoning": Fixed(said[0], name), "correctness": Fixed(said[1], name)}, False)


def test_a_judge_is_summarised() -> None:
    nan = math.nan
    judged = judge_records(RECORDS, judge([3, 2, 3, 1, 0, nan, 2], [3, 3, 2, 3, 0, 0, 3]))
    found = summarise_judged(RECORDS, judged)
    reasoning, correctness = found["reasoning"], found["correctness"]
    assert found["judge"]["rubrics"] == {"reasoning": "hash", "correctness": "hash"}
    assert (reasoning["n"], reasoning["unscored"]) == (7, 1)
    assert reasoning["scores"] == {"0": 1, "1": 1, "2": 2, "3": 2}
    assert reasoning["mean"]["estimate"] == pytest.approx(11 / 6)
    assert reasoning["of_right"]["estimate"] == pytest.approx(10 / 4)
    assert reasoning["of_wrong"]["estimate"] == pytest.approx(1 / 2)
    assert correctness["right"]["estimate"] == pytest.approx(4 / 7)
    closed = correctness["against_scorer"]["choice and closed"]
    #      scorer right 1 1 1 0 0 0, judge 1 1 0 1 0 0
    assert closed["n"] == 6 and closed["accuracy"]["estimate"] == pytest.approx(4 / 6)
    assert closed["false_yes_rate"]["estimate"] == pytest.approx(1 / 3)
    assert closed["kappa"]["estimate"] == pytest.approx(1 / 3)
    assert correctness["against_scorer"]["open"]["n"] == 1


def test_two_judges_agree_as_statsmodels_says() -> None:
    first, second = [3, 2, 3, 1, 0, 1, 2], [3, 3, 1, 1, 0, 0, math.nan]
    one = judge_records(RECORDS, judge(first, [3] * 7))
    two = judge_records(RECORDS, judge(second, [3, 3, 0, 0, 0, 3, 3], "other"))
    found = summarise_agreement(RECORDS, one, two)
    table = np.zeros((4, 4))
    np.add.at(table, (first[:6], [int(score) for score in second[:6]]), 1)
    assert found["reasoning"]["n"] == 6
    assert found["reasoning"]["kappa"]["estimate"] == pytest.approx(
        float(reference_kappa(table, wt="quadratic").kappa)
    )
    assert found["reasoning"]["same"]["estimate"] == pytest.approx(3 / 6)
    assert found["correctness"]["same"]["estimate"] == pytest.approx(4 / 7)
    assert math.isnan(found["correctness"]["kappa"]["estimate"]), "one judge always says yes"


def test_missing_verdicts_are_omitted() -> None:
    silent = [replace(one, think=None) for one in RECORDS]
    whole = judge([1] * 7, [3] * 7)
    judged = judge_records(silent, whole)
    found = summarise_judged(silent, judged)
    assert found["reasoning"] is None and found["correctness"]["n"] == 7
    embedded = NamedJudges("e", {"reasoning": Fixed({}, "e")}, True)
    seen = judge_records(RECORDS, embedded)
    assert summarise_judged(RECORDS, seen)["correctness"] is None
    assert list(summarise_agreement(RECORDS, seen, judge_records(RECORDS, whole))) == ["reasoning"]
    bias = check_bias(RECORDS, embedded)
    assert {row["of"] for row in bias["checks"]} == {"reasoning"}
    assert "cannot be checked" in bias["left_out"][0] and any("reworded" in line for line in bias["left_out"])


def test_a_length_bias_of_a_judge_is_detected() -> None:
    @dataclass
    class Wordy(Fixed):
        def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
            return [Grade(3.0 if len(request.reasoning.split()) > 6 else 1.0) for request in requests]

    found = check_bias(RECORDS, NamedJudges("w", {"reasoning": Wordy({}), "correctness": Fixed({})}, False))
    rows = {(row["of"], row["check"]): row for row in found["checks"]}
    assert rows["reasoning", "longer"]["raised"]["estimate"] == 1.0 and rows["reasoning", "longer"]["p"] < 0.05
    assert rows["reasoning", "wrong and confident"]["n"] == 3
    assert rows["correctness", "longer"]["changed"]["estimate"] == 0.0
    assert rows["correctness", "reference and answer exchanged"]["changed"]["estimate"] == 0.0


def test_records_are_chosen_by_their_ids() -> None:
    unscored = replace(RECORDS[0], sample_id="lost", is_correct=None)
    chosen = chosen_records([unscored, *RECORDS], 3, 0)
    assert len(chosen) == 3 and unscored not in chosen
    assert chosen == chosen_records(RECORDS[::-1], 3, 0)[::-1]
    assert {one.sample_id for one in chosen} < {one.sample_id for one in chosen_records(RECORDS, 5, 0)}
    assert len(chosen_records([unscored, *RECORDS], None, 0)) == 7


def test_a_request_contains_the_model_output() -> None:
    shown = judge_request(replace(RECORDS[0], answer=None))
    assert shown == JudgeRequest("Which organ?", ("lung", "brain"), "Because of 0.", answer="", gold="A: lung")
    assert judge_request(RECORDS[6]).gold == "lung"
    described = judge_request(replace(RECORDS[0], description="A chest radiograph."))
    assert "Image: A chest radiograph." in REASONING.render(described)
    assert "chest radiograph" not in CORRECTNESS.render(described)
