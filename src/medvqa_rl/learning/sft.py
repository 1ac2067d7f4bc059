"""Supervised fine-tuning: the baseline, from the same data, prompts and checkpoint format as GRPO.

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
from medvqa_rl.core.types import Completion, Dataset, Group, Sample, Template
from medvqa_rl.learning.batching.feed import PreparedPrompt, make_feed
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.objective.logprobs import CompletionBatch, collate
from medvqa_rl.learning.objective.optimizer import lr_at
from medvqa_rl.learning.run.errors import NonFiniteError
from medvqa_rl.learning.run.run import Run
from medvqa_rl.learning.setup import Setup, make_accelerator, report_dry_run, set_up, wrap
from medvqa_rl.models.qwen_vl import Processor
from medvqa_rl.rewards.judges.load import notices


def target_text(sample: Sample, template: Template, *, use_reasoning: bool) -> str:
    """The completion that a sample teaches: its gold answer in the requested form, with the reference reasoning and
    the description of the image where the form has sections for them.

    A choice question's answer is the letter. Where there is no reasoning or description, or they shall not be used,
    none is invented: the target of most templates is then the answer section alone, ``<answer>B</answer>``. The parser
    reads it, but the form is incomplete, so ``direct`` or ``short`` is the better choice for data without reasoning.
    """
    asked = as_asked(sample, template)
    if not use_reasoning:
        return render_answer("", asked.answer, template)
    return render_answer(asked.reasoning, asked.answer, template, description=asked.description)


def target_completion(text: str, processor: Processor) -> Completion:
    """The text that a sample teaches, as a completion."""
    return Completion(processor.encode_completion(text), text, is_truncated=False)


def target_group(sample: Sample, text: str, processor: Processor, template: Template) -> Group:
    """A sample and the text that it teaches, as a group of one completion."""
    return Group(sample, processor.encode(sample, template), (target_completion(text, processor),))


def target_groups(
    samples: Sequence[Sample], processor: Processor, template: Template, *, use_reasoning: bool = True
) -> list[Group]:
    """Groups of one completion, the target, for supervised learning."""
    return [
        target_group(sample, target_text(sample, template, use_reasoning=use_reasoning), processor, template)
        for sample in samples
    ]


def sft_loss(forward: nn.Module, batch: CompletionBatch, num_tokens: int | None = None) -> Tensor:
    """Negative log-likelihood per target token, the end-of-sequence token included.

    Args:
        forward: a :class:`GroupForward`, wrapped or not.
        batch: targets laid out by ``collate``.
        num_tokens: target tokens of the whole step over all micro-batches and ranks; None is this batch alone.

    Returns:
        (,) this batch's share of the loss, in nats per token.
    """
    logps: Tensor = forward(batch).logps
    return -logps.sum() / (len(batch.targets) if num_tokens is None else num_tokens)


def train_sft(
    config: Config,
    *,
    resume: bool = False,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    train_set: Dataset | None = None,
    val_set: Dataset | None = None,
) -> Path:
    """Train a policy on reference answers. Arguments, result and errors: :func:`medvqa_rl.learning.grpo.train`."""
    accelerator = make_accelerator(config, config.sft.batch_size)
    for line in notices(config, rewards=False):
        accelerator.print(line)
    if dry_run:
        setup = set_up(config, train_set, None, with_validation=False)
        trained = wrap(config, accelerator, setup.policy)
        with make_feed(config, accelerator, setup, range(1), config.sft.batch_size) as feed:
            groups = prepared_groups(config, setup, feed.prompts(0))
        metrics = accumulate(config, accelerator, setup, trained, groups)
        report_dry_run(setup, groups, {name: f"{value:.4f}" for name, value in metrics.items()})
        return Path(config.output_dir)
    with Run(config, accelerator, kind="sft", resume=resume, given=given) as run:
        setup = set_up(config, train_set, val_set)
        run.start(setup.policy, setup.engine, setup.datasets)
        trained = run.use_trained(wrap(config, accelerator, setup.policy))
        steps = range(run.state.step, config.train.steps)
        feed = run.enter_context(make_feed(config, accelerator, setup, steps, config.sft.batch_size))
        for step in steps:
            began = time.perf_counter()
            run.set_phase("update")
            groups = prepared_groups(config, setup, feed.prompts(step))
            trained.forward.train()
            torch.manual_seed(address(config.train.seed, "dropout", step, accelerator.process_index))
            metrics = accumulate(config, accelerator, setup, trained, groups)
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                names = first_few(group.sample.id for group in groups)
                raise NonFiniteError(
                    f"Step {step + 1}: the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']} "
                    f"(samples: {names}): lower optimizer.learning_rate, or train in float32 (model.dtype).",
                    groups,
                )
            learning_rate = lr_at(step, config.optimizer, config.train.steps)
            trained.step(learning_rate)
            run.state.num_tokens += int(metrics.pop("step_tokens"))
            run.finish_step(metrics | {"learning_rate": learning_rate, "step_time": time.perf_counter() - began})
        run.finish()
    return run.dir.path


def prepared_groups(config: Config, setup: Setup, prompts: Sequence[PreparedPrompt]) -> list[Group]:
    """The targets of a step's prompts."""
    processor = setup.policy.processor
    groups = []
    for sample, _, prompt, _ in prompts:
        text = target_text(sample, prompt.template, use_reasoning=config.sft.use_reasoning)
        groups.append(Group(sample, prompt, (target_completion(text, processor),)))
    return groups


def accumulate(
    config: Config, accelerator: Accelerator, setup: Setup, trained: TrainedPolicy, groups: Sequence[Group]
) -> dict[str, float]:
    """Forward and backward over all micro-batches: leaves the clipped gradient of the step's loss.

    Returns:
        ``loss``, ``grad_norm`` and ``step_tokens`` (prompts and targets) over all ranks.
    """
    device, size = setup.policy.device, config.sft.samples_per_micro_batch
    batches = [
        collate(groups[start : start + size], setup.policy.processor, device, layout="separate")
        for start in range(0, len(groups), size)
    ]
    num_targets = sum(len(batch.targets) for batch in batches)
    num_tokens = num_targets + sum(len(group.prompt.input_ids) for group in groups)
    counts = accelerator.reduce(torch.tensor([num_targets, num_tokens], device=device), "sum").tolist()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):  # as many on every rank
        with trained.micro_batch(is_last=index == len(batches) - 1):
            loss = sft_loss(trained.forward, batch, counts[0])
            trained.backward(loss * accelerator.num_processes)  # distributed wrappers average over ranks
            total += loss.detach()
    grad_norm = trained.clip_gradients(fill_missing=False)
    loss_sum = float(accelerator.reduce(total, "sum"))
    return {"loss": loss_sum, "grad_norm": grad_norm, "step_tokens": float(counts[1])}
