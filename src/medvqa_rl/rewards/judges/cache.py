"""Verdicts and grades on disk, so that no text is judged twice: not by a resumed run, nor by the next one. No torch.

One folder per judge identity (name, weights, prompt or rubric, strictness), in it one file per process, to which only
that process appends: no locks, and no two writers of a file, on network file systems too. A line that a killed process
left half written does not parse and is skipped. What failed is never written. Files hold hashes of texts, not texts;
beside a grade stands the grader's sentence.

```text
judges/3f2a.../identity.json
judges/3f2a.../verdicts-<host>-<process>-<random>.jsonl     ["sha256 of the text", 1, 2.31]
judges/90c1.../verdicts-<host>-<process>-<random>.jsonl     ["sha256 of the text", 2, "Sound, but ..."]
```
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from medvqa_rl.rewards.judges.protocol import Judge, JudgeIdentity, JudgeRequest, Verdict
from medvqa_rl.rewards.judges.rubric import TOP, Grade, Grader, GradeRequest


def request_hash(request: JudgeRequest | GradeRequest) -> str:
    """SHA-256 of everything that a judge is shown."""
    return hashlib.sha256(json.dumps(astuple(request)).encode()).hexdigest()


def read_verdict(line: str) -> tuple[str, Verdict] | None:
    """A line of a cache file; None for one that is damaged."""
    try:
        key, value, margin = json.loads(line)
    except (ValueError, TypeError):
        return None
    is_sound = isinstance(key, str) and len(key) == 64 and value in (0, 1) and not isinstance(value, bool)
    if not is_sound or not (margin is None or isinstance(margin, int | float)):
        return None
    return key, Verdict(float(value), math.nan if margin is None else float(margin))


def write_verdict(key: str, verdict: Verdict) -> str:
    """The line that :func:`read_verdict` reads back."""
    margin = None if math.isnan(verdict.margin) else verdict.margin
    return json.dumps([key, int(verdict.value), margin]) + "\n"


def read_grade(line: str) -> tuple[str, Grade] | None:
    """A line of a cache file; None for one that is damaged."""
    try:
        key, score, reason = json.loads(line)
    except (ValueError, TypeError):
        return None
    is_sound = isinstance(key, str) and len(key) == 64 and type(score) is int and 0 <= score <= TOP
    return (key, Grade(float(score), reason)) if is_sound and isinstance(reason, str) else None


def write_grade(key: str, grade: Grade) -> str:
    """The line that :func:`read_grade` reads back."""
    return json.dumps([key, int(grade.score), grade.reason]) + "\n"


class _Valued(Protocol):
    @property
    def value(self) -> float: ...


R = TypeVar("R", JudgeRequest, GradeRequest)
V = TypeVar("V", bound=_Valued)


class _Kept(Generic[R, V]):
    """What one judge has said."""

    def __init__(
        self,
        identity: JudgeIdentity,
        folder: Path,
        read: Callable[[str], tuple[str, V] | None],
        write: Callable[[str, V], str],
    ) -> None:
        self._write = write
        self._folder = folder / identity.key
        self._folder.mkdir(parents=True, exist_ok=True)
        note = self._folder / "identity.json"
        if not note.exists():
            partial = note.with_name(f".identity.{os.getpid()}.{secrets.token_hex(4)}")
            partial.write_text(json.dumps(identity.to_json(), indent=2) + "\n", encoding="utf-8")
            os.replace(partial, note)
        self._known: dict[str, V] = {}
        for path in sorted(self._folder.glob("verdicts-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if (found := read(line)) is not None:
                    self._known[found[0]] = found[1]
        # Unique even where a process forks, and where hosts share names.
        self._own = self._folder / f"verdicts-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self.counts: Counter[str] = Counter()
        """``asked`` counts all requests, ``cached`` those that were known."""

    def ask(self, requests: Sequence[R], judge: Callable[[Sequence[R]], Sequence[V]]) -> list[V]:
        """What is known, and what ``judge`` says to the rest; equal requests are asked once."""
        keys = [request_hash(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests) if key not in self._known}
        found = dict(zip(missing, judge(list(missing.values())))) if missing else {}
        fresh = {key: verdict for key, verdict in found.items() if not math.isnan(verdict.value)}
        if fresh:
            data = "".join(self._write(key, verdict) for key, verdict in fresh.items()).encode()
            with self._own.open("ab", buffering=0) as file:
                file.write(data)
            self._known |= fresh
        self.counts.update(asked=len(requests), cached=len(requests) - len(missing))
        return [self._known[key] if key in self._known else found[key] for key in keys]


class CachedJudge:
    """A judge that remembers."""

    def __init__(self, judge: Judge, folder: Path) -> None:
        """
        Args:
            judge: asked for what is not known yet.
            folder: of all judges' caches.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._judge = judge
        self._kept: _Kept[JudgeRequest, Verdict] = _Kept(judge.identity, folder, read_verdict, write_verdict)

    @property
    def identity(self) -> JudgeIdentity:
        return self._judge.identity

    @property
    def counters(self) -> Mapping[str, float]:
        """Those of the judge, with ``asked`` counting all requests and ``cached`` those that were known."""
        return {**self._judge.counters, **self._kept.counts}

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict per request; equal requests are asked once."""
        return self._kept.ask(requests, self._judge.judge)


class CachedGrader:
    """A grader that remembers."""

    def __init__(self, grader: Grader, folder: Path) -> None:
        """
        Args:
            grader: asked for what is not known yet.
            folder: of all judges' caches.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._grader = grader
        self._kept: _Kept[GradeRequest, Grade] = _Kept(grader.identity, folder, read_grade, write_grade)

    @property
    def identity(self) -> JudgeIdentity:
        return self._grader.identity

    @property
    def counters(self) -> Mapping[str, float]:
        """Those of the grader, with ``asked`` counting all requests and ``cached`` those that were known."""
        return {**self._grader.counters, **self._kept.counts}

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """One grade per request; equal requests are asked once."""
        return self._kept.ask(requests, self._grader.grade)
