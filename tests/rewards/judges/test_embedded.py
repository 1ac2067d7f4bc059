"""Grades of reasoning from a judge that can only say Yes or No.

Run: pytest tests/rewards/judges/test_embedded.py
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from medvqa_rl.config import JudgeConfig
from medvqa_rl.rewards.judges.embedded import EmbeddedJudge, conclusion
from medvqa_rl.rewards.judges.load import load_judges
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import CORRECTNESS, REASONING


class Coherence:
    """Yes to what holds "sound", failed at "broken"."""

    identity = JudgeIdentity("j", "w", "p", 0.0)
    counters: Mapping[str, float] = {"asked": 1.0}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        return [
            Grade.failed("down") if "broken" in request.reasoning else Grade(float("sound" in request.reasoning))
            for request in requests
        ]


@pytest.mark.parametrize(
    ("reasoning", "answer", "score"),
    [
        ("A sound look. So the answer is lung.", "A", 3),
        ("A sound look. So the answer is lung A.", "A: lung", 3),
        ("A sound look. So the answer is A.", "lung", 3),
        ("A sound look. The answer is: (A)", "A", 3),
        ("So the answer is brain. A sound second look. So the answer is lung.", "A", 3),
        ("A sound look.", "A", 2),
        ("A sound look.", "", 2),
        ("A sound look. So the answer is brain.", "A", 1),
        ("A sound look. So the answer is lung B.", "A", 1),
        ("A sound look. So the answer is lung or brain.", "A", 1),
        ("A sound look. So the answer is lung.", "", 1),
        ("A sound look. So the answer is lung.", "C", 1),
        ("Odd. So the answer is lung.", "A", 1),
        ("Odd.", "A", 0),
        ("Odd. So the answer is brain.", "A", 0),
        ("", "A", 0),
    ],
)
def test_scores_of_the_embedded_grader(reasoning: str, answer: str, score: int) -> None:
    """Three: coherent and concluding with the answer given. Two: coherent, no conclusion. One: one of both, with
    another conclusion or without coherence. Zero: neither. Whether the answer is right makes no difference."""
    for gold in ("A: lung", "B: brain"):
        (grade,) = EmbeddedJudge(Coherence()).grade(
            [JudgeRequest("?", ("lung", "brain"), reasoning, answer=answer, gold=gold)]
        )
        assert grade.score == score and grade.reason


@pytest.mark.parametrize(
    ("found", "answer", "score"),
    [("no", "No.", 3), ("no", "yes", 1), ("2", "two", 3), ("2.5 cm", "2.5 cm", 3), ("no", "", 1), ("no", "not", 1)],
)
def test_without_options_the_conclusion_is_compared_by_its_words(found: str, answer: str, score: int) -> None:
    (grade,) = EmbeddedJudge(Coherence()).grade(
        [JudgeRequest("?", (), f"sound. The answer is {found}.", answer=answer, gold="x")]
    )
    assert grade.score == score


def test_the_grade_fails_if_the_coherence_judge_fails() -> None:
    judge = EmbeddedJudge(Coherence())
    assert math.isnan(judge.grade([JudgeRequest("?", (), "broken", answer="x", gold="x")])[0].score)
    assert judge.identity.name == "j" and judge.identity.prompt_hash != "p"


def test_the_last_conclusion_counts_to_the_end_of_its_sentence() -> None:
    assert conclusion("The answer is no. Or: the answer is upper left. Done.") == "upper left"
    assert conclusion("It is a lung.") is None


def test_the_embedded_judge_grades_the_worlds_reasoning() -> None:
    from medvqa_rl.data.phantom.questions import draw_sample

    judge = load_judges(JudgeConfig(cache=False, device="cpu"), [REASONING])["reasoning"]
    samples = [draw_sample(seed=5, split="graded", index=index) for index in range(40)]
    requests = [JudgeRequest(s.question, s.options, s.reasoning, answer=s.answer, gold=s.answer_text) for s in samples]
    scores = Counter(grade.score for grade in judge.grade(requests))
    assert scores[3.0] >= 25, scores
    wrong = [
        replace(request, answer="B" if request.answer == "A" else "A" if request.options else "nothing")
        for request in requests
    ]
    assert all(grade.score < 3 for grade in judge.grade(wrong))
    with pytest.raises(ValueError, match=r"only judges reasoning, so it cannot grade correctness: set judge\.model"):
        load_judges(JudgeConfig(cache=False, device="cpu"), [CORRECTNESS])
