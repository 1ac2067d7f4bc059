"""Groups without an advantage are left out of the update when beta is 0, and nothing changes but the time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import ToyData, first_groups, toy_config

from medvqa_rl.learning import update
from medvqa_rl.learning.setup import make_accelerator, set_up, wrap
from medvqa_rl.learning.update import Learner, contributing

ADVANTAGES = torch.tensor([[0.0] * 4, [0.5, -0.5, 0.0, 0.0], [0.0] * 4, [0.25, 0.25, 0.25, -0.75]])
IS_SCORED = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True], [True] * 4])


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


def prepared(folder, tmp_path, advantages, *, text_only=(), **changes):
    """A learner, and the experience of four groups of which those at ``text_only`` have no image."""
    config = toy_config(
        folder,
        tmp_path,
        model={"path": str(folder), "device": "cpu", "train_projector": True, "train_vision": True},
        **{"loss": {"beta": 0.0}} | changes,
    )
    accelerator = make_accelerator(config, config.train.prompts_per_step)
    setup = set_up(config, ToyData(), None)
    groups = first_groups(config, accelerator, setup)
    for index in text_only:
        sample = replace(groups[index].sample, images=())
        groups[index] = replace(groups[index], sample=sample, prompt=setup.policy.processor.encode(sample))
    setup.policy.model.train()
    learner = Learner(config, accelerator, setup.policy, None, wrap(config, accelerator, setup.policy))
    return learner, learner.prepare(groups, advantages, IS_SCORED)


def gradients_and_metrics(learner, experience):
    metrics, _ = learner.accumulate(experience)
    gradients = {name: p.grad for name, p in learner.trained.parameters.items()}
    return gradients, metrics


def test_which_groups_contribute():
    assert contributing(ADVANTAGES, beta=0.0) == [1, 3]
    assert contributing(ADVANTAGES, beta=0.04) == [0, 1, 2, 3]
    assert contributing(torch.zeros(3, 4), beta=0.0) == [0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("text_only", [(), (1, 3)])
def test_gradient_and_loss_are_those_of_all_groups(folder, tmp_path, monkeypatch, kind, text_only):
    changes = {"loss": {"type": kind, "beta": 0.0}, "optimizer": {"max_grad_norm": None}}
    learner, experience = prepared(folder, tmp_path, ADVANTAGES, text_only=text_only, **changes)
    assert [len(micro.groups) for micro in experience.micro_batches] == [2]
    skipped, skipped_metrics = gradients_and_metrics(learner, experience)

    monkeypatch.setattr(update, "contributing", lambda advantages, beta: list(range(len(advantages))))
    learner, experience = prepared(folder, tmp_path, ADVANTAGES, text_only=text_only, **changes)
    assert [len(micro.groups) for micro in experience.micro_batches] == [2, 2]
    whole, metrics = gradients_and_metrics(learner, experience)

    assert max(gradient.norm() for gradient in whole.values()) > 1e-4
    for name, gradient in whole.items():
        assert skipped[name] is not None, name
        assert (skipped[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert (skipped_metrics["frac_groups_skipped"], metrics["frac_groups_skipped"]) == (0.5, 0.0)
    for name in metrics.keys() - {"frac_groups_skipped", "entropy"}:
        assert skipped_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


def test_no_divergence_is_reported_without_a_reference(folder, tmp_path):
    assert "kl" not in gradients_and_metrics(*prepared(folder, tmp_path, ADVANTAGES))[1]


def test_a_step_of_equal_rewards_still_moves_the_optimizer(folder, tmp_path):
    """The running means decay by a gradient of zero, as they would with all groups computed."""
    learner, experience = prepared(folder, tmp_path, torch.zeros(4, 4))
    gradients, metrics = gradients_and_metrics(learner, experience)
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    assert (metrics["loss"], metrics["grad_norm"], metrics["frac_groups_skipped"]) == (0.0, 0.0, 0.75)


def test_entropy_is_that_of_the_computed_groups(folder, tmp_path):
    learner, experience = prepared(folder, tmp_path, ADVANTAGES)
    _, metrics = gradients_and_metrics(learner, experience)
    (micro,) = experience.micro_batches
    with torch.no_grad():
        stats = learner.trained.forward(micro.batch, temperature=1.0, with_entropy=True)
    assert metrics["entropy"] == pytest.approx(float(stats.entropy[micro.mask].mean()), rel=1e-5)
    assert experience.counts.num_computed_tokens == int(micro.mask.sum()) < experience.counts.num_tokens
