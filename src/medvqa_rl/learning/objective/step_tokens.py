"""Advantages per token from judged steps: those of the completion, plus those of the step at the step's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medvqa_rl.core.answers import Decode, token_span
from medvqa_rl.core.types import Group
from medvqa_rl.rewards.process import Step, step_advantages


def with_steps(
    advantages: Tensor,
    groups: Sequence[Group],
    steps: Sequence[Sequence[Step]],
    *,
    weight: float,
    discount: float,
    decode: Decode,
) -> list[list[Tensor]]:
    """One advantage per token: A_i + weight * a_ik at the tokens of step k, A_i at all others.

    Unscored completions, whose A_i is 0 and whose steps may have failed verdicts, are left out of the loss anyway.

    Args:
        advantages: (P, G).
        groups: P groups of G completions.
        steps: (P * G) judged steps of the completions, in prompt order.
        weight: of the process reward.
        discount: see :func:`step_advantages`.
        decode: of the policy's tokenizer.
    """
    rest = iter(steps)
    rows: list[list[Tensor]] = []
    for group, own in zip(groups, advantages):
        judged = [next(rest) for _ in group.completions]
        found = step_advantages([[step.validity for step in some] for some in judged], discount)
        rows.append([])
        for completion, value, some, values in zip(group.completions, own, judged, found):
            tokens = torch.full((len(completion.token_ids),), float(value), dtype=advantages.dtype)
            opening = len(group.prompt.opening)
            for step, more in zip(some, values):
                first, last = token_span(
                    completion.token_ids, max(step.start - opening, 0), step.end - opening, decode
                )
                tokens[first:last] += weight * more
            rows[-1].append(tokens)
    return rows
