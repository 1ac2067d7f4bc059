"""Grades cached on disk, so that a resumed run, or the next one, does not judge the same text again. No torch.

There is one folder per judge identity (name, weights, prompt or rubric, strictness), with one file per process to
which only that process appends: no locks are needed, on network file systems either. A line cut off by a killed
process does not parse and is skipped. Failed grades are never written. Files hold hashes of texts and the judge's own
sentences.

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
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from medvqa_rl.core.files import json_lines, write_json, writing
from medvqa_rl.rewards.judges.protocol import Grade, Judge, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import Rubric

_LINE = TypeAdapter(tuple[str, int, str | float | None])


def request_hash(request: JudgeRequest, rubric: Rubric) -> str:
    """SHA-256 of everything the judge is shown.

    Raises:
        ValueError: an image cannot be decoded.
    """
    return hashlib.sha256(json.dumps(rubric.shown(request)).encode()).hexdigest()


def read_line(line: str, top: int) -> tuple[str, Grade] | None:
    """Parse a line of a cache file; returns None if it is damaged.

    Args:
        top: the rubric's best score.
    """
    try:
        key, score, detail = _LINE.validate_json(line.encode("utf-8", "replace"), strict=True)
    except ValidationError:
        return None
    if len(key) != 64 or not 0 <= score <= top:
        return None
    if isinstance(detail, str):
        return key, Grade(float(score), detail)
    return key, Grade(float(score), margin=math.nan if detail is None else detail)


def write_line(key: str, grade: Grade) -> str:
    """The line that :func:`read_line` parses: hash, score, and the reason or else the margin."""
    margin = None if math.isnan(grade.margin) else grade.margin
    return json.dumps([key, int(grade.score), grade.reason or margin]) + "\n"


def judge_folder(judges: Path, identity: JudgeIdentity) -> Path:
    """The folder of a judge below that of the caches of all judges."""
    return judges / identity.key


class CachedJudge:
    """A judge with a cache on disk."""

    def __init__(self, judge: Judge, rubric: Rubric, folder: Path) -> None:
        """
        Args:
            judge: asked for grades that are not cached.
            rubric: on which it grades.
            folder: of the caches of all judges.

        Raises:
            OSError: the folder cannot be created or read.
        """
        self._judge, self._rubric = judge, rubric
        self._folder = judge_folder(folder, judge.identity)
        if not (self._folder / "identity.json").exists():
            write_json(self._folder / "identity.json", judge.identity.to_json())
        self._known: dict[str, Grade] = {}
        for path in sorted(self._folder.glob("verdicts-*.jsonl")):
            for line in json_lines(path.read_text(encoding="utf-8", errors="replace")):
                if (found := read_line(line, rubric.top)) is not None:
                    self._known[found[0]] = found[1]
        # Unique after a fork too, and when hosts share a name.
        self._own = self._folder / f"verdicts-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._counts: Counter[str] = Counter()

    @property
    def identity(self) -> JudgeIdentity:
        return self._judge.identity

    @property
    def counters(self) -> Mapping[str, float]:
        """The judge's, but ``asked`` counts all requests; ``cached`` counts those answered from the cache."""
        return {**self._judge.counters, **self._counts}

    def _key(self, request: JudgeRequest, number: int) -> str:
        """The hash of a request, or its number if an image cannot be decoded, which the judge will say."""
        try:
            return request_hash(request, self._rubric)
        except ValueError:
            return str(number)

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; equal ones are judged once."""
        keys = [self._key(request, number) for number, request in enumerate(requests)]
        missing = {key: request for key, request in zip(keys, requests) if key not in self._known}
        found = dict(zip(missing, self._judge.grade(list(missing.values())))) if missing else {}
        fresh = {key: grade for key, grade in found.items() if grade.is_scored}
        if fresh:
            data = "".join(write_line(key, grade) for key, grade in fresh.items()).encode()
            with writing(self._own), self._own.open("ab", buffering=0) as file:
                file.write(data)
            self._known |= fresh
        self._counts.update(asked=len(requests), cached=len(requests) - len(missing))
        return [self._known.get(key) or found[key] for key in keys]
