"""What an update computes, by counting: the vision tower's passes, the language model's, and the largest tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import ToyData, first_groups, toy_config

from medvqa_rl.config import LoraConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.objective import logprobs
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.setup import make_accelerator, set_up, wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.loading import load_reference
from medvqa_rl.models.qwen_vl import backbone, causal_model

ADVANTAGES = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 4)


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


class Work:
    """A step of four prompts in two micro-batches, and what it ran."""

    def __init__(self, folder, output, model, **changes):
        settings = {"path": str(folder), "device": "cpu", "train_projector": False, **model}
        config = toy_config(folder, output, model=settings, **{"train": {"self_check": False}} | changes)
        accelerator = make_accelerator(config, config.train.prompts_per_step)
        self.setup = set_up(config, ToyData(), None)
        reference = load_reference(self.setup.policy) if config.loss.beta > 0 else None
        trained = wrap(config, accelerator, self.setup.policy)
        self.learner = Learner(config, accelerator, self.setup.policy, reference, trained)
        self.towers: list[int] = []  # patches of each pass of a vision tower
        self.features: list[bool] = []  # whether its result requires gradients
        self.language: list[bool] = []  # whether each pass of a language model had gradients
        modules = [self.setup.policy.model]
        if reference is not None:
            with reference.active() as module:
                modules += [] if module is modules[0] else [module]
        for module in modules:
            backbone(module).visual.register_forward_hook(self._saw)
            backbone(module).language_model.register_forward_hook(self._spoke)
        self.groups = first_groups(config, accelerator, self.setup)
        self.in_rollout = len(self.towers)
        self.language.clear()
        self.metrics = self.learner.update(self.groups, ADVANTAGES, torch.ones(4, 4, dtype=torch.bool), 0)

    def _saw(self, module: Any, inputs: Any, output: Any) -> None:
        self.towers.append(len(inputs[0]))
        self.features.append(output.pooler_output.requires_grad)

    def _spoke(self, module: Any, inputs: Any, output: Any) -> None:
        self.language.append(output.last_hidden_state.requires_grad)


FROZEN = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "adapter, checkpointed": {"lora": {"rank": 2}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_frozen_tower_runs_once_per_prompt_and_step(folder, tmp_path, name, rounds):
    """In the rollout, never in the update: not for the reference, nor in a second round."""
    work = Work(folder, tmp_path, FROZEN[name], loss={"num_iterations": rounds})
    patches = sum(len(group.prompt.pixel_values) for group in work.groups)
    assert sum(work.towers) == patches and len(work.towers) == work.in_rollout
    assert not any(work.features)
    assert all(not group.image_features.requires_grad for group in work.groups)


@pytest.mark.parametrize("trained", ["train_vision", "train_projector"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_a_trained_tower_runs_again_in_every_pass(folder, tmp_path, trained, rounds):
    """Per round one pass over each image with gradients, as its weights have changed; the reference has its own."""
    work = Work(folder, tmp_path, {trained: True}, loss={"num_iterations": rounds})
    patches = sum(len(group.prompt.pixel_values) for group in work.groups)
    assert all(group.image_features is None for group in work.groups)
    assert sum(work.towers) == patches * (1 + 1 + rounds)  # rollout, reference, rounds
    assert sum(work.features) == 2 * rounds  # two micro-batches


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("rounds", [1, 3])
def test_no_pass_is_made_for_the_old_log_probabilities(folder, tmp_path, beta, rounds):
    """Two micro-batches: one pass each with gradients per round, one without for the reference, and no other."""
    work = Work(folder, tmp_path, {}, loss={"beta": beta, "num_iterations": rounds})
    assert sum(work.language) == 2 * rounds
    assert len(work.language) - sum(work.language) == (2 if beta else 0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements[str(func)] = max(self.elements.get(str(func), 0), leaf.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains_head", [True, False])
def test_logits_of_all_tokens_never_exist_at_once(tiny_policy, make_sample, monkeypatch, dtype, trains_head):
    policy = tiny_policy(lora=None if trains_head else LoraConfig(rank=2))
    policy.model.to(dtype).train()
    rng = np.random.default_rng(0)
    sample = make_sample(images=())
    completions = [Completion(tuple(int(i) for i in rng.integers(0, 300, 60)), "", False) for _ in range(4)]
    batch = collate([Group(sample, policy.processor.encode(sample), completions)], policy.processor, "cpu")
    num_words = causal_model(policy.model).lm_head.weight.shape[0]
    all_logits = len(batch.targets) * num_words
    sizes = {}
    for chunk in (16, len(batch.targets)):
        monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", chunk * num_words)
        policy.model.zero_grad()
        with Largest() as largest:
            stats = GroupForward(policy.model)(batch, temperature=0.7, with_entropy=True)
            stats.logps.sum().backward()
        assert stats.logps.dtype == stats.entropy.dtype == torch.float32
        sizes[chunk] = max(largest.elements.values())
    assert sizes[len(batch.targets)] >= all_logits  # what is measured would show
    assert sizes[16] < all_logits / 2
