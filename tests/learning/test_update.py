"""``Learner.update`` against an independent implementation: the stock forward, one completion at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from medvqa_rl.config import Config
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.setup import wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.loading import load_reference

ADVANTAGES = torch.tensor([[1.0, -0.5, -0.5], [0.6, 0.6, -1.2], [-0.8, 1.3, -0.5], [0.4, -1.1, 0.7]])
TRUNCATED = (1, 2)  # masked: its advantage is the largest in its group
ROUNDS, TEMPERATURE, BETA, EPSILON, LIMIT = 3, 0.7, 0.04, 0.2, 8


def make_groups(policy, samples):
    """Four groups of three completions; both halves have the same lengths, so that micro-batches have equal shapes."""
    rng = np.random.default_rng(0)
    groups = []
    for index, sample in enumerate(samples):
        completions = [
            Completion(tuple(rng.integers(0, 300, length).tolist()), "", (index, number) == TRUNCATED)
            for number, length in enumerate([(3, 8, 5), (6, 2, 8)][index % 2])
        ]
        groups.append(Group(sample, policy.processor.encode(sample), completions))
    return groups


def plain_loss(kind, logps, old, reference):
    """The loss of a step, written out; each argument has a row of log-probabilities per completion."""
    per_completion = []
    kept = [index for index in range(12) if index != 3 * TRUNCATED[0] + TRUNCATED[1]]
    for index in kept:
        advantage = ADVANTAGES.flatten()[index]
        ratio = (logps[index] - old[index]).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        difference = reference[index] - logps[index]
        kl = difference.exp() - difference - 1
        per_completion.append(-torch.minimum(ratio * advantage, clipped * advantage) + BETA * kl)
    # The masked completion leaves the numerator and dapo's tokens; 12 completions stay 12.
    if kind == "grpo":
        return sum(tokens.mean() for tokens in per_completion) / 12
    total = torch.cat(per_completion).sum()
    return total / (12 * LIMIT) if kind == "dr_grpo" else total / sum(len(logps[index]) for index in kept)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_update_equals_plain_rows(tiny_policy, mixed_samples, stock_logps, kind):
    """Three rounds on two micro-batches: every round's gradient, and the mean of the losses."""
    # A large epsilon of Adam: otherwise rounding decides the sign of its step where a gradient is almost zero.
    optimizer = {"learning_rate": 0.03, "epsilon": 0.01, "weight_decay": 0.1, "max_grad_norm": None}
    config = Config.model_validate(
        {
            "model": {"device": "cpu"},
            "rollout": {"num_generations": 3, "max_completion_length": LIMIT, "temperature": TEMPERATURE},
            "loss": {"type": kind, "beta": BETA, "num_iterations": ROUNDS, "mask_truncated_completions": True},
            "optimizer": optimizer,
            "train": {"prompts_per_step": 4, "prompts_per_micro_batch": 2, "steps": 1},
        }
    )
    policy = tiny_policy()
    groups = make_groups(policy, mixed_samples)
    reference = load_reference(policy)
    with torch.no_grad():  # away from the reference, so that the divergence is not zero
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    plain = copy.deepcopy(policy.model)
    trained = wrap(config, Accelerator(cpu=True), policy)
    found, step = [], trained.step

    def recording(learning_rate):
        found.append({name: p.grad.clone() for name, p in trained.parameters.items()})
        step(learning_rate)

    trained.step = recording
    learner = Learner(config, trained.accelerator, policy, reference, trained)
    metrics = learner.update(groups, ADVANTAGES, torch.ones(4, 3, dtype=torch.bool), 0)

    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "embed_tokens" in name]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], 0.03, eps=0.01)
    adamw.param_groups[1]["weight_decay"] = 0.0
    with reference.active() as model, torch.no_grad():
        reference_logps = stock_logps(model, groups, TEMPERATURE)[0]
    losses, old = [], None
    for gradients in found:
        logps, _ = stock_logps(plain, groups, TEMPERATURE)
        old = [row.detach() for row in logps] if old is None else old
        loss = plain_loss(kind, logps, old, reference_logps)
        loss.backward()
        for name, parameter in parameters.items():
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-7, (len(losses), name)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert len(losses) == ROUNDS
    assert metrics["loss"] == pytest.approx(sum(losses) / ROUNDS, rel=1e-4)
    assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01
