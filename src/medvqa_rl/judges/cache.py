"""Verdicts on disk, so that no text is judged twice: not by a resumed run, nor by the next one. Imports no torch.

One folder per judge identity (name, weights, prompt, strictness), in it one file per process, to which only that
process appends: no locks, and no two writers of a file, on network file systems too. A line that a killed process left
half written does not parse and is skipped. Failed verdicts are never written. Files hold hashes of texts, not texts.

```text
judges/3f2a.../identity.json
judges/3f2a.../verdicts-<host>-<process>-<random>.jsonl     ["sha256 of the text", 1, 2.31]
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

from medvqa_rl.judges.protocol import Judge, JudgeIdentity, JudgeRequest, Verdict


def request_hash(request: JudgeRequest) -> str:
    """SHA-256 of everything that a judge is shown."""
    text = json.dumps([request.question, list(request.options), request.reasoning])
    return hashlib.sha256(text.encode()).hexdigest()


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
        self._folder = folder / judge.identity.key
        self._folder.mkdir(parents=True, exist_ok=True)
        note = self._folder / "identity.json"
        if not note.exists():
            partial = note.with_name(f".identity.{os.getpid()}.{secrets.token_hex(4)}")
            partial.write_text(json.dumps(judge.identity.to_json(), indent=2) + "\n", encoding="utf-8")
            os.replace(partial, note)
        self._known: dict[str, Verdict] = {}
        for path in sorted(self._folder.glob("verdicts-*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if (found := read_verdict(line)) is not None:
                    self._known[found[0]] = found[1]
        # Unique even where a process forks, and where hosts share names.
        self._own = self._folder / f"verdicts-{platform.node()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._counts: Counter[str] = Counter()

    @property
    def identity(self) -> JudgeIdentity:
        return self._judge.identity

    @property
    def counters(self) -> Mapping[str, float]:
        """Those of the judge, with ``asked`` counting all requests and ``cached`` those that were known."""
        return {**self._judge.counters, **self._counts}

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        """One verdict per request; equal requests are asked once."""
        keys = [request_hash(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests) if key not in self._known}
        found = dict(zip(missing, self._judge.judge(list(missing.values())))) if missing else {}
        fresh = {key: verdict for key, verdict in found.items() if not math.isnan(verdict.value)}
        if fresh:
            data = "".join(write_verdict(key, verdict) for key, verdict in fresh.items()).encode()
            with self._own.open("ab", buffering=0) as file:
                file.write(data)
            self._known |= fresh
        self._counts.update(asked=len(requests), cached=len(requests) - len(missing))
        return [self._known[key] if key in self._known else found[key] for key in keys]
