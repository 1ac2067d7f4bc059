"""The policy update: against an independent implementation, with skipped groups, and what it computes by counting."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import ToyData, first_groups, toy_config

from medvqa_rl.config import Config, LoraConfig, LossConfig
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning import update
from medvqa_rl.learning.objective import logprobs
from medvqa_rl.learning.objective.advantages import have_signal
from medvqa_rl.learning.objective.logprobs import GroupForward, collate
from medvqa_rl.learning.objective.micro_batches import contributing
from medvqa_rl.learning.setup import make_accelerator, make_reference, set_up, wrap
from medvqa_rl.learning.update import LOSSES, Learner
from medvqa_rl.models.families.parts import backbone, causal_model
from medvqa_rl.models.reference import load_reference


def test_every_loss_type_has_a_loss():
    assert LOSSES.keys() == set(get_args(LossConfig.model_fields["type"].annotation))


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder("qwen2_vl")


PLAIN_ADVANTAGES = torch.tensor([[1.0, -0.5, -0.5], [0.6, 0.6, -1.2], [-0.8, 1.3, -0.5], [0.4, -1.1, 0.7]])
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


KEPT = [index for index in range(12) if index != 3 * TRUNCATED[0] + TRUNCATED[1]]


def plain_loss(kind, logps, old, reference, entropies, first_entropies, *, coef=0.0, share=1.0, level="token"):
    """The loss of a step, written out; each argument has a row with a value per token for each completion.

    Sequence-level ratios are written for equal advantages in a completion, and without a choice of tokens.
    """
    threshold = torch.cat([first_entropies[index] for index in KEPT]).quantile(1 - share)
    top = [row >= threshold for row in first_entropies]
    per_completion = []
    for index in KEPT:
        advantage = PLAIN_ADVANTAGES.flatten()[index] * top[index]
        gap = logps[index] - old[index]
        ratio = (gap.mean() if level == "sequence" else gap).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        policy = {
            "cispo": -ratio.detach().clamp(max=5) * advantage * logps[index],
            "sapo": -torch.sigmoid(torch.where(advantage > 0, 1.0, 1.05) * (ratio - 1))
            * (4 / torch.where(advantage > 0, 1.0, 1.05) * advantage),
        }.get(kind, -torch.minimum(ratio * advantage, clipped * advantage))
        difference = reference[index] - logps[index]
        per_completion.append(policy + BETA * (difference.exp() - difference - 1))
    # The masked completion leaves the numerator and dapo's tokens; 12 completions stay 12.
    bonus = coef * torch.cat([entropies[index][top[index]] for index in KEPT]).mean()
    if kind in ("grpo", "sapo"):
        return sum(tokens.mean() for tokens in per_completion) / 12 - bonus
    total = torch.cat(per_completion).sum()
    return total / (12 * LIMIT if kind == "dr_grpo" else sum(len(logps[index]) for index in KEPT)) - bonus


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("grpo", {}),
        ("dr_grpo", {}),
        ("dapo", {"entropy_coef": 0.1}),
        ("grpo", {"importance_sampling_level": "sequence"}),
        ("cispo", {}),
        ("sapo", {"top_entropy_quantile": 0.4}),
        ("dapo", {"entropy_coef": 0.1, "top_entropy_quantile": 0.4}),
    ],
    ids=str,
)
def test_update_equals_plain_rows(tiny_policy, mixed_samples, stock_logps, kind, changes):
    """Three rounds on two micro-batches: every round's gradient, and the mean of the losses."""
    # A large epsilon of Adam: otherwise rounding decides the sign of its step where a gradient is almost zero.
    optimizer = {"learning_rate": 0.03, "epsilon": 0.01, "weight_decay": 0.1, "max_grad_norm": None}
    config = Config.model_validate(
        {
            "model": {"device": "cpu"},
            "rollout": {"num_generations": 3, "max_completion_length": LIMIT, "temperature": TEMPERATURE},
            "loss": {"type": kind, "beta": BETA, "num_iterations": ROUNDS, "mask_truncated_completions": True}
            | changes,
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
    metrics = learner.update(groups, PLAIN_ADVANTAGES, torch.ones(4, 3, dtype=torch.bool), 0)

    parameters = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embed_tokens" not in name]
    others = [p for name, p in parameters.items() if p.ndim == 1 or "embed_tokens" in name]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], 0.03, eps=0.01)
    adamw.param_groups[1]["weight_decay"] = 0.0
    with reference.active() as model, torch.no_grad():
        reference_logps = stock_logps(model, groups, TEMPERATURE)[0]
    losses, old, first_entropies = [], None, None
    names = {"entropy_coef": "coef", "top_entropy_quantile": "share", "importance_sampling_level": "level"}
    for gradients in found:
        logps, entropies = stock_logps(plain, groups, TEMPERATURE)
        if old is None:
            old, first_entropies = ([row.detach() for row in rows] for rows in (logps, entropies))
        options = {names[name]: value for name, value in changes.items()}
        loss = plain_loss(kind, logps, old, reference_logps, entropies, first_entropies, **options)
        loss.backward()
        for name, parameter in parameters.items():
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-7, (len(losses), name)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    assert len(losses) == ROUNDS
    assert metrics["loss"] == pytest.approx(sum(losses) / ROUNDS, rel=1e-4)
    if kind not in ("cispo", "sapo"):
        assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01


