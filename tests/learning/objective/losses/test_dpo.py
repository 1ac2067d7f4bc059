"""Online DPO: preference pairs, the loss by hand, and its gradient against separate rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from medvqa_rl.config import Config, ConfigError, LossConfig, ModelConfig, RolloutConfig, TrainConfig
from medvqa_rl.config.yaml import build_config
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.objective.losses.dpo import dpo_loss, preference_pairs, preferences
from medvqa_rl.learning.objective.losses.loss import LossInputs, StepCounts
from medvqa_rl.learning.setup import make_accelerator, wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.reference import load_reference
from medvqa_rl.rollout.decode import RolloutEngine

NAN = math.nan


def test_preferences_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [NAN, 0.5, 1.0], [NAN, NAN, 1.0], [2.0, 0.0, 2.0]])
    assert preferences(rewards).tolist() == [[1, 2], [-1, -1], [2, 1], [-1, -1], [0, 1]]


def test_loss_by_hand():
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -9.0], [-1.0, -1.0], [-1.0, -1.0]])
    reference = torch.tensor([[-2.0, -2.5], [-2.0, -9.0], [-5.0, -1.0], [-1.0, -1.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    signs = torch.tensor([1.0, -1.0, 0.0, 0.0])
    # d of the chosen: 1 + 0.5, of the rejected: -1 (its second token does not count); margin 2.5, times 0.2.
    expected = math.log1p(math.exp(-0.5)) / 3
    config = LossConfig(type="dpo", beta=0.2)
    found = dpo_loss(LossInputs(logps, logps, reference, signs, mask), StepCounts(num_unequal=3), config)
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)
    idle = LossInputs(logps, logps, None, torch.zeros(4), mask)
    assert dpo_loss(idle, StepCounts(), config).loss.item() == 0


def make_learner(policy, micro, *, mask_truncated=False):
    config = Config(
        model=ModelConfig(device="cpu", train_vision=True),
        loss=LossConfig(type="dpo", beta=0.3, mask_truncated_completions=mask_truncated),
        rollout=RolloutConfig(num_generations=4, max_completion_length=12),
        train=TrainConfig(prompts_per_step=3, prompts_per_micro_batch=micro),
    )
    reference = load_reference(policy)
    with torch.no_grad():  # away from the reference, so that not all margins are 0
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    accelerator = make_accelerator(config, 3)
    learner = Learner(config, accelerator, policy, reference, wrap(config, accelerator, policy))
    return config, reference, learner


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_gradient_equals_separate_rows(micro, mask_truncated, tiny_policy, make_sample):
    """With masking, the pair whose rejected completion is truncated leaves loss, gradient, KL and the mean."""
    policy = tiny_policy(train_vision=True)
    config, reference, learner = make_learner(policy, micro, mask_truncated=mask_truncated)
    samples = [make_sample(f"q{index}") for index in range(3)]
    groups = RolloutEngine(policy).rollout(samples, config.rollout, seed=0, stream="train", step=0)
    for index, group in enumerate(groups):
        group.completions = [
            replace(completion, is_truncated=(index, number) == (2, 1))
            for number, completion in enumerate(group.completions)
        ]
    rewards = torch.tensor([[0.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0]])
    pairs, signs, scored = preference_pairs(groups, rewards)
    assert signs.tolist() == [[1, -1], [0, 0], [1, -1]]
    assert pairs[0].completions == (groups[0].completions[2], groups[0].completions[0])

    experience = learner.prepare(pairs, signs, scored)
    kept = [pairs[0]] if mask_truncated else [pairs[0], pairs[2]]
    assert (experience.counts.num_skipped, experience.counts.num_unequal) == (3 - len(kept), len(kept))
    policy.model.train()
    metrics, _ = learner.accumulate(experience)
    found = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    learner.trained.zero_grad()

    losses, divergences = [], []
    for pair in kept:
        batch = collate([pair], policy.processor, policy.device, layout=Layout.SEPARATE)
        own = GroupForward(policy.model)(batch).logps
        with reference.active() as model, torch.no_grad():
            other = GroupForward(model)(batch).logps
        chosen, rejected = torch.where(batch.mask, own - other, 0.0).sum(1)
        losses.append(-functional.logsigmoid(0.3 * (chosen - rejected)))
        gaps = (other - own.detach())[batch.mask]
        divergences.append(gaps.exp() - gaps - 1)
    loss = torch.stack(losses).mean()
    assert metrics["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and loss.item() != pytest.approx(math.log(2))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]).norm()
    clip = min(1.0, 1.0 / float(norm))  # optimizer.max_grad_norm
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad:
            expected = parameter.grad * clip
            assert (found[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


def test_dpo_refuses_beta_0_and_several_iterations():
    with pytest.raises(ConfigError, match=r"loss\.beta is 0, but loss\.type=dpo"):
        build_config({"loss": {"type": "dpo", "beta": 0.0}}, purpose="train")
    with pytest.raises(ConfigError, match=r"loss\.num_iterations is 2, but loss\.type=dpo"):
        build_config({"loss": {"type": "dpo", "num_iterations": 2}}, purpose="train")
