"""The policy update of one rollout: reference pass, loss, gradients and optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import torch
from accelerate.accelerator import Accelerator
from torch import Tensor, nn

from medvqa_rl.config import Config
from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Group
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.objective.advantages import Advantages, advantage_rows, have_signal
from medvqa_rl.learning.objective.entropy import entropy_bonus, top_entropy
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import (
    CompletionBatch,
    EntropyUse,
    GroupForward,
    collate,
    layout_of,
    scoring,
)
from medvqa_rl.learning.objective.losses import LOSSES
from medvqa_rl.learning.objective.losses.loss import LossInputs, LossOutput, StepCounts
from medvqa_rl.learning.objective.micro_batches import Experience, MicroBatch, contributing, split
from medvqa_rl.learning.objective.mismatch import DIFFERENCE, Mismatch, importance_weights, sampled_logps
from medvqa_rl.learning.objective.optimizer import lr_at
from medvqa_rl.learning.objective.self_check import SelfCheckError, check_first_group
from medvqa_rl.learning.run.errors import NonFiniteError, TrainingFailed
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.reference import Reference

T = TypeVar("T", Tensor, float)


class Sums(NamedTuple, Generic[T]):
    """The loss, and sums over the tokens that count: of a micro-batch, or of the whole step."""

    loss: T
    kl: T
    entropy: T
    low_clipped: T
    high_clipped: T
    clipped: T


def sum_tokens(output: LossOutput, entropy: Tensor | None, mask: Tensor) -> Sums[Tensor]:
    """Sum per-token values over the tokens that count; a missing entropy counts as 0."""

    def total(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).sum()

    return Sums(
        loss=output.loss.detach(),
        kl=total(output.kl),
        entropy=total(torch.zeros_like(output.kl) if entropy is None else entropy.detach()),
        low_clipped=total(output.is_low_clipped),
        high_clipped=total(output.is_high_clipped),
        clipped=total(output.is_low_clipped | output.is_high_clipped),
    )


class Learner:
    """Updates a policy from scored groups."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        policy: Policy,
        reference: Reference | None,
        trained: TrainedPolicy,
    ) -> None:
        """
        Args:
            reference: the policy before training; None if and only if ``loss.beta`` is 0.
            trained: the policy as wrapped for training.
        """
        assert (reference is None) == (config.loss.beta == 0.0)
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.reference = reference
        self.trained = trained
        self.layout = layout_of(policy)
        self._is_dpo = config.loss.type == "dpo"
        self._loss = LOSSES[config.loss.type]
        self._has_bonus = config.loss.entropy_coef > 0
        # KL and entropy have a gradient whatever the advantages are, and the threshold of the entropy is that of all
        # tokens. A group without a preference has no gradient in DPO, not even from beta.
        uses_entropy = self._has_bonus or config.loss.top_entropy_quantile < 1
        self._needs_every_group = not self._is_dpo and (config.loss.beta > 0 or uses_entropy)
        self._uses_vllm = config.rollout.engine == "vllm"
        # DPO does not depend on the probabilities that completions were sampled with.
        self._corrects_mismatch = config.vllm.importance_sampling_correction and not self._is_dpo
        self._needs_self_check = config.train.self_check and self.layout != Layout.SEPARATE

    def update(
        self, groups: Sequence[Group], advantages: Advantages, is_scored: Tensor, step: int
    ) -> dict[str, float]:
        """Train on this rank's groups: ``loss.num_iterations`` rounds of one optimizer step on all of them.

        Args:
            groups: P groups.
            advantages: (P, G) from ``group_advantages``, or the signs of ``preference_pairs``; or for each completion
                a tensor with one advantage per token.
            is_scored: (P, G) bool; unscored completions are excluded from the loss, including its KL term.
            step: counted from 0.

        Returns:
            Metrics over all ranks: ``loss``, ``kl`` (if there is a reference), ``entropy``, ``clip_ratio/...``,
            ``grad_norm``, ``frac_groups_skipped``, ``learning_rate``, and ``sampling/...`` if vLLM sampled.
            They are means over the rounds, except that ``entropy`` (over the groups that were not skipped) and
            ``sampling/...`` come from the first round, in which the policy is still the one that sampled.

        Raises:
            UnusableSampleError: a group is larger than ``train.max_tokens_per_micro_batch``.
            SelfCheckError: on the first call, the default layout and separate rows disagree on any rank.
            NonFiniteError: the loss or its gradient is not finite; this round did not change any weight.
            TrainingFailed: vLLM samples from other weights.
        """
        self.trained.forward.train()
        # Seed torch's generator for dropout by address, so that a resumed run draws the same.
        torch.manual_seed(address(self.config.train.seed, "dropout", step, self.accelerator.process_index))
        experience = self.prepare(groups, advantages, is_scored)
        if self._needs_self_check:
            self._self_check(experience.micro_batches[0])
            self._needs_self_check = False
        learning_rate = lr_at(step, self.config.optimizer, self.config.train.steps)
        rounds: list[dict[str, float]] = []
        old_logps: list[Tensor] | None = None
        for _ in range(self.config.loss.num_iterations):
            metrics, logps = self.accumulate(experience, old_logps)
            if not math.isfinite(metrics["grad_norm"]) or not math.isfinite(metrics["loss"]):
                self.trained.zero_grad()
                raise self._non_finite(experience, logps, metrics, step, is_first_round=not rounds)
            if not rounds:
                self._check_mismatch(experience, metrics, step)
            self.trained.step(learning_rate)
            rounds.append(metrics)
            # The first round's policy is the one that sampled, so its log-probabilities serve all rounds.
            old_logps = logps if old_logps is None else old_logps
        means = {name: sum(metrics[name] for metrics in rounds) / len(rounds) for name in rounds[0]}
        first = {name: value for name, value in rounds[0].items() if name == "entropy" or "sampling/" in name}
        return means | first | {"learning_rate": learning_rate}

    def prepare(self, groups: Sequence[Group], advantages: Advantages, is_scored: Tensor) -> Experience:
        """Split the groups into micro-batches, run the reference on them and count the denominators."""
        counts_in_loss = is_scored.cpu()  # (P, G)
        if self.config.loss.mask_truncated_completions:
            is_truncated = [[completion.is_truncated for completion in group.completions] for group in groups]
            counts_in_loss = counts_in_loss & ~torch.tensor(is_truncated)
            if self._is_dpo:  # half a pair is no preference
                assert isinstance(advantages, Tensor)
                counts_in_loss = counts_in_loss & counts_in_loss.all(1, keepdim=True)
                advantages = torch.where(counts_in_loss.to(advantages.device), advantages, 0.0)
        lengths = torch.tensor([[len(completion.token_ids) for completion in group.completions] for group in groups])
        num_tokens = torch.where(counts_in_loss, lengths, 0).sum(1)  # (P,)
        has_signal = have_signal(advantages)  # (P,)
        kept = contributing(has_signal, needs_every_group=self._needs_every_group)
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
                batch = self._collate(own)
                mask = batch.mask & counts_in_loss[indices].reshape(-1, 1).to(batch.mask.device)
                micro_batches.append(
                    MicroBatch(
                        groups=own,
                        batch=batch,
                        advantages=advantage_rows(advantages, indices, batch.mask),
                        mask=mask,
                        top_mask=mask,
                        ref_logps=self._reference_logps(reference, batch),
                        sampled_logps=sampled_logps(own, batch.mask) if self._uses_vllm else None,
                    )
                )
        micro_batches += self._idle(micro_batches)
        num_top_tokens = int(num_tokens.sum())
        if self.config.loss.top_entropy_quantile < 1:
            micro_batches = self._keep_top_entropy(micro_batches)
            num_top_tokens = sum(int(micro.top_mask.sum()) for micro in micro_batches)
        num_scored = int(is_scored.sum())
        counts = StepCounts(
            num_completions=num_scored,
            num_tokens=int(num_tokens.sum()),
            token_budget=num_scored * self.config.rollout.max_completion_length,
            num_computed_tokens=int(num_tokens[kept].sum()),
            num_groups=len(groups),
            num_skipped=len(groups) - len(kept),
            num_unequal=int(has_signal.sum()),
            num_top_tokens=num_top_tokens,
        )
        total = self.accelerator.reduce(torch.tensor(counts, device=self.policy.device), "sum").tolist()
        return Experience(micro_batches, StepCounts(*total))

    def _collate(self, groups: Sequence[Group]) -> CompletionBatch:
        """Lay groups out in the default layout."""
        return collate(groups, self.policy.processor, self.policy.device, layout=self.layout)

    def _self_check(self, micro: MicroBatch) -> None:
        """Compare the default layout with separate rows on the last group of a micro-batch.

        Raises:
            SelfCheckError: they disagree on some rank; raised on all ranks together.
        """
        group = micro.groups[-1]
        plain = collate([group], self.policy.processor, self.policy.device, layout=Layout.SEPARATE)
        error = None
        try:
            check_first_group(self.trained.forward, micro.batch, plain, group)
        except SelfCheckError as own:
            error = own
        failures = int(self.accelerator.reduce(torch.tensor(int(error is not None), device=self.policy.device), "sum"))
        if failures:
            raise error or SelfCheckError("The self-check failed on another rank; see that rank's message.", ())

    @contextmanager
    def _reference_forward(self) -> Iterator[nn.Module | None]:
        """Yield the module that scores completions under the reference, within ``no_grad``; None without one."""
        if self.reference is None:
            yield None
            return
        with self.trained.gathered(self.reference.shards), self.reference.active() as model, torch.no_grad():
            yield GroupForward(model)

    def _reference_logps(self, reference: nn.Module | None, batch: CompletionBatch) -> Tensor | None:
        """(B, Tc) log-probabilities under the reference; None without one."""
        if reference is None:
            return None
        logps: Tensor = reference(batch, temperature=self.config.rollout.temperature).logps
        return logps

    def _keep_top_entropy(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Set the advantages of all tokens but those of highest entropy to 0, so that the policy loss ignores them."""
        forward, temperature = self.trained.forward, self.config.rollout.temperature
        with scoring(forward):
            entropies = [forward(m.batch, temperature=temperature, entropy="value").entropy for m in micro_batches]
        share = self.config.loss.top_entropy_quantile
        masks = top_entropy(entropies, [micro.mask for micro in micro_batches], share)
        return [
            replace(micro, advantages=torch.where(mask, micro.token_advantages, 0.0), top_mask=mask)
            for micro, mask in zip(micro_batches, masks)
        ]

    def _idle(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Make masked micro-batches for a rank that has fewer than others, if all ranks must run equally many."""
        if not self.trained.is_collective:
            return []
        count = torch.tensor([len(micro_batches)], device=self.policy.device)
        missing = int(self.accelerator.gather(count).max()) - len(micro_batches)
        if not missing:
            return []

        def num_tokens(group: Group) -> int:
            return len(group.prompt.input_ids) + sum(len(completion.token_ids) for completion in group.completions)

        smallest = min((group for micro in micro_batches for group in micro.groups), key=num_tokens)
        batch = self._collate([smallest])
        zeros, nothing = torch.zeros(batch.num_completions, device=batch.mask.device), torch.zeros_like(batch.mask)
        return [MicroBatch([smallest], batch, zeros, nothing, nothing, None)] * missing

    def accumulate(
        self, experience: Experience, old_logps: Sequence[Tensor] | None = None
    ) -> tuple[dict[str, float], list[Tensor]]:
        """Run forward and backward over all micro-batches, which leaves the clipped gradient of the step's loss.

        Args:
            old_logps: (B, Tc) per micro-batch under the policy that sampled; None if that is the current policy.

        Returns:
            Metrics over all ranks, and the (B, Tc) log-probabilities of every micro-batch.
        """
        counts, config, all_logps = experience.counts, self.config, []
        wanted: EntropyUse = "gradient" if self._has_bonus else "value" if old_logps is None else "none"
        mismatch = Mismatch(self.policy.device)
        sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=self.policy.device)
        for index, micro in enumerate(experience.micro_batches):
            with self.trained.micro_batch(is_last=index == len(experience.micro_batches) - 1):
                logps, entropy = self.trained.forward(
                    micro.batch, temperature=config.rollout.temperature, entropy=wanted
                )
                all_logps.append(logps.detach())
                old = all_logps[index] if old_logps is None else old_logps[index]
                weights = self._importance_weights(old, micro, mismatch)
                inputs = LossInputs(logps, old, micro.ref_logps, micro.advantages, micro.mask, weights)
                output = self._loss(inputs, counts, config.loss)
                if self._has_bonus:
                    bonus = entropy_bonus(entropy, micro.top_mask, counts)
                    output = output._replace(loss=output.loss - config.loss.entropy_coef * bonus)
                # Distributed wrappers average gradients over ranks, but the denominators already cover all ranks.
                self.trained.backward(output.loss * self.accelerator.num_processes)
            sums += torch.stack(sum_tokens(output, entropy, micro.mask))
        grad_norm = self.trained.clip_gradients(fill_missing=counts.num_skipped > 0)
        total: Sums[float] = Sums(*self.accelerator.reduce(sums, "sum").tolist())
        num_tokens, num_computed = max(counts.num_tokens, 1), max(counts.num_computed_tokens, 1)
        metrics = {"loss": total.loss}
        if self.reference is not None:
            metrics["kl"] = total.kl / num_computed
        metrics |= {
            "entropy": total.entropy / num_computed,
            "clip_ratio/low_mean": total.low_clipped / num_tokens,
            "clip_ratio/high_mean": total.high_clipped / num_tokens,
            "clip_ratio/region_mean": total.clipped / num_tokens,
        }
        if self._uses_vllm:
            metrics |= mismatch.metrics(self.accelerator)
        metrics |= {"grad_norm": grad_norm, "frac_groups_skipped": counts.num_skipped / counts.num_groups}
        return metrics, all_logps

    def _importance_weights(self, logps: Tensor, micro: MicroBatch, mismatch: Mismatch) -> Tensor | None:
        """Compute (B, Tc) importance weights, and add them to the statistics of the mismatch.

        Args:
            logps: (B, Tc) under the policy that sampled, as training computes it.

        Returns:
            The weights; None without correction.
        """
        if micro.sampled_logps is None:
            return None
        clip_max = self.config.vllm.importance_sampling_clip_max
        weights = importance_weights(logps, micro.sampled_logps, clip_max=clip_max)
        mismatch.add(logps, micro.sampled_logps, weights, micro.mask)
        return weights if self._corrects_mismatch else None

    def _check_mismatch(self, experience: Experience, metrics: dict[str, float], step: int) -> None:
        """Stop if vLLM samples from another distribution than the one that is trained.

        Raises:
            TrainingFailed: the mean difference of log-probabilities is above ``vllm.max_logp_difference``.
        """
        gap, limit = metrics.get(f"{DIFFERENCE}/mean", 0.0), self.config.vllm.max_logp_difference
        if gap > limit:
            self.trained.zero_grad()
            raise TrainingFailed(
                f"Step {step + 1}: the log-probabilities of vLLM and of training differ by {gap:.2g} nats per token "
                f"on average, but vllm.max_logp_difference is {limit:g}: vLLM samples from other weights, so run with "
                "--dry-run, which hands changed weights over and compares, and resume when it passes.",
                [group for micro in experience.micro_batches for group in micro.groups],
            )

    def _non_finite(
        self,
        experience: Experience,
        all_logps: Sequence[Tensor],
        metrics: dict[str, float],
        step: int,
        *,
        is_first_round: bool,
    ) -> NonFiniteError:
        """Build the error that names the step and the samples with non-finite log-probabilities, or all samples."""
        groups = [group for micro in experience.micro_batches for group in micro.groups]
        bad = [
            group
            for micro, logps in zip(experience.micro_batches, all_logps)
            for group, rows in zip(micro.groups, logps.split([len(group.completions) for group in micro.groups]))
            if not bool(rows.isfinite().all())
        ]
        named = bad or groups
        names = first_few(group.sample.id for group in named)
        what, value = "gradient norm", metrics["grad_norm"]
        if not math.isfinite(metrics["loss"]):
            what, value = "loss", metrics["loss"]
        return NonFiniteError(
            f"Step {step + 1}: the {what} is {value} (samples: {names}). Lower optimizer.learning_rate or "
            "optimizer.max_grad_norm, or train in float32 (model.dtype), and start again from the last checkpoint "
            "(model.path).",
            named,
            has_valid_weights=is_first_round,
        )
