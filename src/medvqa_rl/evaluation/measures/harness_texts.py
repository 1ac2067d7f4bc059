"""What the scoring rules of other harnesses share: what a rule decides, and how they cut the answer out of a response.

The functions here and in the modules ``medevalkit``, ``lmms_eval`` and ``mmmu`` describe other people's rules, with
their faults; nothing else uses them. Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from medvqa_rl.core.text import shown


@dataclass(frozen=True)
class Verdict:
    """How a rule scores a response."""

    credit: float | None
    """1 right, 0 wrong, between them the expectation of a choice at random; None if there is no rule."""
    why: str
    """A sentence: what was compared with what, or why there is no rule."""

    @property
    def word(self) -> str:
        """``right``, ``wrong``, ``no rule`` or the expectation."""
        words: dict[float | None, str] = {1.0: "right", 0.0: "wrong", None: "no rule"}
        return words.get(self.credit, f"{self.credit:.2f} expected")


def compared(read: str, gold: str) -> Verdict:
    """Right if two texts are equal."""
    if read == gold:
        return Verdict(1.0, f"{shown(read)} is the gold answer.")
    return Verdict(0.0, f"{shown(read)} is not {shown(gold)}.")


def tagged(text: str, name: str) -> str:
    """What stands between ``<name>`` and ``</name>``; several such texts joined by blanks; the whole text if there is
    none, or only empty ones."""
    return " ".join(re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)).strip() or text


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``; None if there is none or its braces do not close."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if found and not depth:
            return rest[:position].strip()
    return None
