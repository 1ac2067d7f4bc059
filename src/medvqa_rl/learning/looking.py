"""What the policy makes of its own completions: how much they need the images, and how sure their answers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medvqa_rl.config import Config
from medvqa_rl.core.answers import answer_span, token_span
from medvqa_rl.core.randomness import Draws
from medvqa_rl.core.types import Completion, Dataset, Group, Sample
from medvqa_rl.evaluation.controls import blank
from medvqa_rl.learning.objective.logprobs import GroupForward, collate, layout_of
from medvqa_rl.models.loading import Policy
from medvqa_rl.rollout.decode import evaluating

_TRIES = 100
"""Draws of a question about other images."""


def image_gains(policy: Policy, groups: Sequence[Group], config: Config, dataset: Dataset) -> NDArray[np.float64]:
    """(P * G) nats by which each completion, or its answer, is likelier with its images than with others.

    Two passes without gradients over the completions, in the layout and at the temperature of the update. 0 for
    prompts without images and completions without the part that counts.

    Args:
        policy: holds all weights on this rank.
        groups: P groups of G completions.
        config: ``rewards.looking_...``, the temperature, the sizes of micro-batches and the seed.
        dataset: the training questions, whose images ``shuffled`` shows.
    """
    gains = np.zeros((len(groups), len(groups[0].completions)))
    seeing = [index for index, group in enumerate(groups) if group.sample.images]
    others = [_with_other_images(policy, groups[index], config, dataset) for index in seeing]
    counted = config.rewards.looking_of, config.rollout.temperature
    own = _sums(policy, [groups[index] for index in seeing], config, *counted)
    for index, with_images, without in zip(seeing, own, _sums(policy, others, config, *counted)):
        gains[index] = with_images - without
    return gains.reshape(-1)


def answer_probabilities(policy: Policy, groups: Sequence[Group], config: Config) -> NDArray[np.float64]:
    """(P * G) probability of each completion's answer at temperature 1, given the prompt and the reasoning before it;
    1 where there is no answer. A pass without gradients over the completions.

    Args:
        policy: holds all weights on this rank.
        groups: P groups of G completions.
        config: the sizes of micro-batches.
    """
    sums = np.concatenate([*_sums(policy, groups, config, "answer", 1.0)])
    probabilities: NDArray[np.float64] = np.minimum(np.exp(sums), 1.0)
    return probabilities


def _with_other_images(policy: Policy, group: Group, config: Config, dataset: Dataset) -> Group:
    """The same completions behind the prompt with other images."""
    sample = group.sample
    if config.rewards.looking_against == "blank":
        shown = blank(sample)
    else:
        shown = replace(sample, images=_donor(sample, config.train.seed, dataset).images)
    return Group(sample, policy.processor.encode(shown, group.template), group.completions)


def _donor(sample: Sample, seed: int, dataset: Dataset) -> Sample:
    """A random question about other images, as many of them; depends on the question and the seed only.

    Raises:
        ValueError: none was found.
    """
    draws = Draws("looking", seed, sample.id)
    for _ in range(_TRIES):
        donor = dataset[draws.below(len(dataset))]
        if donor.image_key != sample.image_key and len(donor.images) == len(sample.images):
            return donor
    raise ValueError(
        f"rewards.looking_against is shuffled, but {_TRIES} random training questions have no other image than that "
        f"of {sample.id}: set it to blank."
    )


def _sums(
    policy: Policy, groups: Sequence[Group], config: Config, of: Literal["completion", "answer"], temperature: float
) -> Iterator[NDArray[np.float64]]:
    """(G,) log-probabilities of each group's completions, or of their answers."""
    forward, size = GroupForward(policy.model), config.train.prompts_per_micro_batch
    for first in range(0, len(groups), size):
        some = groups[first : first + size]
        batch = collate(some, policy.processor, policy.device, layout=layout_of(policy))
        with torch.no_grad(), evaluating(policy.model):
            table = forward(batch, temperature=temperature).logps.double().cpu().numpy()
        rows = iter(table)
        for group in some:
            spans = [_span(policy, group, completion, of) for completion in group.completions]
            yield np.array([float(next(rows)[begin:end].sum()) for begin, end in spans])


def _span(
    policy: Policy, group: Group, completion: Completion, of: Literal["completion", "answer"]
) -> tuple[int, int]:
    """The tokens that count: all, or those of the answer."""
    if of == "completion":
        return 0, len(completion.token_ids)
    span = answer_span(completion.text, group.template, group.wording)
    if span is None:
        return 0, 0
    opened = len(group.prompt.opening)
    return token_span(completion.token_ids, span[0] - opened, span[1] - opened, policy.processor.decode)
