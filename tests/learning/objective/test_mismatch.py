"""The correction for another engine's probabilities: numbers by hand, and exact equality where they are the same.

test_grpo_loss.py compares a weighted loss with TRL's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from medvqa_rl.config import Config
from medvqa_rl.learning.objective.mismatch import Mismatch, importance_weights, sampled_logps
from medvqa_rl.learning.setup import wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.reference import load_reference
from medvqa_rl.rollout.decode import RolloutEngine

NAN = float("nan")


def test_weights_by_hand():
    logps = torch.tensor([[math.log(0.5), math.log(0.2), math.log(0.9), -1.0, -1.0]])
    sampled = torch.tensor([[math.log(0.25), math.log(0.4), math.log(0.1), -1.0, NAN]])
    assert importance_weights(logps, sampled, clip_max=2.0).tolist() == [pytest.approx([2.0, 0.5, 2.0, 1.0, 1.0])]
    assert importance_weights(logps, sampled, clip_max=4.0)[0, 2] == 4.0
    assert importance_weights(logps, sampled, clip_max=10.0)[0, 2] == pytest.approx(9.0)


def test_statistics_by_hand():
    """Masked tokens and unknown ones: a weight of 1 counts, a difference that is not known does not."""
    statistics = Mismatch(torch.device("cpu"))
    logps = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]])
    sampled = torch.tensor([[-1.5, -1.0, -1.0], [NAN, -1.25, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    for rows in ([0], [1]):
        weights = importance_weights(logps[rows], sampled[rows], clip_max=1.5)
        statistics.add(logps[rows], sampled[rows], weights, mask[rows])
    statistics.add(logps[:1], sampled[:1], weights, torch.zeros(1, 3, dtype=torch.bool))  # changes nothing
    weights = [1.5, math.exp(-1), 1.0, math.exp(0.25)]
    assert statistics.metrics(Accelerator(cpu=True)) == pytest.approx(
        {
            "sampling/sampling_logp_difference/mean": (0.5 + 1.0 + 0.25) / 3,
            "sampling/sampling_logp_difference/max": 1.0,
            "sampling/importance_sampling_ratio/min": math.exp(-1),
            "sampling/importance_sampling_ratio/mean": sum(weights) / 4,
            "sampling/importance_sampling_ratio/max": 1.5,
        }
    )
    assert Mismatch(torch.device("cpu")).metrics(Accelerator(cpu=True)) == {}


@pytest.fixture
def learn(tiny_policy, mixed_samples):
    """Metrics and gradients of one rollout: ``learn(shift)``, where vLLM is said to have sampled each token ``shift``
    nats less likely than training finds it; with None the policy's own engine has sampled."""
    advantages = torch.tensor([[1.0, -1.0], [0.5, -0.5], [2.0, -2.0], [-1.0, 1.0]])

    def run(shift, *, loss="dapo", beta=0.04, **vllm):
        policy = tiny_policy()
        sections = {
            "rollout": {"num_generations": 2, "max_completion_length": 6},
            "loss": {"type": loss, "beta": beta},
            "optimizer": {"max_grad_norm": None},
            "train": {"prompts_per_micro_batch": 3},
            "vllm": vllm,
        }
        config = Config.model_validate(sections)
        reference = load_reference(policy) if beta else None
        groups = RolloutEngine(policy).rollout(mixed_samples, config.rollout, seed=0, stream="train", step=0)

        def accumulate(config):
            accelerator = Accelerator(cpu=True)
            learner = Learner(config, accelerator, policy, reference, wrap(config, accelerator, policy))
            experience = learner.prepare(groups, advantages, torch.ones(4, 2, dtype=torch.bool))
            return experience.micro_batches, *learner.accumulate(experience)

        micro_batches, metrics, tables = accumulate(config)
        if shift is not None:
            policy.model.zero_grad()
            for micro, table in zip(micro_batches, tables, strict=True):
                logps = iter(row[kept] - shift for row, kept in zip(table, micro.mask, strict=True))
                for group in micro.groups:
                    group.completions = [
                        replace(completion, logps=tuple(next(logps).tolist())) for completion in group.completions
                    ]
            sections["rollout"]["engine"] = "vllm"
            _, metrics, _ = accumulate(Config.model_validate(sections))
        return metrics, {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}

    return run


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_equal_probabilities_leave_loss_and_gradient_unchanged(learn, loss):
    plain, expected = learn(None, loss=loss)
    metrics, gradients = learn(0.0, loss=loss)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected) and len(gradients) == len(expected)
    assert {name: value for name, value in metrics.items() if "sampling/" not in name} == plain
    assert metrics["sampling/sampling_logp_difference/max"] == 0.0
    assert metrics["sampling/importance_sampling_ratio/min"] == metrics["sampling/importance_sampling_ratio/max"] == 1


def test_the_gradient_is_weighted_by_the_truncated_ratio(learn):
    """Where each token was sampled at a part of its probability the gradient grows by as much, up to the limit."""
    _, plain = learn(None, beta=0.0)
    for shift, limit, factor in ((math.log(1.5), 2.0, 1.5), (math.log(8), 2.0, 2.0), (math.log(8), 10.0, 8.0)):
        metrics, weighted = learn(shift, beta=0.0, importance_sampling_clip_max=limit)
        for name, gradient in plain.items():
            assert (weighted[name] - factor * gradient).norm() <= 1e-5 * factor * gradient.norm() + 1e-8, name
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(factor, rel=1e-5)
        assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(shift, rel=1e-5)


def test_the_correction_is_optional_and_absent_for_preferences(learn):
    """The mismatch is measured all the same."""
    for settings in ({"importance_sampling_correction": False}, {"loss": "dpo"}):
        loss = settings.get("loss", "dapo")
        _, expected = learn(None, loss=loss)
        metrics, gradients = learn(1.0, **settings)
        assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(1.0, rel=1e-5)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_completions_without_sampling_log_probabilities_are_refused(tiny_policy, mixed_samples):
    config = Config().rollout.model_copy(update={"num_generations": 2, "max_completion_length": 3})
    groups = RolloutEngine(tiny_policy()).rollout(mixed_samples[:1], config, seed=0, stream="train", step=0)
    with pytest.raises(AssertionError, match="has no sampling log-probabilities"):
        sampled_logps(groups, torch.ones(2, 3, dtype=torch.bool))
