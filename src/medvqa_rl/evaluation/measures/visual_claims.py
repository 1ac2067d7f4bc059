"""Whether a text claims to see something. Imports no torch."""

from __future__ import annotations

import re

from medvqa_rl.data.phantom.claims import claims

_CLAIM = re.compile(
    r"\b(?:images?|picture|scan|film|radiograph|x-?ray|ct|mri|ultrasound|slide|section|view)\b[^.\n]{0,60}?"
    r"\b(?:shows?|showing|reveals?|demonstrates?|displays?|depicts?|contains?|has)\b"
    r"|\b(?:is|are|was|were|can be|i|we|one can)\s+(?:clearly\s+)?"
    r"(?:seen|visible|noted|present|absent|evident|observed|shown|depicted|visuali[sz]ed|identified|see|observe|notice)\b"
    r"|\bthere (?:is|are)\b"
    r"|\b(?:appears?|looks?) (?:to be |as |like )?\w",
    re.IGNORECASE,
)


def claims_to_see(text: str) -> bool:
    """Whether a text makes a claim about what an image shows: a claim of the phantom world, or an English sentence in
    the usual words ("the image shows", "is seen", "there is", "appears"). Other languages and wordings are missed, so
    shares of such texts are lower bounds."""
    return bool(claims(text)) or _CLAIM.search(text) is not None
