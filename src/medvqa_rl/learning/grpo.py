"""Group relative policy optimisation: the loop. GRPO, Dr. GRPO, DAPO and online DPO by ``loss.type`` and
``advantage.scale``.

Run it with ``medvqa-rl train CONFIG``, or ``accelerate launch -m medvqa_rl train CONFIG`` on several devices.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.operations import gather_object

from medvqa_rl.config import Config
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Dataset, Group, Scores
from medvqa_rl.data import load_dataset
from medvqa_rl.evaluation.measures.similarity import load_similarity
from medvqa_rl.learning.batching.feed import PreparedPrompt, make_feed, prepare_prompt
from medvqa_rl.learning.batching.resampling import resample, resampled_occurrence
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.objective.dpo_loss import preference_pairs
from medvqa_rl.learning.run.errors import NonFiniteError, TrainingFailed, UnscoredError
from medvqa_rl.learning.run.run import Run
from medvqa_rl.learning.run.step_metrics import (
    CompletionRecord,
    mean_over_ranks,
    record_completions,
    rollout_metrics,
    template_metrics,
)
from medvqa_rl.learning.setup import (
    Setup,
    check_vllm,
    make_accelerator,
    make_reference,
    report_dry_run,
    set_up,
    start_vllm,
    wrap,
)
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.loading import resolve_device
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.judges.load import load_rewarding, notices, roles
from medvqa_rl.rewards.open_answers import Compare, unrewardable
from medvqa_rl.rollout.vllm import VllmError


def train(
    config: Config,
    *,
    resume: bool = False,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    train_set: Dataset | None = None,
    val_set: Dataset | None = None,
) -> Path:
    """Train a policy on rewards.

    Args:
        config: all settings.
        resume: continue the run in ``config.output_dir``; the result is that of a run that was never interrupted.
        dry_run: load everything, roll out and differentiate one step, print its shapes, and leave nothing behind.
        given: the settings as the user wrote them, kept beside the resolved ones.
        train_set: samples to train on instead of those that ``config.data`` names.
        val_set: the same for evaluations.

    Returns:
        The run's folder.

    Raises:
        ValueError: the settings, the data, the model or the folder cannot be used; a sentence says why.
        NonFiniteError: a loss or gradient is not finite; the last sound weights and the samples are saved.
        UnscoredError: more than ``rewards.max_unscored`` of a step's completions could not be scored.
        Stopped: SIGINT or SIGTERM came; a checkpoint is saved.
    """
    check_vllm(config)
    accelerator = make_accelerator(config, config.train.prompts_per_step)
    for line in notices(config):
        accelerator.print(line)
    if train_set is None:
        train_set = load_dataset(config.data, "train")
    for line in check_rewardable(config, train_set):
        accelerator.print(line)
    judges = load_rewarding(config)
    rewards = Rewards(
        config.rewards,
        max_completion_length=config.rollout.max_completion_length,
        judges=judges,
        similarity=_similarity(config),
    )
    if dry_run:
        return _dry_run(config, accelerator, rewards, train_set)
    with Run(config, accelerator, kind="train", resume=resume, given=given) as run:
        setup = set_up(config, train_set, val_set)
        # The reference is the policy as it is before a checkpoint is loaded.
        reference = make_reference(config, setup.policy)
        run.start(setup.policy, setup.engine, setup.datasets, roles(judges))
        setup.vllm = start_vllm(config, accelerator, setup.policy)
        trained = run.use_trained(wrap(config, accelerator, setup.policy))
        learner = Learner(config, accelerator, setup.policy, reference, trained)
        steps = range(run.state.step, config.train.steps)
        feed = run.enter_context(make_feed(config, accelerator, setup, steps, config.train.prompts_per_step))
        for step in steps:
            began = time.perf_counter()
            run.set_phase("rollout")
            prompts = feed.prompts(step)
            with trained.gathered(), reporting(step), setup.sampling():
                groups = roll_out(config, accelerator, setup, step, prompts)
                rolled_out = time.perf_counter()
                run.set_phase("rewards")
                score = partial(rewards.score, step=step, count_tokens=setup.policy.processor.count_tokens)
                scores = score(groups)
                if times := config.rollout.max_resample_times:
                    others = partial(roll_out_others, config, accelerator, setup, step)
                    number = partial(number_among_ranks, [prompt.position for prompt in prompts])
                    groups, scores = resample(
                        groups, scores, max_attempts=times, roll_out=others, score=score, global_indices=number
                    )
            total = torch.from_numpy(scores.total)  # (P, G)
            advantages = group_advantages(total, scale=config.advantage.scale)
            own = record_completions(groups, scores, advantages.numpy())
            records = gather_records([prompt.position for prompt in prompts], own)
            metrics = rollout_metrics(records, config.rollout.num_generations)
            metrics |= template_metrics(records) if config.prompt.mix.is_on else {}
            check_unscored(config, groups, scores, metrics["unscored_rate"], step)
            scored = time.perf_counter()
            run.set_phase("update")
            if config.loss.type == "dpo":
                metrics |= learner.update(*preference_pairs(groups, total), step)
            else:
                metrics |= learner.update(groups, advantages, ~total.isnan(), step)
            metrics |= mean_over_ranks(gather_object([scores.extras]))
            metrics |= {
                "time/rollout": rolled_out - began,
                "time/update": time.perf_counter() - scored,
                "step_time": time.perf_counter() - began,
            }
            run.state.num_tokens += sum(record.prompt_length + record.length for record in records)
            run.finish_step(metrics, records, groups)
        run.finish()
    return run.dir.path


def _similarity(config: Config) -> Compare | None:
    """What compares open answers with gold answers, where the settings ask for it."""
    rewards = config.rewards
    if rewards.open_correctness != "similarity":
        return None
    device = resolve_device(config.model.device).type
    return load_similarity(rewards.similarity_model, device, "rewards.similarity_model").compare


def check_rewardable(config: Config, dataset: Dataset) -> list[str]:
    """Look at the questions, a thousand of them at most, for whether the rewards can tell their answers apart.

    Returns:
        Warnings.

    Raises:
        ValueError: all questions are open and only exact words would be rewarded, though nobody asked for that.
    """
    if dataset.is_endless:  # what is drawn is in the settings, and those were checked
        return []
    places = range(0, len(dataset), max(1, len(dataset) // 1000))
    error, warning = unrewardable(config.rewards, [dataset[place].answer_type for place in places])
    if error is not None:
        raise ValueError(error)
    return [] if warning is None else [warning]


def roll_out(
    config: Config, accelerator: Accelerator, setup: Setup, step: int, prompts: Sequence[PreparedPrompt] | None = None
) -> list[Group]:
    """This rank's groups of a step: P prompts with G sampled completions each.

    Args:
        prompts: of the step, as a feed gives them; None prepares them now.
    """
    if prompts is None:
        with make_feed(config, accelerator, setup, range(step, step + 1), config.train.prompts_per_step) as feed:
            prompts = feed.prompts(step)
    samples = [prepared.sample for prepared in prompts]
    try:
        return setup.sampler.rollout(
            samples,
            config.rollout,
            seed=config.train.seed,
            stream="train",
            step=step,
            occurrences=[prepared.occurrence for prepared in prompts],
            prompts=[prepared.prompt for prepared in prompts],
        )
    except FloatingPointError as error:
        names = first_few(sample.id for sample in samples)
        raise NonFiniteError(f"Step {step + 1} (samples: {names}): {error}", (), has_valid_weights=False) from error


@contextmanager
def reporting(step: int) -> Iterator[None]:
    """Turn a failure of vLLM into one of training, whose weights are saved."""
    try:
        yield
    except VllmError as error:
        raise TrainingFailed(f"Step {step + 1}: {error}", ()) from error


def number_among_ranks(places: Sequence[int], indices: Sequence[int]) -> list[int] | None:
    """Numbers of some of this rank's groups among those that all ranks give; None where no rank gives any.

    Args:
        places: of this rank's groups in the step.
        indices: which of them.
    """
    given = [places[index] for index in indices]
    everyones = sorted(gather_object(given))
    return [everyones.index(place) for place in given] if everyones else None


def gather_records(places: Sequence[int], records: Sequence[CompletionRecord]) -> list[CompletionRecord]:
    """The records of all ranks in the order of the step, whichever rank has which group.

    Args:
        places: of this rank's groups in the step.
        records: of their completions, group after group.
    """
    size = len(records) // len(places)
    rows = [(place, records[index * size : (index + 1) * size]) for index, place in enumerate(places)]
    in_order: list[tuple[int, Sequence[CompletionRecord]]] = sorted(gather_object(rows), key=lambda row: row[0])
    return [record for _, group in in_order for record in group]


def roll_out_others(
    config: Config, accelerator: Accelerator, setup: Setup, step: int, attempt: int, numbers: Sequence[int]
) -> list[Group]:
    """This rank's groups of other prompts than the step's own.

    Args:
        attempt: from 1; each draws other prompts.
        numbers: which of them this rank takes.
    """
    draws = step_samples(
        setup.datasets["train"],
        step,
        num_prompts=config.train.prompts_per_step,
        seed=config.train.seed,
        attempt=attempt,
    )
    taken = [draws[number] for number in numbers]
    prompts = [prepare_prompt(setup, config, draw, resampled_occurrence(attempt, draw.epoch), step) for draw in taken]
    return roll_out(config, accelerator, setup, step, prompts)


def check_unscored(config: Config, groups: Sequence[Group], scores: Scores, rate: float, step: int) -> None:
    """Stop where our own machinery fails too often: training on what is left would be another experiment.

    Raises:
        UnscoredError: the rate over all ranks is above ``rewards.max_unscored``.
    """
    if rate <= config.rewards.max_unscored:
        return
    failing = [name for name, values in scores.parts.items() if np.isnan(values).any()]
    bad = [group for group, row in zip(groups, scores.total) if np.isnan(row).any()]
    names = first_few(group.sample.id for group in bad)
    parts = ", ".join(failing) or "another rank"
    raise UnscoredError(
        f"Step {step + 1}: {rate:.0%} of the completions could not be scored by {parts} (samples: {names}), but "
        f"rewards.max_unscored is {config.rewards.max_unscored:.0%}: repair the reward, or "
        "raise the limit.",
        bad,
    )


def _vllm_rows(config: Config, metrics: Mapping[str, float]) -> dict[str, str]:
    """What a dry run says of vLLM."""
    if config.rollout.engine != "vllm":
        return {}
    rows = {"rollouts on": f"vLLM ({config.vllm.mode})"}
    name = "sampling/sampling_logp_difference"
    if f"{name}/mean" in metrics:
        apart = f"{metrics[f'{name}/mean']:.2g} nats on average, {metrics[f'{name}/max']:.2g} at most"
        rows["its log-probabilities"] = f"{apart} from those of training"
    return rows


def _dry_run(config: Config, accelerator: Accelerator, rewards: Rewards, train_set: Dataset | None) -> Path:
    """One rollout, one forward and backward pass, no optimizer step, nothing written."""
    setup = set_up(config, train_set, None, with_validation=False)
    reference = make_reference(config, setup.policy)
    setup.vllm = start_vllm(config, accelerator, setup.policy)
    trained = wrap(config, accelerator, setup.policy)
    learner = Learner(config, accelerator, setup.policy, reference, trained)
    began = time.perf_counter()
    with trained.gathered(), reporting(0), setup.sampling():
        groups = roll_out(config, accelerator, setup, 0)
    scores = rewards.score(groups, step=0, count_tokens=setup.policy.processor.count_tokens)
    total = torch.from_numpy(scores.total)
    experience = learner.prepare(groups, group_advantages(total, scale=config.advantage.scale), ~total.isnan())
    metrics, _ = learner.accumulate(experience)
    shapes = {
        f"micro-batch {index}": f"{tuple(micro.batch.input_ids.shape)} rows x tokens, "
        f"{tuple(micro.batch.mask.shape)} completions x tokens"
        for index, micro in enumerate(experience.micro_batches)
    }
    report_dry_run(
        setup,
        groups,
        {
            **{f"reward {name}": f"{np.nanmean(values):.3f}" for name, values in scores.parts.items()},
            **shapes,
            **_vllm_rows(config, metrics),
            "loss": f"{metrics['loss']:.6f}",
            "gradient norm": f"{metrics['grad_norm']:.4f}",
            "seconds": f"{time.perf_counter() - began:.2f}",
        },
    )
    return Path(config.output_dir)
