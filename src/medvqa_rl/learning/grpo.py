"""The training loop of GRPO and its relatives, selected by the sections ``advantage`` and ``loss``.

Run it with ``medvqa-rl train CONFIG``, or ``accelerate launch -m medvqa_rl train CONFIG`` on several devices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.operations import gather_object
from torch import Tensor

from medvqa_rl.config import Config
from medvqa_rl.core.answers import Decode
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Dataset, Group
from medvqa_rl.evaluation.judging.calibration import calibration_warnings
from medvqa_rl.evaluation.measures.similarity import load_similarity
from medvqa_rl.evaluation.pass_rates import load_training_set
from medvqa_rl.learning.batching.feed import make_feed
from medvqa_rl.learning.collector import Collector, StepClock, gather_records
from medvqa_rl.learning.objective.advantages import Advantages, group_advantages
from medvqa_rl.learning.objective.losses.dpo import preference_pairs
from medvqa_rl.learning.objective.mismatch import DIFFERENCE
from medvqa_rl.learning.objective.step_tokens import with_steps
from medvqa_rl.learning.run.errors import UnscoredError
from medvqa_rl.learning.run.run import Run
from medvqa_rl.learning.run.step_metrics import (
    mean_over_ranks,
    record_completions,
    rollout_metrics,
    template_metrics,
)
from medvqa_rl.learning.setup import (
    check_vllm,
    make_accelerator,
    make_reference,
    report_dry_run,
    set_up,
    slower,
    start_vllm,
    wrap,
)
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.loading import resolve_device
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.functions import RewardFunction
from medvqa_rl.rewards.judged import unseen
from medvqa_rl.rewards.judges import Judge
from medvqa_rl.rewards.judges.load import caches_folder, load_rewarding, notices, roles
from medvqa_rl.rewards.open_answers import unrewardable
from medvqa_rl.rewards.scores import Scores


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    train_set: Dataset | None = None,
    val_set: Dataset | None = None,
    functions: Mapping[str, RewardFunction] = MappingProxyType({}),
) -> Path:
    """Train a policy with RL.

    Args:
        config: all settings.
        resume: continue the run in ``config.output_dir``; the result equals that of an uninterrupted run.
        resume_from: continue it from the checkpoint of this step instead of the newest.
        dry_run: load everything, run one step without an optimizer step, print its shapes, and write nothing.
        given: the settings as the user wrote them, saved next to the resolved ones.
        train_set: training samples; defaults to those of ``config.data``.
        val_set: validation samples; defaults to those of ``config.data``.
        functions: those of ``rewards.functions`` that a program passes itself, by dotted path.

    Returns:
        The run's folder.

    Raises:
        ValueError: the settings, the data, the model or the folder cannot be used.
        NonFiniteError: a loss or gradient is not finite; the last valid weights and the samples are saved.
        UnscoredError: more than ``rewards.max_unscored`` of a step's completions could not be scored.
        Stopped: SIGINT or SIGTERM was received; a checkpoint is saved.
    """
    warnings = check_vllm(config)
    accelerator = make_accelerator(config, config.train.prompts_per_step)
    for line in [*warnings, *notices(config)]:
        accelerator.print(line)
    if train_set is None:
        train_set = load_training_set(config.data)
    for line in check_rewardable(config, train_set):
        accelerator.print(line)
    judges = load_rewarding(config, accelerator.print)
    for line in calibration_warnings(caches_folder(config.judge), judges.values()):
        accelerator.print(line)
    rewards = make_rewards(config, judges, functions)
    if dry_run:
        return _dry_run(config, accelerator, rewards, train_set)
    with Run(config, accelerator, kind="train", resume=resume, given=given, resume_from=resume_from) as run:
        setup = set_up(config, train_set, val_set)
        for line in slower(setup, config):
            accelerator.print(line)
        reference = make_reference(config, setup.policy)  # before run.start, which may load a checkpoint
        run.start(setup.policy, setup.engine, setup.datasets, roles(judges), rewards.functions)
        setup.vllm = start_vllm(config, accelerator, setup.policy)
        trained = run.use_trained(wrap(config, accelerator, setup.policy))
        collector = Collector(config, setup, trained, rewards)
        learner = Learner(config, accelerator, setup.policy, reference, trained)
        steps, decode = range(run.state.step, config.train.steps), setup.policy.processor.decode
        feed = run.enter_context(make_feed(config, accelerator, setup, steps, config.train.prompts_per_step))
        for step in steps:
            clock = StepClock(run.set_phase)
            clock.start("rollout")
            prompts = feed.prompts(step)  # P prompts, prepared during the previous step
            groups, scores = collector.sample(step, prompts, clock)  # P groups of G completions, (P, G) rewards

            total = torch.from_numpy(scores.total)  # (P, G)
            advantages = advantages_of(config, accelerator, total)  # (P, G)
            records = gather_records(prompts, record_completions(groups, scores, advantages.numpy()))
            metrics = rollout_metrics(records, config.rollout.num_generations)
            if config.prompt.mix.is_on:
                metrics |= template_metrics(records)
            check_unscored(config, groups, scores, metrics["unscored_rate"], step)

            clock.start("update")
            metrics |= learner.update(*learning_signal(config, groups, scores, advantages, decode), step)
            metrics |= mean_over_ranks(gather_object([scores.extras]))
            run.state.num_tokens += sum(record.prompt_length + record.length for record in records)
            run.finish_step(metrics | clock.times(), records, groups)  # log, evaluate, save
        run.finish()
    return run.dir.path


def make_rewards(
    config: Config, judges: Mapping[str, Judge], functions: Mapping[str, RewardFunction] = MappingProxyType({})
) -> Rewards:
    """Build the rewards of ``config.rewards``."""
    similarity = None
    if config.rewards.open_correctness == "similarity":
        device = resolve_device(config.model.device).type
        similarity = load_similarity(config.rewards.similarity_model, device, "rewards.similarity_model").compare
    return Rewards(
        config.rewards,
        max_completion_length=config.rollout.max_completion_length,
        judges=judges,
        similarity=similarity,
        functions=functions,
    )


def check_rewardable(config: Config, dataset: Dataset) -> list[str]:
    """Check on up to 1,000 questions that the rewards can tell right answers from wrong ones, and that there is what
    a judge should see.

    Returns:
        Warnings.

    Raises:
        ValueError: all questions are open, and exact matches only would be rewarded by default; or none has what the
            judge should see.
    """
    if dataset.is_endless:  # the settings determine its questions and have been checked
        return []
    samples = [dataset[index] for index in range(0, len(dataset), max(1, len(dataset) // 1000))]
    found = [
        unrewardable(config.rewards, [sample.answer_type for sample in samples]),
        unseen(config.rewards, config.judge.sees, samples),
    ]
    for error, _ in found:
        if error is not None:
            raise ValueError(error)
    return [warning for _, warning in found if warning is not None]


def advantages_of(config: Config, accelerator: Accelerator, rewards: Tensor) -> Tensor:
    """Compute this rank's (P, G) advantages from its (P, G) rewards. Collective if ``advantage.scale`` needs all."""
    baseline, scale = config.advantage.baseline, config.advantage.scale
    everyone = accelerator.gather(rewards.to(accelerator.device)).cpu() if scale in ("batch", "whiten") else None
    return group_advantages(rewards, baseline=baseline, scale=scale, everyone=everyone)


