"""Loss, gradient and metrics against TRL's own ``_compute_loss``, run on a stand-in trainer with the same tensors."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medvqa_rl.config import LossConfig
from medvqa_rl.config.problems.loss import FROM_ADVANTAGES
from medvqa_rl.learning.objective.entropy import entropy_bonus, top_entropy
from medvqa_rl.learning.objective.losses import LOSSES
from medvqa_rl.learning.objective.losses.grpo import grpo_loss
from medvqa_rl.learning.objective.losses.loss import LossInputs, LossOutput, StepCounts
from medvqa_rl.learning.objective.mismatch import importance_weights

GENERATOR = torch.Generator().manual_seed(2)
MASK = torch.arange(9) < torch.tensor([[9], [4], [1], [7]])
OLD = -3 * torch.rand(4, 9, generator=GENERATOR)
REFERENCE = OLD + 0.5 * torch.randn(4, 9, generator=GENERATOR)
START = OLD + 0.4 * torch.randn(4, 9, generator=GENERATOR)
SAMPLED = OLD + 0.6 * torch.randn(4, 9, generator=GENERATOR)
SAMPLED[0, 3] = SAMPLED[3, 0] = torch.nan
ENTROPIES = torch.rand(4, 9, generator=GENERATOR)
ADVANTAGES = torch.tensor([1.2, -0.7, 0.0, -0.5])
PER_TOKEN = torch.randn(4, 9, generator=GENERATOR)
COUNTS = StepCounts(num_completions=4, num_tokens=int(MASK.sum()), token_budget=4 * 12)


def one_rank() -> SimpleNamespace:
    """What TRL's losses ask of their accelerator."""
    return SimpleNamespace(
        gather=lambda value: value,
        reduce=lambda value, reduction: value,
        pad_across_processes=lambda value, **_: value,
        num_processes=1,
    )


def trl_loss(
    kind: str,
    logps: torch.Tensor,
    entropies: torch.Tensor,
    advantages: torch.Tensor,
    *,
    level: str = "token",
    beta: float = 0.0,
    epsilon_high: float = 0.2,
    corrects: bool = False,
    coef: float = 0.0,
    share: float = 1.0,
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """The loss of TRL's ``GRPOTrainer`` and what it logs."""
    trainer_class = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    # As in TRL 1.16, grpo_trainer.py, where vllm_importance_sampling_mode is token_truncate.
    ratio = torch.clamp(torch.exp(torch.nan_to_num((OLD - SAMPLED) * MASK, nan=0.0)), min=None, max=2.0)
    assert (ratio == 2.0).any()
    temperatures = {"sapo_temperature_pos": 1.3, "sapo_temperature_neg": 1.7}
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=share,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=kind,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        use_vllm=corrects,
        vllm_importance_sampling_correction=True,
        max_completion_length=12,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(**vars(one_rank()), sync_gradients=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1, **temperatures),
        _entropy_bonus_enabled=coef != 0,
        entropy_coef=coef,
        use_adaptive_entropy=False,
        _metrics={"train": defaultdict(list)},
    )
    trainer.get_high_entropy_mask = partial(trainer_class.get_high_entropy_mask, trainer)
    inputs = {
        "prompt_ids": torch.zeros(4, 1),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 9),
        "completion_mask": MASK.int(),
        "advantages": advantages,
        "old_per_token_logps": OLD,
        "ref_per_token_logps": REFERENCE,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": MASK.sum(),
    }
    return trainer_class._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def own_loss(
    kind: str,
    logps: torch.Tensor,
    advantages: torch.Tensor,
    *,
    level: str = "token",
    beta: float = 0.0,
    epsilon_high: float | None = None,
    corrects: bool = False,
) -> LossOutput:
    weights = importance_weights(OLD, SAMPLED, clip_max=2.0) if corrects else None
    config = LossConfig(
        type=kind,
        importance_sampling_level=level,
        beta=beta,
        epsilon_high=epsilon_high,
        sapo_temperature_pos=1.3,
        sapo_temperature_neg=1.7,
    )
    return LOSSES[kind](LossInputs(logps, OLD, REFERENCE if beta else None, advantages, MASK, weights), COUNTS, config)


def leaf(value: torch.Tensor) -> torch.Tensor:
    return value.clone().requires_grad_()


def share_of(values: torch.Tensor) -> float:
    return (values.float() * MASK).sum().item() / int(MASK.sum())


