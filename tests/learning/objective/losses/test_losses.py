"""What holds for every loss made of advantages: splits, the policy that sampled, and advantages per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.config.problems.loss import FROM_ADVANTAGES
from medvqa_rl.learning.objective.entropy import entropy_bonus
from medvqa_rl.learning.objective.losses import LOSSES
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts

LEVELS = ("token", "sequence")


def batch(seed: int, *, per_token: bool, noise: float = 0.3) -> tuple[LossInputs, StepCounts]:
    """Eight completions of up to seven tokens, with importance weights."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (8, 1), generator=generator)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    old, reference = -uniform(8, 7), -uniform(8, 7)
    logps = old + noise * torch.randn(8, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, *([7] if per_token else []), generator=generator, dtype=torch.float64)
    inputs = LossInputs(logps, old, reference, advantages, mask, 1 + uniform(8, 7))
    count = int(mask.sum())
    return inputs, StepCounts(num_completions=8, num_tokens=count, token_budget=8 * 9, num_top_tokens=count)


def rows(inputs: LossInputs, kept: torch.Tensor, logps: torch.Tensor) -> LossInputs:
    """Some completions of a batch, with other log-probabilities."""
    return LossInputs(*(None if field is None else field[kept] for field in inputs._replace(logps=logps)))


def gradient(kind: str, inputs: LossInputs, counts: StepCounts, size: int = 8, **settings: Any) -> Any:
    """The loss and its gradient, from micro-batches of a size, with an entropy bonus."""
    config = LossConfig(type=kind, **settings)
    logps = inputs.logps.clone().requires_grad_()
    total = 0.0
    for kept in torch.arange(8).split(size):
        part = rows(inputs, kept, logps)
        loss = LOSSES[kind](part, counts, config).loss
        loss = loss - config.entropy_coef * entropy_bonus(-part.logps.exp() * part.logps, part.mask, counts)
        loss.backward()
        total += loss.item()
    assert logps.grad is not None
    return total, logps.grad


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
def test_gradient_does_not_depend_on_the_micro_batch_split(kind: str, level: str, per_token: bool) -> None:
    inputs, counts = batch(1, per_token=per_token)
    settings = {"importance_sampling_level": level, "entropy_coef": 0.1}
    whole, expected = gradient(kind, inputs, counts, **settings)
    for size in (4, 2, 1):
        loss, found = gradient(kind, inputs, counts, size, **settings)
        assert loss == pytest.approx(whole, rel=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("kind", "same"), [("cispo", "dapo"), ("sapo", "grpo"), *zip(*[("grpo", "dr_grpo", "dapo")] * 2)]
)
def test_gradients_are_equal_under_the_policy_that_sampled(kind: str, same: str, level: str) -> None:
    """Objectives differ off-policy only; what is left is how token losses are averaged."""
    inputs, counts = batch(2, per_token=True, noise=0.0)
    _, found = gradient(kind, inputs, counts, importance_sampling_level=level)
    _, expected = gradient(same, inputs, counts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    moved, _ = batch(2, per_token=True)
    if (kind, level) != (same, "token"):  # off-policy they do differ
        _, found = gradient(kind, moved, counts, importance_sampling_level=level)
        assert (found - gradient(same, moved, counts)[1]).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
def test_one_advantage_per_completion_is_the_same_at_each_of_its_tokens(kind: str, level: str) -> None:
    inputs, counts = batch(3, per_token=False)
    loss, expected = gradient(kind, inputs, counts, importance_sampling_level=level)
    spread = inputs._replace(advantages=inputs.advantages[:, None].expand(8, 7))
    again, found = gradient(kind, spread, counts, importance_sampling_level=level)
    assert again == loss and torch.equal(found, expected)


@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
def test_a_token_with_advantage_0_has_no_policy_gradient(kind: str) -> None:
    inputs, counts = batch(4, per_token=True, noise=0.05)  # nothing is clipped
    advantages = inputs.advantages.clone()
    advantages[:, 1::2] = 0
    _, found = gradient(kind, inputs._replace(advantages=advantages), counts, beta=0.0)
    assert not found[:, 1::2].any() and found[:, ::2][inputs.mask[:, ::2]].abs().min() > 0