def learning_signal(
    config: Config, groups: Sequence[Group], scores: Scores, advantages: Tensor, decode: Decode
) -> tuple[Sequence[Group], Advantages, Tensor]:
    """Return the groups, advantages and (P, G) scored flags that ``Learner.update`` takes.

    With ``loss.type: dpo`` these are preference pairs and their signs, and with the process reward one advantage per
    token.

    Args:
        advantages: (P, G) of the total rewards.
        decode: of the policy's tokenizer.
    """
    rewards, own = torch.from_numpy(scores.total), config.rewards
    if config.loss.type == "dpo":
        return preference_pairs(groups, rewards)
    if own.process:
        per_token = with_steps(
            advantages, groups, scores.steps, weight=own.process, discount=own.process_discount, decode=decode
        )
        return groups, per_token, ~rewards.isnan()
    return groups, advantages, ~rewards.isnan()


def check_unscored(config: Config, groups: Sequence[Group], scores: Scores, rate: float, step: int) -> None:
    """Stop if too many completions could not be scored: training on the rest would be a different experiment.

    Args:
        rate: fraction of unscored completions over all ranks.

    Raises:
        UnscoredError: the rate is above ``rewards.max_unscored``.
    """
    if rate <= config.rewards.max_unscored:
        return
    failing = [name for name, values in scores.parts.items() if (np.isnan(values) & scores.applies[name]).any()]
    if not np.any(list(scores.applies.values()), axis=0).all():
        failing.append("any part, since none applies to some of them")
    bad = [group for group, row in zip(groups, scores.total) if np.isnan(row).any()]
    names = first_few(group.sample.id for group in bad)
    parts = ", ".join(failing) or "another rank"
    remedy = (
        f"check that the judge {config.judge.model} answers (metrics.jsonl counts its failures under judge/)"
        if config.rewards.judged.keys() & set(failing)
        else "repair the reward"
    )
    raise UnscoredError(
        f"Step {step + 1}: {rate:.0%} of the completions could not be scored by {parts} (samples: {names}), but "
        f"rewards.max_unscored is {config.rewards.max_unscored:.0%}: {remedy}, and continue with --resume.",
        bad,
    )


