"""GRPO losses: values computed by hand, TRL's own loss code, and invariance to the micro-batch split."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.learning.objective.grpo_loss import grpo_loss
from medvqa_rl.learning.objective.loss import LossInputs, StepCounts, aggregate, k3_divergence
from medvqa_rl.learning.objective.mismatch import importance_weights

LOG = math.log


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def one_row(logps, old, advantage, reference=None, **config):
    """The loss of one completion, summed over its tokens."""
    inputs = LossInputs(logps, old, reference, torch.tensor([advantage]), torch.ones_like(logps, dtype=torch.bool))
    config = LossConfig(type="dapo", beta=0.0 if reference is None else 0.04, **config)
    return grpo_loss(inputs, StepCounts(num_tokens=1), config)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "low", "high"),
    [
        (1.0, 2.0, -2.0, False, False),
        (1.1, 2.0, -2.2, False, False),
        (1.5, 2.0, -2.4, False, True),  # clipped above: min(3.0, 1.2 * 2)
        (0.5, 2.0, -1.0, False, False),  # a low ratio is not clipped if the advantage is positive
        (0.5, -2.0, 1.6, True, False),  # clipped below: -min(-1.0, 0.8 * -2)
        (1.5, -2.0, 3.0, False, False),  # a high ratio is not clipped if the advantage is negative
        (1.5, 0.0, 0.0, False, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, expected, low, high):
    result = one_row(tensor(LOG(ratio)), tensor(0.0), advantage)
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    assert (result.is_low_clipped.item(), result.is_high_clipped.item()) == (low, high)


def test_separate_upper_clip_range():
    assert one_row(tensor(LOG(1.5)), tensor(0.0), 1.0, epsilon_high=0.4).loss.item() == pytest.approx(-1.4)
    assert one_row(tensor(LOG(0.5)), tensor(0.0), -1.0, epsilon_high=0.4).loss.item() == pytest.approx(0.8)


def test_gradient_stops_where_clipped_and_equals_minus_advantage_on_policy():
    logps = tensor(0.0, LOG(1.5), LOG(0.5)).requires_grad_()
    one_row(logps, torch.zeros(1, 3).double(), 2.0).loss.backward()
    assert logps.grad is not None
    assert logps.grad[0].tolist() == pytest.approx([-2.0, 0.0, -1.0])  # d(ratio A)/d(log pi) = ratio A


def test_divergence_by_hand():
    # d = log 2: 2 - log 2 - 1; d = 0: 0; d = -log 2: 0.5 + log 2 - 1
    logps, reference = tensor(LOG(0.25), LOG(0.25), LOG(0.5)), tensor(LOG(0.5), LOG(0.25), LOG(0.25))
    expected = [1 - LOG(2), 0.0, LOG(2) - 0.5]
    assert k3_divergence(logps, reference)[0].tolist() == pytest.approx(expected)
    result = one_row(logps, logps, 0.0, reference)
    assert result.loss.item() == pytest.approx(0.04 * sum(expected))
    assert result.kl[0].tolist() == pytest.approx(expected)


def test_divergence_is_unbiased():
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    expectation = (policy * k3_divergence(policy.log(), reference.log())).sum()
    assert expectation.item() == pytest.approx((policy * (policy / reference).log()).sum().item(), rel=1e-12)


MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
VALUES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 100.0, math.nan], [9.0, 9.0, 9.0, 9.0]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("grpo", (2.5 + 6.0 + 0.0) / 3),  # the third completion is masked and still counts
        ("dr_grpo", 22.0 / (3 * 10)),
        ("dapo", 22.0 / 6),
    ],
)
def test_aggregation_by_hand(kind, expected):
    counts = StepCounts(num_completions=3, num_tokens=6, token_budget=3 * 10)
    assert aggregate(VALUES, MASK, kind, counts).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_gradient_does_not_depend_on_the_micro_batch_split(kind):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(7) < torch.randint(1, 8, (8, 1), generator=generator)
    old = -torch.rand(8, 7, generator=generator, dtype=torch.float64)
    reference = -torch.rand(8, 7, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(8, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(8, generator=generator, dtype=torch.float64)
    counts = StepCounts(num_completions=8, num_tokens=int(mask.sum()), token_budget=8 * 9)
    results = []
    for size in (8, 4, 2, 1):
        logps = (old + noise).requires_grad_()
        total = 0.0
        for rows in torch.arange(8).split(size):
            inputs = LossInputs(logps[rows], old[rows], reference[rows], advantages[rows], mask[rows])
            loss = grpo_loss(inputs, counts, LossConfig(type=kind)).loss
            loss.backward()
            total += loss.item()
        assert logps.grad is not None
        results.append((total, logps.grad))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-12)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-15)


class _OneRank:
    """What TRL's loss asks of its accelerator."""

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("epsilon_high", [0.2, 0.28])
@pytest.mark.parametrize("corrects", [False, True], ids=["own", "vllm"])
def test_loss_and_gradient_equal_trl(kind, beta, epsilon_high, corrects):
    """Runs the real ``GRPOTrainer._compute_loss`` of TRL on a stand-in trainer with the same tensors."""
    trainer_module = pytest.importorskip("trl.trainer.grpo_trainer")
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
    old = -3 * torch.rand(4, 9, generator=generator)
    reference = old + 0.5 * torch.randn(4, 9, generator=generator)
    start = old + 0.4 * torch.randn(4, 9, generator=generator)
    advantages = torch.tensor([1.2, -0.7, 0.0, -0.5])
    logps_trl, logps = start.clone().requires_grad_(), start.clone().requires_grad_()
    sampled = old + 0.6 * torch.randn(4, 9, generator=generator)
    sampled[0, 3] = sampled[3, 0] = torch.nan
    # As in TRL 1.16, grpo_trainer.py, where vllm_importance_sampling_mode is token_truncate.
    ratio = torch.clamp(torch.exp(torch.nan_to_num((old - sampled) * mask, nan=0.0)), min=None, max=2.0)
    assert (ratio == 2.0).any()

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps_trl, torch.zeros(4, 9), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        use_vllm=corrects,
        vllm_importance_sampling_correction=True,
        max_completion_length=12,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=_OneRank().gather, reduce=_OneRank().reduce, num_processes=1),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 9),
        "completion_mask": mask.int(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": mask.sum(),
    }
    expected = trainer_module.GRPOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()

    inputs = LossInputs(
        logps,
        old,
        reference if beta else None,
        advantages,
        mask,
        importance_weights(old, sampled, clip_max=2.0) if corrects else None,
    )
    counts = StepCounts(num_completions=4, num_tokens=int(mask.sum()), token_budget=4 * 12)
    output = grpo_loss(inputs, counts, LossConfig(type=kind, beta=beta, epsilon=0.2, epsilon_high=epsilon_high))
    loss = output.loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logps.grad, logps_trl.grad, rtol=1e-5, atol=1e-7)
    metrics = trainer._metrics["train"]
    mean = lambda values: (values.float() * mask).sum().item() / int(mask.sum())  # noqa: E731
    assert metrics["clip_ratio/low_mean"][0] == pytest.approx(mean(output.is_low_clipped))
    assert metrics["clip_ratio/high_mean"][0] == pytest.approx(mean(output.is_high_clipped))
    assert mean(output.is_low_clipped) > 0 and mean(output.is_high_clipped) > 0
    if beta:
        assert metrics["kl"][0] == pytest.approx(mean(output.kl), rel=1e-5)
