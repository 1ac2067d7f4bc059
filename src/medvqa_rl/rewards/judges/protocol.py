"""What a judge is: an object that answers requests with verdicts. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge is shown: text only, never the image nor the gold answer."""

    question: str
    options: tuple[str, ...]
    """Texts of the options in the order A, B, C ...; empty for questions without."""
    reasoning: str
    """The text inside the think tags."""


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one request."""

    value: float
    """1 for Yes, 0 for No, NaN where the judge failed (unscored, not wrong)."""
    margin: float = math.nan
    """log P("Yes") - log P("No") in nats; NaN where the judge does not tell, or was not asked."""
    reason: str = ""
    """Why a verdict failed."""

    @classmethod
    def failed(cls, reason: str) -> Verdict:
        """No verdict, and why."""
        return cls(math.nan, reason=reason)


NO_REASONING = Verdict(0.0)
"""Of reasoning without text: No, without asking."""


@dataclass(frozen=True)
class JudgeIdentity:
    """Everything that a verdict depends on besides the request."""

    name: str
    """As in the settings: an embedded judge, a folder, a Hub id, or the model of an endpoint."""
    fingerprint: str
    """Of the weights; of an endpoint its host and the model's name."""
    prompt_hash: str
    """16 hexadecimal digits of the SHA-256 of the prompt's text."""
    strictness: float
    """Nats by which log P("Yes") must exceed log P("No")."""

    @property
    def key(self) -> str:
        """16 hexadecimal digits that differ where anything of it differs."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, str | float]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (weights {self.fingerprint}, prompt {self.prompt_hash}, strictness {self.strictness:g})"


class Judge(Protocol):
    """Says whether reasoning is clinically coherent. One verdict per request, in order, independent of the others."""

    @property
    def identity(self) -> JudgeIdentity: ...

    @property
    def counters(self) -> Mapping[str, float]:
        """Totals since the judge was loaded, such as ``asked``, ``failed`` and ``prompt_tokens``."""
        ...

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Verdict]: ...
