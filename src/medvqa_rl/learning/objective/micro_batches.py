"""Split a step's groups into micro-batches, which affects memory and speed but not the gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from medvqa_rl.core.text import shown
from medvqa_rl.core.types import Group
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import CompletionBatch
from medvqa_rl.learning.objective.losses.loss import StepCounts
from medvqa_rl.learning.run.errors import UnusableSampleError


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups that share one forward and backward pass."""

    groups: Sequence[Group]
    batch: CompletionBatch
    advantages: Tensor
    """(B,) float32, or (B, Tc) one per token; in preference pairs +1 is chosen and -1 rejected."""
    mask: Tensor
    """(B, Tc) bool, True at tokens that count in the loss."""
    top_mask: Tensor
    """(B, Tc) bool, True at those of them that belong to the top share by entropy; ``mask`` if that share is 1."""
    ref_logps: Tensor | None
    """(B, Tc) under the reference; None if beta is 0 or no token counts."""
    sampled_logps: Tensor | None = None
    """(B, Tc) as reported by vLLM, NaN where unknown; None if it did not sample."""

    @property
    def token_advantages(self) -> Tensor:
        """(B, 1) or (B, Tc)."""
        return self.advantages if self.advantages.ndim == 2 else self.advantages[:, None]


@dataclass(frozen=True)
class Experience:
    """This rank's micro-batches of one rollout, and the counts over all ranks."""

    micro_batches: Sequence[MicroBatch]
    counts: StepCounts


def contributing(has_signal: Tensor, *, needs_every_group: bool) -> list[int]:
    """Return the indices of the groups whose loss has a gradient, or [0] if there are none.

    A group whose advantages are all 0 has no gradient. Skipping it changes nothing as long as the denominators still
    count it. At least one group remains because distributed wrappers wait for every rank.

    Args:
        has_signal: (P,) bool, from ``have_signal``.
        needs_every_group: the loss has other terms, such as KL, whose gradient does not depend on the advantages.
    """
    if needs_every_group:
        return list(range(len(has_signal)))
    return has_signal.nonzero().flatten().tolist() or [0]


def computed_tokens(sizes: Iterable[tuple[int, Sequence[int]]], layout: Layout) -> int:
    """Count the tokens that the language model computes for a micro-batch, including padding.

    Args:
        sizes: for each group, the number of prompt tokens and the numbers of completion tokens.
        layout: the micro-batch's layout; packed groups have no padding.
    """
    groups = list(sizes)
    if layout == Layout.SEPARATE:
        rows = [prompt + length for prompt, lengths in groups for length in lengths]
    else:
        rows = [prompt + sum(lengths) for prompt, lengths in groups]
    return sum(rows) if layout == Layout.PACKED else len(rows) * max(rows)


def split(
    groups: Sequence[Group],
    indices: Sequence[int],
    *,
    layout: Layout,
    max_groups: int,
    max_tokens: int | None,
    max_completion_length: int,
) -> list[list[int]]:
    """Split groups into micro-batches, deterministically.

    Without a token limit, consecutive groups share a micro-batch. With one, groups are sorted by length first to
    reduce padding, and a micro-batch is full when the next group would exceed either limit.

    Args:
        groups: P groups.
        indices: which of them to split.
        layout: layout of the micro-batches.
        max_groups: ``train.prompts_per_micro_batch``.
        max_tokens: ``train.max_tokens_per_micro_batch``.
        max_completion_length: ``rollout.max_completion_length``.

    Returns:
        Indices into ``groups`` for each micro-batch.

    Raises:
        UnusableSampleError: a single group would exceed ``max_tokens`` if its completions had their maximum length.
            Using the maximum makes the check depend on the prompt only, not on what was sampled.
    """
    if max_tokens is None:
        return [list(indices[start : start + max_groups]) for start in range(0, len(indices), max_groups)]
    sizes = {
        index: (len(groups[index].prompt.input_ids), [len(c.token_ids) for c in groups[index].completions])
        for index in indices
    }
    for index, (prompt, lengths) in sizes.items():
        largest = computed_tokens([(prompt, [max_completion_length] * len(lengths))], layout)
        if largest > max_tokens:
            raise UnusableSampleError(
                f"The group of sample {shown(groups[index].sample.id)} can have {largest} tokens (a prompt of "
                f"{prompt} and "
                f"{len(lengths)} completions of up to {max_completion_length}), but train.max_tokens_per_micro_batch "
                f"is {max_tokens} and a group is never split: set it to {largest} or more, or lower "
                "model.max_pixels, rollout.num_generations or rollout.max_completion_length."
            )
    result: list[list[int]] = []
    for index in sorted(indices, key=lambda index: (computed_tokens([sizes[index]], layout), index)):
        together = [*result[-1], index] if result else [index]
        fits = len(together) <= max_groups and computed_tokens([sizes[i] for i in together], layout) <= max_tokens
        if result and fits:
            result[-1] = together
        else:
            result.append([index])
    return result
