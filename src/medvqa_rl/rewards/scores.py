"""The scores of a step's completions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvqa_rl.core.answers import Read
from medvqa_rl.rewards.process import Step


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups of G completions. NaN means unscored: a failure of ours, not of the model."""

    total: NDArray[np.float64]
    """(P, G) weighted sum of the parts that apply; NaN if one of them is NaN, or none applies."""
    parts: Mapping[str, NDArray[np.float64]]
    """(P, G) values of each part, before weighting; also NaN where a part does not apply."""
    applies: Mapping[str, NDArray[np.bool_]]
    """(P, G) for each part, whether it applies: a user's function returns None where it does not."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Scalars that reward functions logged through ``log_metric``."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """(P * G) values per completion, in prompt order, that reward functions logged through ``log_extra``."""
    reads: Sequence[Read] = ()
    """(P * G) parsed completions, in prompt order."""
    steps: Sequence[Sequence[Step]] = ()
    """(P * G) judged steps of each completion, in prompt order; empty unless the process reward is on."""
