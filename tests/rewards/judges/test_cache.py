"""Verdicts on disk: kept by identity, shared by processes, whole after a kill.

Run: pytest tests/rewards/judges/test_cache.py
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medvqa_rl.rewards.judges.cache import CachedJudge, read_line, request_hash, write_line
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import COHERENCE, CORRECTNESS, REASONING


class Counting:
    """Says Yes to even numbers, No to odd ones and fails at 13; counts what it is asked."""

    def __init__(self, identity: JudgeIdentity = JudgeIdentity("j", "w", "p", 0.0)) -> None:
        self.identity = identity
        self.asked: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(self.asked.total()), "failed": 0.0}

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.asked.update(request.reasoning for request in requests)
        numbers = [int(request.reasoning) for request in requests]
        return [Grade.failed("13") if n == 13 else Grade(float(n % 2 == 0), margin=n + 0.25) for n in numbers]


def ask(*numbers: int) -> list[JudgeRequest]:
    return [JudgeRequest("Q?", (), str(number)) for number in numbers]


def test_no_request_is_sent_twice(tmp_path: Path) -> None:
    first = Counting()
    judge = CachedJudge(first, COHERENCE, tmp_path)
    assert [verdict.score for verdict in judge.grade(ask(1, 2, 2, 1))] == [0, 1, 1, 0]
    judge.grade(ask(2, 3))
    assert first.asked == Counter("123")
    assert judge.counters == {"asked": 6, "failed": 0, "cached": 3}
    second = Counting()
    again = CachedJudge(second, COHERENCE, tmp_path).grade(ask(3, 2, 4))
    assert [(verdict.score, verdict.margin) for verdict in again] == [(0, 3.25), (1, 2.25), (1, 4.25)]
    assert second.asked == Counter("4")


def test_failed_verdicts_are_retried(tmp_path: Path) -> None:
    counting = Counting()
    judge = CachedJudge(counting, COHERENCE, tmp_path)
    for _ in range(2):
        found = judge.grade(ask(13, 13, 2))
        assert math.isnan(found[0].score) and found[0].reason == "13" and found[2].score == 1
    assert counting.asked == Counter({"13": 2, "2": 1})
    lines = [line for path in tmp_path.rglob("verdicts-*") for line in path.read_text().splitlines()]
    assert [line[2:66] for line in lines] == [request_hash(*ask(2), COHERENCE)]


@pytest.mark.parametrize("change", [{"name": "k"}, {"fingerprint": "v"}, {"prompt_hash": "q"}, {"strictness": 1.0}])
def test_another_judge_has_another_cache(tmp_path: Path, change: dict[str, str | float]) -> None:
    CachedJudge(Counting(), COHERENCE, tmp_path).grade(ask(1))
    other = Counting(dataclasses.replace(JudgeIdentity("j", "w", "p", 0.0), **change))  # type: ignore[arg-type]
    CachedJudge(other, COHERENCE, tmp_path).grade(ask(1))
    assert other.asked == Counter("1")
    assert len(list(tmp_path.glob("*/identity.json"))) == 2


def test_every_part_of_a_request_counts() -> None:
    requests = [
        JudgeRequest("a", (), "b"),
        JudgeRequest("b", (), "a"),
        JudgeRequest("a", ("b",), ""),
        JudgeRequest("a", ("", "b"), ""),
        JudgeRequest("a", (), "b "),
    ]
    assert len({request_hash(request, COHERENCE) for request in requests}) == 5


def test_truncated_and_invalid_lines_are_skipped(tmp_path: Path) -> None:
    CachedJudge(Counting(), COHERENCE, tmp_path).grade(ask(1, 2, 4))
    (path,) = tmp_path.rglob("verdicts-*.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0]) + len(lines[1]) + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        counting = Counting()
        assert [v.score for v in CachedJudge(counting, COHERENCE, tmp_path).grade(ask(1, 2, 4))] == [0, 1, 1]
        assert counting.asked == Counter("4")
        for extra in tmp_path.rglob("verdicts-*.jsonl"):
            extra.unlink() if extra != path else None


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import Counting, ask
from medvqa_rl.rewards.judges.cache import CachedJudge
from medvqa_rl.rewards.judges.rubric import COHERENCE
judge = CachedJudge(Counting(), COHERENCE, Path({folder!r}))
start = int(sys.argv[1])
for number in range(start, start + 4000):
    judge.grade(ask(2 * number, 2 * number + 1))
    print(number, flush=True)
"""