def test_advantages_per_token(tiny_policy, mixed_samples):
    """The same in every token as one for the completion, bit for bit; and a token's own advantage reaches it."""
    settings = {"loss": {"beta": 0.0}, "optimizer": {"max_grad_norm": None}, "model": {"device": "cpu"}}
    policy = tiny_policy()
    policy.model.train()
    groups = make_groups(policy, mixed_samples)
    config = Config.model_validate(settings)
    learner = Learner(config, Accelerator(cpu=True), policy, None, wrap(config, Accelerator(cpu=True), policy))
    lengths = [[len(completion.token_ids) for completion in group.completions] for group in groups]
    scored = torch.ones(4, 3, dtype=torch.bool)

    def gradient(advantages):
        experience = learner.prepare(groups, advantages, scored)
        learner.accumulate(experience)
        found = {name: p.grad.clone() for name, p in learner.trained.parameters.items()}
        learner.trained.zero_grad()
        return found, experience.counts

    one, counts = gradient(PLAIN_ADVANTAGES)
    spread = [[a.expand(size) for a, size in zip(row, sizes)] for row, sizes in zip(PLAIN_ADVANTAGES, lengths)]
    found, spread_counts = gradient(spread)
    assert counts == spread_counts
    assert all(torch.equal(found[name], value) for name, value in one.items())
    # Only the first token of the second group's last completion.
    single = [[torch.zeros(size) for size in sizes] for sizes in lengths]
    single[1][2][0] = 2.0
    found, counts = gradient(single)
    assert (counts.num_skipped, counts.num_unequal) == (3, 1)
    batch = collate(groups, policy.processor, "cpu")
    (-2.0 * GroupForward(policy.model)(batch).logps[5, 0] / lengths[1][2] / 12).backward()
    for name, parameter in learner.trained.parameters.items():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-8, name


SKIPPED_ADVANTAGES = torch.tensor([[0.0] * 4, [0.5, -0.5, 0.0, 0.0], [0.0] * 4, [0.25, 0.25, 0.25, -0.75]])
IS_SCORED = torch.tensor([[True] * 4, [True] * 4, [True, False, True, True], [True] * 4])


def prepare(folder, tmp_path, advantages, *, text_only=(), **changes):
    """A learner and the experience of four groups; those at ``text_only`` have no image."""
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


