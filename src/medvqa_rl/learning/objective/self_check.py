"""Before the first update of a run: does the fast path say what the plain one says?

Attention of packed groups leans on parts of torch and transformers whose behaviour may change with a version, a
device or a kernel. So on the first step, and on the first after a resume, one group of the first micro-batch is
computed again with one row per completion, and the run stops where the two differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.core.types import Group
from medvqa_rl.learning.objective.logprobs import CompletionBatch
from medvqa_rl.learning.run.errors import TrainingFailed


class Tolerance(NamedTuple):
    """How far log-probabilities of the same token may be apart, in nats."""

    largest: float
    """For any token."""
    mean: float
    """On average."""


TOLERANCES = {torch.float32: Tolerance(1e-3, 1e-4), torch.bfloat16: Tolerance(2.0, 0.1)}
"""Chosen, not derived. In float32 the embedded model's two layouts differ by 3e-6, and completions that see their
own future by 3.8 (0.027 on average). In bfloat16 they differ by 0.06; deeper models, where it may be more, were not
measured: the limits are wide there and find gross faults only."""


class SelfCheckError(TrainingFailed):
    """The fast path and the plain one disagree."""


def compare(fast: Tensor, plain: Tensor, mask: Tensor, dtype: torch.dtype, group: Group) -> None:
    """Compare the log-probabilities of one group.

    Args:
        fast: (G, any) log-probabilities from the default layout.
        plain: (G, Tc) the same from one row per completion.
        mask: (G, Tc) bool, True at tokens.
        dtype: of the model's weights.
        group: for the message.

    Raises:
        SelfCheckError: they differ by more than the tolerance of the dtype.
    """
    if not bool(plain[mask].isfinite().all()):
        return  # diverged weights, which the loss reports
    difference = (fast[:, : mask.shape[1]] - plain)[mask].abs().float()
    largest, mean = float(difference.max()), float(difference.mean())
    limit = TOLERANCES[dtype]
    # Written so that a NaN of the fast path fails.
    if largest <= limit.largest and mean <= limit.mean:
        return
    raise SelfCheckError(
        f"The self-check failed before the first update: log-probabilities of sample {group.sample.id!r} differ "
        f"between the shared and the plain computation by up to {largest:.3g} and {mean:.3g} on average, where "
        f"{limit.largest:g} and {limit.mean:g} are allowed in {str(dtype).removeprefix('torch.')}. No weight was "
        "touched. This is a fault of this package with these versions of torch and transformers: set "
        "model.attention=eager, which does without packed groups, and please report it.",
        [group],
    )


@torch.no_grad()
def check_first_group(forward: nn.Module, batch: CompletionBatch, plain: CompletionBatch, group: Group) -> None:
    """Compare the last group of a batch with the same group alone, one row per completion; forward passes only.

    Args:
        forward: the :class:`GroupForward`, wrapped or not. It is in evaluation mode for the time of the check, because
            dropout would make any two passes differ.
        batch: the default layout; ``group`` is its last.
        plain: ``group`` in separate rows.
        group: one that has a part in the loss.

    Raises:
        SelfCheckError: they disagree.
    """
    is_training = forward.training
    forward.eval()
    try:
        fast: Tensor = forward(batch).logps[-len(plain.mask) :]
        expected: Tensor = forward(plain).logps
    finally:
        forward.train(is_training)
    compare(fast, expected, plain.mask, next(forward.parameters()).dtype, group)
