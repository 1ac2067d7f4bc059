"""The embedded judge that sees: are the claims of a text true of this image?

It is Yes if the text makes claims, and the probability that all of them are true is above one half, by what the judge
believes to see (:mod:`medvqa_rl.rewards.judges.phantom.sight`) or by the description that it is given. What is no
claim of the phantom world, such as a remark or a conclusion, is neither true nor false. A step of the reasoning is
valid unless its claim is false.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medvqa_rl.core.text import printable
from medvqa_rl.data.phantom.claims import Claim, claims, is_true
from medvqa_rl.data.phantom.drawing import SIZE
from medvqa_rl.data.phantom.questions import described_scene
from medvqa_rl.data.phantom.world import Scene
from medvqa_rl.models.fingerprint import weights_fingerprint
from medvqa_rl.rewards.judges.phantom.sight import Beliefs, Sight
from medvqa_rl.rewards.judges.protocol import Grade, JudgeIdentity, JudgeRequest
from medvqa_rl.rewards.judges.rubric import Rubric

_BATCH = 64
_SURE = 1e-6
"""Probabilities are kept this far from 0 and 1."""
_VERSION = "claims 1"
"""Part of the identity: change it when claims are read or weighed in another way."""


class Described(NamedTuple):
    """What a description says of an image: certain."""

    scene: Scene

    def probability(self, claim: Claim) -> float:
        """1 if the claim is true of the described scene, else 0."""
        return float(is_true(claim, self.scene))


class _ClaimsJudge(ABC):
    """Judges texts by the probability of their claims."""

    def __init__(self, identity: JudgeIdentity, rubric: Rubric) -> None:
        self.identity, self._rubric = identity, rubric
        self._counts: Counter[str] = Counter()

    @property
    def counters(self) -> Mapping[str, float]:
        """``asked`` and ``failed``."""
        return dict(self._counts)

    def grade(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        """Grade requests; a text without reasoning gets 0, and one without a phantom to compare with fails."""
        grades = self._rubric.grade(requests, self._ask)
        self._counts.update(asked=len(requests), failed=sum(not grade.is_scored for grade in grades))
        return grades

    @abstractmethod
    def _believe(self, requests: Sequence[JudgeRequest]) -> list[Beliefs | Described | str]:
        """What is believed of the image of each request, or why it cannot be judged."""

    def _ask(self, requests: Sequence[JudgeRequest]) -> list[Grade]:
        return [
            Grade.failed(known) if isinstance(known, str) else self._verdict(request, known)
            for request, known in zip(requests, self._believe(requests))
        ]

    def _verdict(self, request: JudgeRequest, known: Beliefs | Described) -> Grade:
        is_step = "step" in self._rubric.shows
        told = set(claims(request.step if is_step else request.reasoning))
        share = math.prod(map(known.probability, told)) if told else float(is_step)
        share = min(max(share, _SURE), 1 - _SURE)
        margin = math.log(share) - math.log1p(-share)
        return Grade(float(margin > self.identity.strictness), margin=margin)


class SightJudge(_ClaimsJudge):
    """Judges texts by the images."""

    def __init__(self, name: str, sight: Sight, rubric: Rubric, *, strictness: float = 0.0) -> None:
        """
        Args:
            rubric: with two levels.
            strictness: nats by which log P(true) must exceed log P(false).
        """
        self._sight = sight
        shown = _hash(rubric.name)
        super().__init__(JudgeIdentity(name, weights_fingerprint(sight), shown, strictness), rubric)

    def _believe(self, requests: Sequence[JudgeRequest]) -> list[Beliefs | Described | str]:
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
        return [refusal or beliefs[request.images[0].digest] for request, refusal in zip(requests, refused)]


class DescriptionJudge(_ClaimsJudge):
    """Judges texts by the descriptions of the images, which say all that there is: it never errs."""

    def __init__(self, name: str, rubric: Rubric, *, strictness: float = 0.0) -> None:
        """See :class:`SightJudge`."""
        super().__init__(JudgeIdentity(name, "none", _hash(f"{rubric.name} description"), strictness), rubric)

    def _believe(self, requests: Sequence[JudgeRequest]) -> list[Beliefs | Described | str]:
        scenes = [described_scene(request.description) for request in requests]
        return ["the description is not that of a phantom" if scene is None else Described(scene) for scene in scenes]


def _hash(shown: str) -> str:
    return hashlib.sha256(f"{_VERSION} {shown}".encode()).hexdigest()[:16]


def _refusal(request: JudgeRequest) -> str:
    """Why there is nothing to look at; empty if there is a phantom image."""
    if len(request.images) != 1:
        return f"the question has {len(request.images)} images, but one about a phantom has one"
    try:
        size = request.images[0].image.size
    except ValueError as error:
        return printable(str(error))
    return "" if size == (SIZE, SIZE) else f"the image has {size[0]} x {size[1]} pixels, but a phantom {SIZE} x {SIZE}"