def test_contributing_groups():
    has_signal = have_signal(SKIPPED_ADVANTAGES)
    assert contributing(has_signal, needs_every_group=False) == [1, 3]
    assert contributing(has_signal, needs_every_group=True) == [0, 1, 2, 3]
    assert contributing(torch.zeros(3, dtype=torch.bool), needs_every_group=False) == [0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("text_only", [(), (1, 3)])
def test_skipping_groups_changes_neither_gradient_nor_loss(folder, tmp_path, monkeypatch, kind, text_only):
    changes = {"loss": {"type": kind, "beta": 0.0}, "optimizer": {"max_grad_norm": None}}
    learner, experience = prepare(folder, tmp_path, SKIPPED_ADVANTAGES, text_only=text_only, **changes)
    assert [len(micro.groups) for micro in experience.micro_batches] == [2]
    skipped, skipped_metrics = gradients_and_metrics(learner, experience)

    monkeypatch.setattr(update, "contributing", lambda has_signal, needs_every_group: list(range(4)))
    learner, experience = prepare(folder, tmp_path, SKIPPED_ADVANTAGES, text_only=text_only, **changes)
    assert [len(micro.groups) for micro in experience.micro_batches] == [2, 2]
    whole, metrics = gradients_and_metrics(learner, experience)

    assert max(gradient.norm() for gradient in whole.values()) > 1e-4
    for name, gradient in whole.items():
        assert skipped[name] is not None, name
        assert (skipped[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
    assert (skipped_metrics["frac_groups_skipped"], metrics["frac_groups_skipped"]) == (0.5, 0.0)
    for name in metrics.keys() - {"frac_groups_skipped", "entropy"}:
        assert skipped_metrics[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("loss", [{"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_no_group_is_skipped_if_its_entropy_counts(folder, tmp_path, loss):
    _, experience = prepare(folder, tmp_path, SKIPPED_ADVANTAGES, loss={"beta": 0.0} | loss)
    assert experience.counts.num_skipped == 0
    assert sum(len(micro.groups) for micro in experience.micro_batches) == 4


def test_no_kl_is_logged_without_a_reference(folder, tmp_path):
    assert "kl" not in gradients_and_metrics(*prepare(folder, tmp_path, SKIPPED_ADVANTAGES))[1]


def test_equal_rewards_give_zero_gradients(folder, tmp_path):
    """They are zero and not None, so that the optimizer's moments decay as if all groups were computed."""
    learner, experience = prepare(folder, tmp_path, torch.zeros(4, 4))
    gradients, metrics = gradients_and_metrics(learner, experience)
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
    assert (metrics["loss"], metrics["grad_norm"], metrics["frac_groups_skipped"]) == (0.0, 0.0, 0.75)


def test_entropy_covers_the_computed_groups(folder, tmp_path):
    learner, experience = prepare(folder, tmp_path, SKIPPED_ADVANTAGES)
    _, metrics = gradients_and_metrics(learner, experience)
    (micro,) = experience.micro_batches
    with torch.no_grad():
        stats = learner.trained.forward(micro.batch, temperature=1.0, entropy="value")
    assert metrics["entropy"] == pytest.approx(float(stats.entropy[micro.mask].mean()), rel=1e-5)
    assert experience.counts.num_computed_tokens == int(micro.mask.sum()) < experience.counts.num_tokens


class Work:
    """Runs a step of four prompts in two micro-batches and records the passes of the models."""

    def __init__(self, folder, output, model, **changes):
        settings = {"path": str(folder), "device": "cpu", "train_projector": False, **model}
        config = toy_config(folder, output, model=settings, **{"train": {"self_check": False}} | changes)
        accelerator = make_accelerator(config, config.train.prompts_per_step)
        self.setup = set_up(config, ToyData(), None)
        reference = make_reference(config, self.setup.policy)
        trained = wrap(config, accelerator, self.setup.policy)
        self.learner = Learner(config, accelerator, self.setup.policy, reference, trained)
        self.towers: list[int] = []  # patches in each pass of a vision tower
        self.features: list[bool] = []  # whether its output requires gradients
        self.language: list[bool] = []  # whether each pass of a language model had gradients
        modules = [self.setup.policy.model]
        if reference is not None:
            with reference.active() as module:
                modules += [] if module is modules[0] else [module]
        for module in modules:
            backbone(module).visual.register_forward_hook(self._record_tower)
            backbone(module).language_model.register_forward_hook(self._record_language)
        self.groups = first_groups(config, accelerator, self.setup)
        self.in_rollout = len(self.towers)
        self.language.clear()
        advantages = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 4)
        self.learner.update(self.groups, advantages, torch.ones(4, 4, dtype=torch.bool), 0)

    def _record_tower(self, module: Any, inputs: Any, output: Any) -> None:
        self.towers.append(len(inputs[0]))
        self.features.append(output.pooler_output.requires_grad)

    def _record_language(self, module: Any, inputs: Any, output: Any) -> None:
        self.language.append(output.last_hidden_state.requires_grad)


FROZEN = {
    "full": {},
    "checkpointed": {"gradient_checkpointing": True},
    "adapter, checkpointed": {"lora": {"rank": 2}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("rounds", [1, 2])
def test_frozen_tower_runs_once_per_prompt_and_step(folder, tmp_path, name, rounds):
    """It runs in the rollout, and never in the update: not for the reference, nor in a second round."""
    work = Work(folder, tmp_path, FROZEN[name], loss={"num_iterations": rounds})
    patches = sum(len(group.prompt.image_inputs["pixel_values"]) for group in work.groups)
    assert sum(work.towers) == patches and len(work.towers) == work.in_rollout
    assert not any(work.features)
    assert all(not group.image_features.requires_grad for group in work.groups)


@pytest.mark.parametrize("trained", ["train_vision", "train_projector"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_trained_tower_runs_in_every_pass(folder, tmp_path, trained, rounds):
    """Each round makes one pass over each image with gradients, since the weights changed; so does the reference."""
    work = Work(folder, tmp_path, {trained: True}, loss={"num_iterations": rounds})
    patches = sum(len(group.prompt.image_inputs["pixel_values"]) for group in work.groups)
    assert all(group.image_features is None for group in work.groups)
    assert sum(work.towers) == patches * (1 + 1 + rounds)  # rollout, reference, rounds
    assert sum(work.features) == 2 * rounds  # two micro-batches


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("rounds", [1, 3])
def test_no_extra_pass_for_old_log_probabilities(folder, tmp_path, beta, rounds):
    """Two micro-batches: one pass each with gradients per round, one without for the reference, and no other."""
    work = Work(folder, tmp_path, {}, loss={"beta": beta, "num_iterations": rounds})
    assert sum(work.language) == 2 * rounds
    assert len(work.language) - sum(work.language) == (2 if beta else 0)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that each operation returns, forward or backward."""

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
@pytest.mark.parametrize("entropy", ["value", "gradient"])
def test_full_logits_are_never_materialised(tiny_policy, make_sample, monkeypatch, dtype, trains_head, entropy):
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
            stats = GroupForward(policy.model)(batch, temperature=0.7, entropy=entropy)
            (stats.logps + stats.entropy).sum().backward()
        assert stats.logps.dtype == stats.entropy.dtype == torch.float32
        sizes[chunk] = max(largest.elements.values())
    assert sizes[len(batch.targets)] >= all_logits  # the measurement can see them
    assert sizes[16] < all_logits / 2
