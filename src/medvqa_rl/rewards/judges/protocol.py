"""The interface of a judge: it grades requests on one rubric. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Protocol

from PIL import Image

from medvqa_rl.core.types import ImageSource
from medvqa_rl.data.images.fingerprints import pixel_hash


@dataclass(frozen=True)
class SeenImage:
    """An image that a judge may be shown: decoded when the first judge looks, then kept.

    Both properties raise ValueError if the image cannot be decoded.
    """

    source: ImageSource

    @cached_property
    def image(self) -> Image.Image:
        """RGB."""
        return self.source.load()

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits, equal for equal pixels."""
        return pixel_hash(self.image).hex()


def seen(sources: Sequence[ImageSource]) -> tuple[SeenImage, ...]:
    """Images of a question for its judge requests, which should share them."""
    return tuple(map(SeenImage, sources))


@dataclass(frozen=True)
class JudgeRequest:
    """One case to grade. The rubric decides which of it the judge is shown."""

    question: str
    options: tuple[str, ...]
    """Texts of the options in the order A, B, C ...; empty for questions without options."""
    reasoning: str = ""
    """The text inside the think tags."""
    answer: str = ""
    """The model's answer as written; empty if none could be parsed."""
    gold: str = ""
    """The reference answer: text, for choice questions preceded by its letter."""
    description: str = ""
    """What the data set says about the image, such as a caption; empty if it says nothing."""
    images: tuple[SeenImage, ...] = ()
    """Images of the question, decoded only for judges that see."""
    step: str = ""
    """The last step of the reasoning, if that is what is graded."""


@dataclass(frozen=True)
class Grade:
    """A judge's result for one request."""

    score: float
    """A level of the rubric, 0 to ``rubric.top``; NaN if the judge failed (unscored, not wrong)."""
    reason: str = ""
    """The judge's sentence, or why it failed. Empty for a plain Yes or No."""
    margin: float = math.nan
    """log P("Yes") - log P("No") in nats; NaN unless a local judge compared the two."""

    @classmethod
    def failed(cls, reason: str) -> Grade:
        """An unscored grade with the reason of the failure."""
        return cls(math.nan, reason)

    @property
    def is_scored(self) -> bool:
        return not math.isnan(self.score)


@dataclass(frozen=True)
class JudgeIdentity:
    """Everything a grade depends on besides the request."""

    name: str
    """As in the settings: an embedded judge, a folder, a Hub id, or an endpoint's model."""
    fingerprint: str
    """Of the weights; for an endpoint its host and model name."""
    prompt_hash: str
    """16 hexadecimal digits of the SHA-256 of the prompt or rubric, and of what constrains the reply."""
    strictness: float
    """Nats by which log P("Yes") must exceed log P("No")."""

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with any field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, str | float]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} (weights {self.fingerprint}, prompt {self.prompt_hash}, strictness {self.strictness:g})"


class Judge(Protocol):
    """Grades on one rubric. Returns one grade per request, in order, each independent of the others."""

    @property
    def identity(self) -> JudgeIdentity: ...

    @property
    def counters(self) -> Mapping[str, float]:
        """Totals since loading, such as ``asked``, ``failed`` and ``prompt_tokens``."""
        ...

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]: ...
