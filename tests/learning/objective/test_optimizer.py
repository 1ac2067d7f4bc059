"""Learning rates by table, AdamW by torch's own, and float32 copies of bfloat16 weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medvqa_rl.config import OptimizerConfig
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at, should_decay


@pytest.mark.parametrize(
    ("kind", "warmup", "ratio", "expected"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1, 1]),
        ("constant", 2, 0.0, [0.5, 1, 1, 1, 1]),
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0, 0.2, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 2, 0.0, [0.5, 1, 1, 0.5, 0]),
        ("cosine", 0, 0.0, [1, 0.8535533905932737, 0.5, 0.1464466094067262, 0]),
        ("cosine", 0, 0.5, [1, 0.9267766952966369, 0.75, 0.5732233047033631, 0.5]),
    ],
)
def test_learning_rates_of_five_steps(kind, warmup, ratio, expected):
    config = OptimizerConfig(learning_rate=1.0, lr_scheduler_type=kind, warmup_steps=warmup, min_lr_ratio=ratio)
    assert [lr_at(step, config, 5) for step in range(5)] == pytest.approx(expected, abs=1e-12)


def test_learning_rate_of_a_single_step():
    assert lr_at(0, OptimizerConfig(learning_rate=0.1, lr_scheduler_type="linear"), 1) == 0.1


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).to(dtype)


def test_only_matrices_decay():
    decayed = {name for name, p in network().named_parameters() if should_decay(name, p)}
    assert decayed == {"0.weight", "2.weight"}
    assert not should_decay("model.language_model.embed_tokens.weight", torch.zeros(5, 3))


def test_equals_torch():
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), epsilon=1e-6)
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, config)
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    others = [p for p in theirs.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for seed in range(3):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        for model in (ours, theirs):
            model(x).square().sum().backward()
        optimizer.step(0.005)
        adamw.step()
        adamw.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert all(p.grad is None for p in ours.parameters())


def step(optimizer: Optimizer, model: nn.Module, seed: int, rate: float) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
    model(x).square().sum().backward()
    optimizer.step(rate)


def test_small_updates_of_bfloat16_weights_add_up():
    model = network(torch.bfloat16)
    before = model[0].weight.detach().clone()
    optimizer = Optimizer(model, OptimizerConfig(learning_rate=1e-5))
    for _ in range(3):
        step(optimizer, model, 0, 1e-5)
    is_large = before.abs() > 0.25  # there bfloat16's rounding step is 0.002, far above an update
    assert torch.equal(model[0].weight[is_large], before[is_large])
    for _ in range(400):
        step(optimizer, model, 0, 1e-5)
    moved = (model[0].weight - before)[is_large].abs()
    assert is_large.any() and (moved >= 0.003).all()  # about 400 times 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_restored_exactly(dtype):
    config = OptimizerConfig(learning_rate=1e-2)
    first = network(dtype)
    optimizer = Optimizer(first, config)
    for seed in range(2):
        step(optimizer, first, seed, 1e-2)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    weights = {name: tensor.clone() for name, tensor in first.state_dict().items()}

    second = network(dtype)
    second.load_state_dict(weights)
    resumed = Optimizer(second, config)
    resumed.load_state_tensors(saved)
    for seed in range(2, 4):
        step(optimizer, first, seed, 1e-2)
        step(resumed, second, seed, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    tensors = resumed.state_tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in optimizer.state_tensors().items())


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="No parameter of the model is trained"):
        Optimizer(network().requires_grad_(False), OptimizerConfig())
