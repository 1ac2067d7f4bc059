"""Self-check before the first update of a run: compare the fast computation with the plain one.

Packed attention relies on parts of torch and transformers that may change with a version, a device or a kernel. On
the first step, and on the first after a resume, one group of the first micro-batch is therefore computed again with
one row per completion. The run stops if the two differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Group
from medvqa_rl.learning.objective.logprobs import CompletionBatch, scoring
from medvqa_rl.learning.run.errors import TrainingFailed


class Tolerance(NamedTuple):
    """Allowed difference between log-probabilities of the same tokens, in nats."""

    largest: float
    mean: float


TOLERANCES = {torch.float32: Tolerance(1e-3, 1e-4), torch.bfloat16: Tolerance(2.0, 0.1)}
"""Chosen empirically. In float32 the embedded model's two layouts differ by 3e-6; if completions attend to their own
future, by 3.8 (0.027 on average). In bfloat16 the layouts differ by 0.06. Deeper models were not measured and may
differ more, so the bfloat16 limits are wide and only catch gross errors."""


class SelfCheckError(TrainingFailed):
    """The fast and the plain computation disagree."""


def compare(fast: Tensor, plain: Tensor, mask: Tensor, dtype: torch.dtype, group: Group) -> None:
    """Compare the two log-probabilities of one group.

    Args:
        fast: (G, any) log-probabilities from the default layout; padded to the width of its batch.
        plain: (G, Tc) log-probabilities from separate rows.
        mask: (G, Tc) bool, True at completion tokens.
        dtype: dtype of the model's weights.
        group: named in the message.

    Raises:
        SelfCheckError: they differ by more than the dtype's tolerance.
    """
    if not bool(plain[mask].isfinite().all()):
        return  # the weights have diverged; the loss will report it
    difference = (fast[:, : mask.shape[1]] - plain)[mask].abs().float()
    largest, mean = float(difference.max()), float(difference.mean())
    limit = TOLERANCES[dtype]
    # Phrased so that NaN in the fast computation fails.
    if largest <= limit.largest and mean <= limit.mean:
        return
    raise SelfCheckError(
        f"The self-check failed before the first update: log-probabilities of sample {shown(group.sample.id)} differ "
        f"between the shared and the plain computation by up to {largest:.3g} and {mean:.3g} on average, where "
        f"{limit.largest:g} and {limit.mean:g} are allowed in {str(dtype).removeprefix('torch.')}. No weight was "
        "touched. This is a bug of this package with the installed versions of torch and transformers: set "
        "model.attention=eager, which does not pack groups, and please report it.",
        [group],
    )


def check_first_group(forward: nn.Module, batch: CompletionBatch, plain: CompletionBatch, group: Group) -> None:
    """Compare the last group of a batch with the same group in separate rows, using forward passes only.

    Args:
        forward: the :class:`GroupForward`, wrapped or not.
        batch: a batch in the default layout whose last group is ``group``.
        plain: ``group`` in separate rows.

    Raises:
        SelfCheckError: they disagree.
    """
    with scoring(forward):
        fast: Tensor = forward(batch).logps[-len(plain.mask) :]
        expected: Tensor = forward(plain).logps
    compare(fast, expected, plain.mask, next(forward.parameters()).dtype, group)