def test_processes_share_a_folder_and_may_be_killed(tmp_path: Path) -> None:
    code = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen([*command, str(start)], stdout=subprocess.PIPE, text=True) for start in (1000, 1000, 3000)
    ]
    done: list[int] = []
    for process in running:
        assert process.stdout is not None
        for _ in range(20):
            done.append(int(process.stdout.readline()))
    time.sleep(0.05)
    for process in running:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    judge = CachedJudge(counting := Counting(), COHERENCE, tmp_path)
    numbers = [number for index in set(done) for number in (2 * index, 2 * index + 1)]
    assert [verdict.score for verdict in judge.grade(ask(*numbers))] == [float(n % 2 == 0) for n in numbers]
    assert not counting.asked, "what was answered before the kill is on disk"


CASE = JudgeRequest(
    "Which organ?", ("lung", "brain"), "Dark fields. So the answer is lung.", "B", "A: lung", "A film."
)


class Lengths:
    """Grades by the length of the reasoning modulo 4, fails at 13; counts what it is asked."""

    counters: Mapping[str, float] = {"failed": 0.0}

    def __init__(self, rubric: str = "r") -> None:
        self.identity = JudgeIdentity("j", "w", rubric, 0.0)
        self.asked: list[JudgeRequest] = []

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        self.asked += requests
        sizes = [len(request.reasoning) for request in requests]
        return [Grade.failed("13") if size == 13 else Grade(float(size % 4), f"{size} letters") for size in sizes]


def test_grades_are_cached_with_their_reasons(tmp_path: Path) -> None:
    first = Lengths()
    cached = CachedJudge(first, REASONING, tmp_path)
    cases = [dataclasses.replace(CASE, reasoning="x" * size) for size in (1, 2, 2, 13)]
    for _ in range(2):
        assert [grade.score for grade in cached.grade(cases)] == pytest.approx([1, 2, 2, math.nan], nan_ok=True)
    assert [len(request.reasoning) for request in first.asked] == [1, 2, 13, 13], "failed grades are asked again"
    assert cached.counters == {"failed": 0, "asked": 8, "cached": 4}
    again = Lengths()
    found = CachedJudge(again, REASONING, tmp_path).grade(cases[:2])
    assert [(grade.score, grade.reason) for grade in found] == [(1.0, "1 letters"), (2.0, "2 letters")]
    assert not again.asked
    CachedJudge(other := Lengths("another rubric"), REASONING, tmp_path).grade(cases[:1])
    assert len(other.asked) == 1


def test_a_request_is_identified_by_what_its_rubric_shows() -> None:
    changes: list[dict[str, object]] = [
        {"question": "?"},
        {"options": ()},
        {"gold": "B"},
        {"answer": "A"},
        {"reasoning": ""},
        {"description": ""},
    ]
    changed = [CASE, *(dataclasses.replace(CASE, **change) for change in changes)]  # type: ignore[arg-type]
    for rubric, count in ((COHERENCE, 4), (REASONING, 7), (CORRECTNESS, 5)):
        assert len({request_hash(request, rubric) for request in changed}) == count


def test_caches_of_earlier_versions_are_read(tmp_path: Path) -> None:
    request = JudgeRequest("Q?", ("a", "b"), "x", "B", "A: a", "A film.")
    assert request_hash(request, COHERENCE) == ("2088c9ab1d1699522b7259ba39ea709b404b93d06cb8c160db5c6cfdd787a0bf")
    assert request_hash(request, REASONING) == ("d97dde6340cad320d80f99af575bdc0c5b2be2ee00ee706e2a5c0433abae2ea6")
    assert read_line('["%s", 1, 2.5]' % ("a" * 64), 1) == ("a" * 64, Grade(1.0, margin=2.5))
    found = read_line('["%s", 0, null]' % ("a" * 64), 1)
    assert found is not None and found[1].score == 0 and math.isnan(found[1].margin)
    assert read_line('["%s", 2, "Sound."]' % ("a" * 64), 3) is not None
    assert read_line('["%s", 2, 0.5]' % ("a" * 64), 1) is None, "beyond the levels of the rubric"


@given(st.text(max_size=60))
def test_any_line_is_a_grade_or_skipped(line: str) -> None:
    found = read_line(line, 3)
    assert found is None or found[1].score in (0, 1, 2, 3)


@given(st.integers(0, 3), st.text(), st.floats(allow_nan=True, allow_infinity=False))
def test_lines_read_back(score: int, reason: str, margin: float) -> None:
    key = "a" * 64
    for grade in (Grade(float(score), reason), Grade(float(score), margin=margin)):
        found = read_line(write_line(key, grade), 3)
        assert found is not None and found[0] == key and found[1].score == score
        assert found[1].reason == grade.reason
        assert found[1].margin == grade.margin or (math.isnan(grade.margin) and math.isnan(found[1].margin))