@pytest.mark.parametrize("advantages", [ADVANTAGES, PER_TOKEN], ids=["completions", "tokens"])
@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("epsilon_high", [0.2, 0.28])
@pytest.mark.parametrize("corrects", [False, True], ids=["own", "vllm"])
def test_token_level(kind: str, beta: float, epsilon_high: float, corrects: bool, advantages: torch.Tensor) -> None:
    if kind == "cispo":
        epsilon_high += 1.0  # the largest weight itself
    logps, theirs = leaf(START), leaf(START)
    settings: dict[str, Any] = {"beta": beta, "epsilon_high": epsilon_high, "corrects": corrects}
    expected, metrics = trl_loss(kind, theirs, torch.zeros(4, 9), advantages, **settings)
    output = own_loss(kind, logps, advantages, **settings)
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logps.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    if kind in ("grpo", "dr_grpo", "dapo"):
        assert metrics["clip_ratio/low_mean"][0] == pytest.approx(share_of(output.is_low_clipped))
        assert metrics["clip_ratio/high_mean"][0] == pytest.approx(share_of(output.is_high_clipped))
        assert share_of(output.is_low_clipped) > 0 and share_of(output.is_high_clipped) > 0
    if kind == "cispo":  # TRL counts positive advantages only, but truncates the weights of all
        positive = advantages > 0 if advantages.ndim == 2 else advantages[:, None] > 0
        assert metrics["cispo_clip_ratio"][0] == pytest.approx(share_of(output.is_high_clipped & positive))
        assert metrics["cispo_clip_ratio"][0] > 0
    if beta:
        assert metrics["kl"][0] == pytest.approx(share_of(output.kl), rel=1e-5)


@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_sequence_level(kind: str, beta: float) -> None:
    """GSPO and the other losses with its ratio. TRL's clips whole completions, so a small range clips some."""
    logps, theirs = leaf(START), leaf(START)
    settings: dict[str, Any] = {"beta": beta, "epsilon_high": 1.05 if kind == "cispo" else 0.2, "level": "sequence"}
    expected, metrics = trl_loss(kind, theirs, torch.zeros(4, 9), ADVANTAGES, **settings)
    output = own_loss(kind, logps, ADVANTAGES, **settings)
    expected.backward()
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logps.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert theirs.grad is not None and theirs.grad.any()
    if kind == "grpo":  # TRL counts completions
        assert metrics["clip_ratio/low_mean"][0] == output.is_low_clipped[:, 0].float().mean()
        assert metrics["clip_ratio/high_mean"][0] == output.is_high_clipped[:, 0].float().mean()


@pytest.mark.parametrize("kind", FROM_ADVANTAGES)
@pytest.mark.parametrize(("coef", "share"), [(0.0, 0.3), (0.2, 1.0), (0.2, 0.5), (0.2, 0.01)])
def test_entropy(kind: str, coef: float, share: float) -> None:
    """The bonus and the choice of tokens, with the gradient with respect to both."""
    (logps, entropies), (theirs, their_entropies) = ((leaf(START), leaf(ENTROPIES)) for _ in range(2))
    expected, _ = trl_loss(
        kind, theirs, their_entropies, ADVANTAGES, beta=0.04, epsilon_high=1.5, coef=coef, share=share
    )
    expected.backward()

    (top,) = top_entropy([entropies.detach()], [MASK], share)
    assert 0 < int(top.sum()) <= max(1, share * int(MASK.sum()) + 1)
    advantages = torch.where(top, ADVANTAGES[:, None], 0.0)
    loss = own_loss(kind, logps, advantages, beta=0.04, epsilon_high=1.5).loss
    loss = loss - coef * entropy_bonus(entropies, top, COUNTS._replace(num_top_tokens=int(top.sum())))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logps.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    if coef:
        torch.testing.assert_close(entropies.grad, their_entropies.grad, rtol=1e-6, atol=1e-9)


def test_rloo() -> None:
    """TRL's ``RLOOTrainer`` sums over a completion, so under the policy that sampled its gradient is that of Dr. GRPO
    times ``max_completion_length``."""
    trainer_class = pytest.importorskip("trl.trainer.rloo_trainer").RLOOTrainer
    logps, theirs = leaf(OLD), leaf(OLD)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (theirs, torch.zeros(4, 9), None),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=True),
        accelerator=one_rank(),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, 9),
        "completion_mask": MASK.int(),
        "advantages": ADVANTAGES,
        "old_logps": (OLD * MASK).sum(1),
    }
    trainer_class._compute_loss(trainer, None, inputs).backward()
    config = LossConfig(type="dr_grpo", beta=0.0)
    grpo_loss(LossInputs(logps, OLD, None, ADVANTAGES, MASK), COUNTS, config).loss.backward()
    assert logps.grad is not None
    torch.testing.assert_close(12 * logps.grad, theirs.grad, rtol=1e-5, atol=1e-7)
