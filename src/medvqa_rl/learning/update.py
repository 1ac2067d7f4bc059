"""One policy update: reference pass, loss, gradients and optimizer steps on the groups of one rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate.accelerator import Accelerator
from torch import Tensor, nn

from medvqa_rl.config import Config
from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Group
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.objective.logprobs import CompletionBatch, GroupForward, Layout, collate, layout_for
from medvqa_rl.learning.objective.losses import aggregate, dpo_loss, token_loss
from medvqa_rl.learning.objective.micro_batches import split
from medvqa_rl.learning.objective.mismatch import Mismatch, importance_weights, sampled_logps
from medvqa_rl.learning.objective.optimizer import Optimizer, lr_at
from medvqa_rl.learning.objective.self_check import SelfCheckError, check_first_group
from medvqa_rl.learning.run.errors import NonFiniteError
from medvqa_rl.models.loading import Policy, Reference
from medvqa_rl.models.qwen_vl import backbone

_SUMS = ("loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups that share one forward and backward pass."""

    groups: Sequence[Group]
    batch: CompletionBatch
    advantages: Tensor
    """(B,) float32; of pairs, +1 chosen and -1 rejected."""
    mask: Tensor
    """(B, Tc) bool, True at tokens that count in the loss."""
    ref_logps: Tensor | None
    """(B, Tc) under the reference; None where beta is 0 or nothing counts."""
    sampled_logps: Tensor | None = None
    """(B, Tc) where another engine sampled, to correct for it; NaN where unknown, None where nothing is corrected."""


@dataclass(frozen=True)
class Experience:
    """This rank's micro-batches of one rollout, and the denominators over all ranks."""

    micro_batches: Sequence[MicroBatch]
    num_completions: int
    """Scored completions of the step."""
    num_tokens: int
    """Tokens of the step that count in the loss."""
    num_computed_tokens: int
    """Those of them that are in a micro-batch."""
    num_groups: int
    """Groups of the step."""
    num_skipped: int
    """Groups that are in no micro-batch because their gradient is zero."""
    num_unequal: int
    """Groups with an advantage other than 0; of pairs, those with a preference."""


def contributing(advantages: Tensor, beta: float) -> list[int]:
    """Indices of the groups whose loss has a gradient; never none of them.

    With beta 0 a group whose advantages are all 0 adds nothing to the gradient, so leaving it out changes nothing as
    long as it stays in the denominators. One group always stays: wrappers for several devices wait for every rank.

    Args:
        advantages: (P, G) as from ``group_advantages``.
        beta: weight of the divergence, which has a gradient whatever the advantages are.
    """
    if beta > 0:
        return list(range(len(advantages)))
    return (advantages != 0).any(1).nonzero().flatten().tolist() or [0]