def _dry_run(config: Config, accelerator: Accelerator, rewards: Rewards, train_set: Dataset) -> Path:
    """Run one step up to its gradient and print what it looks like; no optimizer step, nothing is written."""
    setup = set_up(config, train_set, None, with_validation=False)
    for line in slower(setup, config):
        accelerator.print(line)
    reference = make_reference(config, setup.policy)
    setup.vllm = start_vllm(config, accelerator, setup.policy)
    trained = wrap(config, accelerator, setup.policy)
    collector = Collector(config, setup, trained, rewards)
    learner = Learner(config, accelerator, setup.policy, reference, trained)
    began = time.perf_counter()
    with make_feed(config, accelerator, setup, range(1), config.train.prompts_per_step) as feed:
        prompts = feed.prompts(0)
        rehearsal = collector.rehearse(prompts)
        groups, scores = collector.sample(0, prompts, StepClock())
    total = torch.from_numpy(scores.total)
    advantages = advantages_of(config, accelerator, total)
    decode = setup.policy.processor.decode
    experience = learner.prepare(*learning_signal(config, groups, scores, advantages, decode))
    metrics, _ = learner.accumulate(experience)

    rows = {
        f"reward {name}": "none scored" if np.isnan(values).all() else f"{np.nanmean(values):.3f}"
        for name, values in scores.parts.items()
    }
    for index, micro in enumerate(experience.micro_batches):
        rows[f"micro-batch {index}"] = (
            f"{tuple(micro.batch.input_ids.shape)} rows x tokens, {tuple(micro.mask.shape)} completions x tokens"
        )
    if config.rollout.engine == "vllm":
        rows["rollouts on"] = f"vLLM ({config.vllm.mode})"
    if f"{DIFFERENCE}/mean" in metrics:
        mean, largest = metrics[f"{DIFFERENCE}/mean"], metrics[f"{DIFFERENCE}/max"]
        rows["log-probabilities"] = f"vLLM differs by {mean:.2g} nats on average, {largest:.2g} at most"
    if rehearsal is not None:
        rows["changed weights"] = (
            f"vLLM differs by {rehearsal.changed:.2g} nats on average from them, by {rehearsal.unchanged:.2g} from "
            "those before"
        )
    rows |= {
        "loss": f"{metrics['loss']:.6f}",
        "gradient norm": f"{metrics['grad_norm']:.4f}",
        "seconds": f"{time.perf_counter() - began:.2f}",
    }
    report_dry_run(setup, groups, rows)
    return Path(config.output_dir)
