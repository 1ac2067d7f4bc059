"""Supervised fine-tuning (SFT): the baseline, with the same data, prompts and checkpoint format as GRPO.

Run it with ``medvqa-rl sft CONFIG``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from torch import Tensor, nn

from medvqa_rl.config import Config
from medvqa_rl.core.prompts import as_asked, render_answer
from medvqa_rl.core.randomness import address
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import DEFAULT_WORDING, Completion, Dataset, EncodedPrompt, Group, Sample, Template, Wording
from medvqa_rl.learning.batching.feed import PreparedPrompt, make_feed
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import CompletionBatch, collate
from medvqa_rl.learning.objective.optimizer import lr_at
from medvqa_rl.learning.run.errors import NonFiniteError
from medvqa_rl.learning.run.run import Run
from medvqa_rl.learning.setup import make_accelerator, report_dry_run, set_up, wrap
from medvqa_rl.models.loading import Policy
from medvqa_rl.models.processor import Processor
from medvqa_rl.rewards.judges.load import notices


def target_text(sample: Sample, template: Template, wording: Wording = DEFAULT_WORDING, *, use_reasoning: bool) -> str:
    """Render the target completion of a sample: its gold answer in the template's format.

    The reference reasoning and the image description fill the template's sections for them, if the sample has them
    and ``use_reasoning`` is True. Otherwise most templates are left with the answer section alone,
    ``<answer>B</answer>``, which the parser reads but the format reward rejects: train on data without reasoning with
    the templates ``direct`` or ``short``. The answer to a choice question is its letter.
    """
    asked = as_asked(sample, template)
    if not use_reasoning:
        return render_answer("", asked.answer, template, wording)
    return render_answer(asked.reasoning, asked.answer, template, wording, description=asked.description)


def target_completion(text: str, prompt: EncodedPrompt, processor: Processor) -> Completion:
    """Tokenize a target.

    A prompt that ends with the opening think tag (:attr:`EncodedPrompt.opening`) is not given it again, and a target
    without reasoning closes the section first.
    """
    if prompt.opening:
        start, end = prompt.wording.think
        text = text.removeprefix(start) if text.startswith(start) else f"{end}\n\n{text}"
    return Completion(processor.encode_completion(text), prompt.opening + text, is_truncated=False)


def target_groups(prompts: Sequence[PreparedPrompt], processor: Processor, *, use_reasoning: bool) -> list[Group]:
    """Pair each prompt with its target, as a group of one completion."""
    groups = []
    for sample, _, prompt, _ in prompts:
        text = target_text(sample, prompt.template, prompt.wording, use_reasoning=use_reasoning)
        groups.append(Group(sample, prompt, (target_completion(text, prompt, processor),)))
    return groups


def sft_loss(forward: nn.Module, batch: CompletionBatch, num_tokens: int | None = None) -> Tensor:
    """Compute the negative log-likelihood per target token, including the end-of-sequence token.

    Args:
        forward: a :class:`GroupForward`, wrapped or not.
        batch: targets from ``collate``.
        num_tokens: target tokens of the step over all micro-batches and ranks; defaults to those of the batch.

    Returns:
        (,) this batch's share of the loss, in nats per token.
    """
    logps: Tensor = forward(batch).logps
    return -logps.sum() / (len(batch.targets) if num_tokens is None else num_tokens)


class SftLearner:
    """Updates a policy from targets."""

    def __init__(self, config: Config, accelerator: Accelerator, policy: Policy, trained: TrainedPolicy) -> None:
        self.config = config
        self.accelerator = accelerator
        self.policy = policy
        self.trained = trained

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]:
        """Take one optimizer step on this rank's targets.

        Args:
            groups: groups of one completion, the target.
            step: counted from 0.

        Returns:
            ``loss``, ``grad_norm``, ``step_tokens`` (prompts and targets) over all ranks, and ``learning_rate``.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; no weight was changed.
        """
        self.trained.forward.train()
        # Seed torch's generator for dropout by address, so that a resumed run draws the same.
        torch.manual_seed(address(self.config.train.seed, "dropout", step, self.accelerator.process_index))
        metrics = self.accumulate(groups)
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            names = first_few(group.sample.id for group in groups)
            raise NonFiniteError(
                f"Step {step + 1}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']} "
                f"(samples: {names}). Lower optimizer.learning_rate, or train in float32 (model.dtype).",
                groups,
            )
        learning_rate = lr_at(step, self.config.optimizer, self.config.train.steps)
        self.trained.step(learning_rate)
        return metrics | {"learning_rate": learning_rate}

    def accumulate(self, groups: Sequence[Group]) -> dict[str, float]:
        """Run forward and backward over all micro-batches, which leaves the clipped gradient of the step's loss.

        Returns:
            ``loss``, ``grad_norm`` and ``step_tokens`` over all ranks.
        """
        device, size = self.policy.device, self.config.sft.samples_per_micro_batch
        batches = [
            collate(groups[start : start + size], self.policy.processor, device, layout=Layout.SEPARATE)
            for start in range(0, len(groups), size)
        ]
        num_targets = sum(len(batch.targets) for batch in batches)
        num_tokens = num_targets + sum(len(group.prompt.input_ids) for group in groups)
        counts = self.accelerator.reduce(torch.tensor([num_targets, num_tokens], device=device), "sum").tolist()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, batch in enumerate(batches):  # every rank has equally many
            with self.trained.micro_batch(is_last=index == len(batches) - 1):
                loss = sft_loss(self.trained.forward, batch, counts[0])
                # Distributed wrappers average gradients over ranks, but the denominator already covers all ranks.
                self.trained.backward(loss * self.accelerator.num_processes)
                total += loss.detach()
        grad_norm = self.trained.clip_gradients(fill_missing=False)
        loss_sum = float(self.accelerator.reduce(total, "sum"))
        return {"loss": loss_sum, "grad_norm": grad_norm, "step_tokens": float(counts[1])}


def train_sft(
    config: Config,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    train_set: Dataset | None = None,
    val_set: Dataset | None = None,
) -> Path:
    """Train a policy on reference answers; see :func:`medvqa_rl.learning.grpo.train` for arguments and errors."""
    accelerator = make_accelerator(config, config.sft.batch_size)
    for line in notices(config, rewards=False):
        accelerator.print(line)
    use_reasoning = config.sft.use_reasoning
    if dry_run:
        setup = set_up(config, train_set, None, with_validation=False)
        learner = SftLearner(config, accelerator, setup.policy, wrap(config, accelerator, setup.policy))
        with make_feed(config, accelerator, setup, range(1), config.sft.batch_size) as feed:
            groups = target_groups(feed.prompts(0), setup.policy.processor, use_reasoning=use_reasoning)
        metrics = learner.accumulate(groups)
        report_dry_run(setup, groups, {name: f"{value:.4f}" for name, value in metrics.items()})
        return Path(config.output_dir)
    with Run(config, accelerator, kind="sft", resume=resume, given=given, resume_from=resume_from) as run:
        setup = set_up(config, train_set, val_set)
        run.start(setup.policy, setup.engine, setup.datasets)
        trained = run.use_trained(wrap(config, accelerator, setup.policy))
        learner = SftLearner(config, accelerator, setup.policy, trained)
        steps = range(run.state.step, config.train.steps)
        feed = run.enter_context(make_feed(config, accelerator, setup, steps, config.sft.batch_size))
        for step in steps:
            began = time.perf_counter()
            run.set_phase("update")
            prompts = feed.prompts(step)  # prepared during the previous step
            groups = target_groups(prompts, setup.policy.processor, use_reasoning=use_reasoning)
            metrics = learner.update(groups, step)
            run.state.num_tokens += int(metrics.pop("step_tokens"))
            run.finish_step(metrics | {"step_time": time.perf_counter() - began})  # log, evaluate, save
        run.finish()
    return run.dir.path