class Learner:
    """Updates a policy from scored groups."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        policy: Policy,
        reference: Reference | None,
        trained: TrainedPolicy | Optimizer,
    ) -> None:
        """
        Args:
            reference: the policy before training; None exactly where ``loss.beta`` is 0.
            trained: the policy as an engine trains it; an optimizer stands for one that has all weights.
        """
        assert (reference is None) == (config.loss.beta == 0.0)
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        if isinstance(trained, Optimizer):
            trained = TrainedPolicy(config.optimizer, accelerator, policy, trained)
        self.trained = trained
        self.layout = layout_for(backbone(policy.model).language_model.config._attn_implementation)
        self._is_checked = not config.train.self_check or self.layout == "separate"
        # Preferences (dpo) are learned from whoever wrote what is compared.
        is_sampled_elsewhere = config.rollout.engine == "vllm" and config.loss.type != "dpo"
        self._corrects = is_sampled_elsewhere and config.vllm.importance_sampling_correction

    def update(self, groups: Sequence[Group], advantages: Tensor, is_scored: Tensor, step: int) -> dict[str, float]:
        """Train on this rank's groups: ``num_iterations`` rounds, each with one optimizer step on all of them.

        Args:
            groups: P groups.
            advantages: (P, G) as from ``group_advantages``.
            is_scored: (P, G) bool; unscored completions have no part in the loss, its divergence included.
            step: counted from 0.

        Returns:
            ``loss``, ``kl`` (where there is a reference), ``entropy``, ``clip_ratio/...``, ``grad_norm``,
            ``frac_groups_skipped`` and ``learning_rate`` over all ranks, means over the rounds (entropy: of the first,
            which is the policy that sampled, over the groups that were not skipped). ``sampling/...`` where another
            engine sampled: of the first round, too.

        Raises:
            UnusableSampleError: a group is larger than ``train.max_tokens_per_micro_batch``.
            SelfCheckError: on the first call, the default layout and separate rows disagree on any rank.
            NonFiniteError: the loss or its gradient is not finite; no weight was touched in this round.
        """
        self.trained.forward.train()
        # Dropout draws from torch's generator: addressed like all randomness, so that a resumed run meets the same.
        torch.manual_seed(address(self.config.train.seed, "dropout", step, self.accelerator.process_index))
        experience = self.prepare(groups, advantages, is_scored)
        if not self._is_checked:
            self.check(experience.micro_batches[0])
            self._is_checked = True
        learning_rate = lr_at(step, self.config.optimizer, self.config.train.steps)
        rounds: list[dict[str, float]] = []
        old_logps: list[Tensor] | None = None
        for _ in range(self.config.loss.num_iterations):
            metrics, logps = self.accumulate(experience, old_logps, step)
            if not math.isfinite(metrics["grad_norm"]) or not math.isfinite(metrics["loss"]):
                self.trained.zero_grad()
                raise self._non_finite(experience, logps, metrics, step, is_first_round=not rounds)
            self.trained.step(learning_rate)
            rounds.append(metrics)
            # In the first round the policy is the one that sampled: its log-probabilities are the old ones of all.
            old_logps = logps if old_logps is None else old_logps
        means = {name: sum(metrics[name] for metrics in rounds) / len(rounds) for name in rounds[0]}
        first = {name: value for name, value in rounds[0].items() if name == "entropy" or "sampling/" in name}
        return means | first | {"learning_rate": learning_rate}

    def prepare(self, groups: Sequence[Group], advantages: Tensor, is_scored: Tensor) -> Experience:
        """Lay the groups out in micro-batches, run the reference over them and count the denominators."""
        counts = is_scored.cpu()
        if self.config.loss.mask_truncated_completions:
            is_truncated = [[completion.is_truncated for completion in group.completions] for group in groups]
            counts = counts & ~torch.tensor(is_truncated)
        lengths = torch.tensor([[len(completion.token_ids) for completion in group.completions] for group in groups])
        num_tokens = torch.where(counts, lengths, 0).sum(1)  # (P,) that count
        # The divergence has a gradient in every group; a preference only where there is one.
        kept = contributing(advantages, 0.0 if self.config.loss.type == "dpo" else self.config.loss.beta)
        parts = split(
            groups,
            kept,
            layout=self.layout,
            max_groups=self.config.train.prompts_per_micro_batch,
            max_tokens=self.config.train.max_tokens_per_micro_batch,
            max_completion_length=self.config.rollout.max_completion_length,
        )
        micro_batches = []
        with self._reference_forward() as reference:
            for indices in parts:
                own = [groups[index] for index in indices]
                batch = self.collate(own, self.layout)
                micro_batches.append(
                    MicroBatch(
                        groups=own,
                        batch=batch,
                        advantages=advantages[indices].reshape(-1).float().to(batch.mask.device),
                        mask=batch.mask & counts[indices].reshape(-1, 1).to(batch.mask.device),
                        ref_logps=self._reference_logps(reference, batch),
                        sampled_logps=sampled_logps(own, batch.mask) if self._corrects else None,
                    )
                )
        micro_batches += self._idle(micro_batches)
        num_unequal = int((advantages != 0).any(1).sum())
        counted = torch.tensor(
            [
                *(is_scored.sum(), num_tokens.sum(), num_tokens[kept].sum()),
                *(len(groups), len(groups) - len(kept), num_unequal),
            ]
        )
        return Experience(micro_batches, *self.accelerator.reduce(counted.to(self.policy.device), "sum").tolist())

    def collate(self, groups: Sequence[Group], layout: Layout) -> CompletionBatch:
        """Lay groups out for the policy and the reference."""
        return collate(groups, self.policy.processor, self.policy.device, layout=layout)

    def check(self, micro: MicroBatch) -> None:
        """The self-check of the first step, on the last group of a micro-batch of every rank.

        Raises:
            SelfCheckError: the default layout and separate rows disagree; raised by all ranks together.
        """
        group = micro.groups[-1]
        plain = self.collate([group], "separate")
        error = None
        try:
            check_first_group(self.trained.forward, micro.batch, plain, group)
        except SelfCheckError as own:
            error = own
        failures = int(self.accelerator.reduce(torch.tensor(int(error is not None), device=self.policy.device), "sum"))
        if failures:
            raise error or SelfCheckError("The self-check failed on another rank, which says why.", ())

    @contextmanager
    def _reference_forward(self) -> Iterator[nn.Module | None]:
        """What computes log-probabilities under the reference, under ``no_grad``; None without one."""
        if self.reference is None:
            yield None
            return
        with self.trained.gathered(self.reference.shards), self.reference.active() as model, torch.no_grad():
            yield GroupForward(model)

    def _reference_logps(self, reference: nn.Module | None, batch: CompletionBatch) -> Tensor | None:
        """(B, Tc) log-probabilities under the reference."""
        if reference is None:
            return None
        logps: Tensor = reference(batch, temperature=self.config.rollout.temperature).logps
        return logps

    def _idle(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Micro-batches that have no part in the loss, for ranks with fewer than others where passes need all."""
        if not self.trained.is_collective:
            return []
        count = torch.tensor([len(micro_batches)], device=self.policy.device)
        missing = int(self.accelerator.gather(count).max()) - len(micro_batches)
        if not missing:
            return []
        groups = [group for micro in micro_batches for group in micro.groups]
        smallest = min(
            groups,
            key=lambda group: (
                len(group.prompt.input_ids) + sum(len(completion.token_ids) for completion in group.completions)
            ),
        )
        batch = self.collate([smallest], self.layout)
        nothing = torch.zeros(batch.num_completions, device=batch.mask.device)
        return [MicroBatch([smallest], batch, nothing, torch.zeros_like(batch.mask), None)] * missing

    def accumulate(
        self, experience: Experience, old_logps: Sequence[Tensor] | None, step: int
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Forward and backward over all micro-batches: leaves the clipped gradient of the step's loss.

        Args:
            old_logps: per micro-batch (B, Tc) under the policy that sampled; None where that is the policy itself.

        Returns:
            Metrics over all ranks, and the log-probabilities of every micro-batch.
        """
        loss_config, num_ranks = self.config.loss, self.accelerator.num_processes
        is_first_round = old_logps is None
        sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.policy.device)
        mismatch, all_logps = Mismatch(self.policy.device), []
        for index, micro in enumerate(experience.micro_batches):
            with self.trained.micro_batch(is_last=index == len(experience.micro_batches) - 1):
                stats = self.trained.forward(
                    micro.batch, temperature=self.config.rollout.temperature, with_entropy=is_first_round
                )
                logps = stats.logps.detach()
                before = logps if old_logps is None else old_logps[index]
                weights = self._weights(before, micro, mismatch)
                tokens = token_loss(
                    stats.logps,
                    before,
                    micro.advantages,
                    micro.ref_logps,
                    beta=0.0 if micro.ref_logps is None else loss_config.beta,  # idle ones have no reference
                    epsilon=loss_config.epsilon,
                    epsilon_high=loss_config.epsilon_high,
                    weights=weights,
                )
                if loss_config.type == "dpo":
                    loss = dpo_loss(
                        stats.logps,
                        micro.ref_logps,
                        micro.mask,
                        micro.advantages,
                        beta=loss_config.beta,
                        num_pairs=experience.num_unequal,
                    )
                else:
                    loss = aggregate(
                        tokens.loss,
                        micro.mask,
                        kind=loss_config.type,
                        num_completions=experience.num_completions,
                        num_tokens=experience.num_tokens,
                        max_completion_length=self.config.rollout.max_completion_length,
                    )
                # Distributed wrappers average gradients over ranks; the denominators are of the whole step already.
                self.trained.backward(loss * num_ranks)
            all_logps.append(logps)
            per_token = (
                tokens.kl,
                torch.zeros_like(logps) if stats.entropy is None else stats.entropy,
                tokens.is_low_clipped,
                tokens.is_high_clipped,
                tokens.is_low_clipped | tokens.is_high_clipped,
            )
            sums += torch.stack([loss.detach(), *(torch.where(micro.mask, values, 0).sum() for values in per_token)])
        grad_norm = self.trained.clip_gradients(fill_missing=experience.num_skipped > 0)
        loss_sum, kl, entropy, *clipped = self.accelerator.reduce(sums, "sum").tolist()
        num_tokens = max(experience.num_tokens, 1)
        means = [loss_sum, kl / num_tokens, entropy / max(experience.num_computed_tokens, 1)]
        metrics = dict(zip(_SUMS, [*means, *(count / num_tokens for count in clipped)]))
        if self.reference is None:
            del metrics["kl"]  # nothing to diverge from; 0 would read as a measurement
        return {
            **metrics,
            **(mismatch.metrics(self.accelerator) if self._corrects else {}),
            "grad_norm": grad_norm,
            "frac_groups_skipped": experience.num_skipped / experience.num_groups,
        }, all_logps

    def _weights(self, logps: Tensor, micro: MicroBatch, mismatch: Mismatch) -> Tensor | None:
        """(B, Tc) importance weights; None where the policy's own engine sampled.

        Args:
            logps: (B, Tc) under the policy that sampled, as training computes it.
            mismatch: takes note.
        """
        if micro.sampled_logps is None:
            return None
        clip_max = self.config.vllm.importance_sampling_clip_max
        weights = importance_weights(logps, micro.sampled_logps, clip_max=clip_max)
        mismatch.add(logps, micro.sampled_logps, weights, micro.mask)
        return weights

    def _non_finite(
        self,
        experience: Experience,
        all_logps: Sequence[Tensor],
        metrics: dict[str, float],
        step: int,
        *,
        is_first_round: bool,
    ) -> NonFiniteError:
        """The error that names the step and the samples: those with log-probabilities that are not finite, or all."""
        groups = [group for micro in experience.micro_batches for group in micro.groups]
        bad = [
            group
            for micro, logps in zip(experience.micro_batches, all_logps)
            for group, rows in zip(micro.groups, logps.split([len(group.completions) for group in micro.groups]))
            if not bool(rows.isfinite().all())
        ]
        named = bad or groups
        names = first_few(group.sample.id for group in named)
        what = "gradient norm" if math.isfinite(metrics["loss"]) else "loss"
        value = metrics["grad_norm"] if math.isfinite(metrics["loss"]) else metrics["loss"]
        return NonFiniteError(
            f"Step {step + 1}: the {what} is {value} (samples: {names}). Lower optimizer.learning_rate or "
            "optimizer.max_grad_norm, or train in float32 (model.dtype), and start again from the last checkpoint "
            "(model.path).",
            named,
            has_valid_weights=is_first_round,
        )
