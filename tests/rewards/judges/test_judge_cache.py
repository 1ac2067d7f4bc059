"""Verdicts on disk: kept by identity, shared by processes, whole after a kill.

Run: pytest tests/rewards/judges/test_judge_cache.py
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

from medvqa_rl.rewards.judges.cache import CachedJudge, read_verdict, request_hash, write_verdict
from medvqa_rl.rewards.judges.protocol import JudgeIdentity, JudgeRequest, Verdict


class Counting:
    """Says Yes to even numbers, No to odd ones and fails at 13; counts what it is asked."""

    def __init__(self, identity: JudgeIdentity = JudgeIdentity("j", "w", "p", 0.0)) -> None:
        self.identity = identity
        self.asked: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, float]:
        return {"asked": float(self.asked.total()), "failed": 0.0}

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        self.asked.update(request.reasoning for request in requests)
        numbers = [int(request.reasoning) for request in requests]
        return [Verdict.failed("13") if n == 13 else Verdict(float(n % 2 == 0), n + 0.25) for n in numbers]


def ask(*numbers: int) -> list[JudgeRequest]:
    return [JudgeRequest("Q?", (), str(number)) for number in numbers]


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    first = Counting()
    judge = CachedJudge(first, tmp_path)
    assert [verdict.value for verdict in judge.judge(ask(1, 2, 2, 1))] == [0, 1, 1, 0]
    judge.judge(ask(2, 3))
    assert first.asked == Counter("123")
    assert judge.counters == {"asked": 6, "failed": 0, "cached": 3}
    second = Counting()
    again = CachedJudge(second, tmp_path).judge(ask(3, 2, 4))
    assert [(verdict.value, verdict.margin) for verdict in again] == [(0, 3.25), (1, 2.25), (1, 4.25)]
    assert second.asked == Counter("4")


def test_failed_verdicts_are_asked_again(tmp_path: Path) -> None:
    counting = Counting()
    judge = CachedJudge(counting, tmp_path)
    for _ in range(2):
        found = judge.judge(ask(13, 13, 2))
        assert math.isnan(found[0].value) and found[0].reason == "13" and found[2].value == 1
    assert counting.asked == Counter({"13": 2, "2": 1})
    lines = [line for path in tmp_path.rglob("verdicts-*") for line in path.read_text().splitlines()]
    assert [line[2:66] for line in lines] == [request_hash(*ask(2))]


@pytest.mark.parametrize("change", [{"name": "k"}, {"fingerprint": "v"}, {"prompt_hash": "q"}, {"strictness": 1.0}])
def test_another_judge_has_another_cache(tmp_path: Path, change: dict[str, str | float]) -> None:
    CachedJudge(Counting(), tmp_path).judge(ask(1))
    other = Counting(dataclasses.replace(JudgeIdentity("j", "w", "p", 0.0), **change))  # type: ignore[arg-type]
    CachedJudge(other, tmp_path).judge(ask(1))
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
    assert len({request_hash(request) for request in requests}) == 5


def test_half_a_line_and_rubbish_are_skipped(tmp_path: Path) -> None:
    CachedJudge(Counting(), tmp_path).judge(ask(1, 2, 4))
    (path,) = tmp_path.rglob("verdicts-*.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[0]) + len(lines[1]) + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        counting = Counting()
        assert [v.value for v in CachedJudge(counting, tmp_path).judge(ask(1, 2, 4))] == [0, 1, 1]
        assert counting.asked == Counter("4")
        for extra in tmp_path.rglob("verdicts-*.jsonl"):
            extra.unlink() if extra != path else None


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_judge_cache import Counting, ask
from medvqa_rl.rewards.judges.cache import CachedJudge
judge = CachedJudge(Counting(), Path({folder!r}))
start = int(sys.argv[1])
for number in range(start, start + 4000):
    judge.judge(ask(2 * number, 2 * number + 1))
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
    judge = CachedJudge(counting := Counting(), tmp_path)
    numbers = [number for index in set(done) for number in (2 * index, 2 * index + 1)]
    assert [verdict.value for verdict in judge.judge(ask(*numbers))] == [float(n % 2 == 0) for n in numbers]
    assert not counting.asked, "what was answered before the kill is on disk"


@given(st.text(max_size=60))
def test_any_line_is_a_verdict_or_skipped(line: str) -> None:
    found = read_verdict(line)
    assert found is None or found[1].value in (0.0, 1.0)


@given(st.sampled_from([0.0, 1.0]), st.floats(allow_nan=True, allow_infinity=False))
def test_lines_read_back(value: float, margin: float) -> None:
    key = "a" * 64
    found = read_verdict(write_verdict(key, Verdict(value, margin)))
    assert found is not None and found[0] == key and found[1].value == value
    assert found[1].margin == margin or (math.isnan(margin) and math.isnan(found[1].margin))
