"""The embedded judge that sees: are the claims of a text true of this image?

It is Yes if the text makes claims, and the probability that all of them are true is above one half, by what the judge
believes to see (:mod:`medvqa_rl.rewards.judges.phantom.sight`). What is no claim of the phantom world, such as a
remark or a conclusion, is neither true nor false. A step of the reasoning is valid unless its claim is false.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from medvqa_rl.core.text import printable
from medvqa_rl.data.phantom.claims import claims
from medvqa_rl.data.phantom.drawing import SIZE
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.rewards.judges.phantom.sight import Beliefs, Sight
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import Rubric

_BATCH = 64
_SURE = 1e-6
"""Probabilities are kept this far from 0 and 1."""
_VERSION = "claims 1"
"""Part of the identity: change it when claims are read or weighed in another way."""


class SightJudge:
    """Judges texts by the images."""

    def __init__(self, name: str, sight: Sight, rubric: Rubric, *, strictness: float = 0.0) -> None:
        """
        Args:
            rubric: with two levels.
            strictness: nats by which log P(true) must exceed log P(false).
        """
        self._sight, self._rubric = sight, rubric
        shown = hashlib.sha256(f"{_VERSION} {rubric.name}".encode()).hexdigest()[:16]
        self.identity = JudgeIdentity(name, weights_fingerprint(sight), shown, strictness)
        self._counts: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked`` and ``failed``."""
        return dict(self._counts)

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; a text without reasoning gets 0, and one without a phantom image fails."""
        grades = self._rubric.grade(requests, self._ask)
        self._counts.update(asked=len(requests), failed=sum(not grade.is_scored for grade in grades))
        return grades

    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        refused = [_refusal(request) for request in requests]
        images = {
            request.images[0].digest: request.images[0].image
            for request, refusal in zip(requests, refused)
            if not refusal
        }
        beliefs: dict[str, Beliefs] = {}
        for first in range(0, len(images), _BATCH):
            some = list(images)[first : first + _BATCH]
            beliefs |= zip(some, self._sight.look([images[digest] for digest in some]))
        return [
            Grade.failed(refusal) if refusal else self._verdict(request, beliefs[request.images[0].digest])
            for request, refusal in zip(requests, refused)
        ]

    def _verdict(self, request: JudgeRequest, beliefs: Beliefs) -> Grade:
        is_step = "step" in self._rubric.shows
        told = set(claims(request.step if is_step else request.reasoning))
        share = math.prod(map(beliefs.probability, told)) if told else float(is_step)
        share = min(max(share, _SURE), 1 - _SURE)
        margin = math.log(share) - math.log1p(-share)
        return Grade(float(margin > self.identity.strictness), margin=margin)


def _refusal(request: JudgeRequest) -> str:
    """Why there is nothing to look at; empty if there is a phantom image."""
    if len(request.images) != 1:
        return f"the question has {len(request.images)} images, but one about a phantom has one"
    try:
        size = request.images[0].image.size
    except ValueError as error:
        return printable(str(error))
    return "" if size == (SIZE, SIZE) else f"the image has {size[0]} x {size[1]} pixels, but a phantom {SIZE} x {SIZE}"
