"""Collects what a step learns from: sampled completions and their rewards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from accelerate.utils.operations import gather_object

from medvqa_rl.config import Config, RolloutConfig
from medvqa_rl.core.text import first_few
from medvqa_rl.core.types import Group
from medvqa_rl.learning.batching.feed import PreparedPrompt, prepare_prompt
from medvqa_rl.learning.batching.resampling import resample, resampled_occurrence
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.looking import answer_probabilities, image_gains
from medvqa_rl.learning.run.errors import NonFiniteError, TrainingFailed
from medvqa_rl.learning.run.step_metrics import CompletionRecord
from medvqa_rl.learning.setup import Setup
from medvqa_rl.rewards import Rewards
from medvqa_rl.rewards.scores import Scores
from medvqa_rl.rollout.vllm.agreement import Rehearsal, VllmError, rehearse


class StepClock:
    """Reports the phases of a step to the other ranks and measures how long they take."""

    def __init__(self, set_phase: Callable[[str], None] = lambda phase: None) -> None:
        self._set_phase = set_phase
        self._starts: dict[str, float] = {}

    def start(self, phase: str) -> None:
        """Start a phase, which ends the previous one: ``rollout``, ``rewards``, then ``update``."""
        self._starts[phase] = time.perf_counter()
        self._set_phase(phase)

    def times(self) -> dict[str, float]:
        """Seconds until now, as logged."""
        starts, now = self._starts, time.perf_counter()
        return {
            "time/rollout": starts["rewards"] - starts["rollout"],
            "time/update": now - starts["update"],
            "step_time": now - starts["rollout"],
        }


def roll_out(config: Config, setup: Setup, step: int, prompts: Sequence[PreparedPrompt]) -> list[Group]:
    """Sample G completions for each of P prompts.

    Raises:
        NonFiniteError: the policy's logits are not finite.
    """
    samples = [prompt.sample for prompt in prompts]
    try:
        return setup.sampler.rollout(
            samples,
            config.rollout,
            seed=config.train.seed,
            stream="train",
            step=step,
            occurrences=[prompt.occurrence for prompt in prompts],
            prompts=[prompt.prompt for prompt in prompts],
        )
    except FloatingPointError as error:
        names = first_few(sample.id for sample in samples)
        raise NonFiniteError(f"Step {step + 1} (samples: {names}): {error}", (), has_valid_weights=False) from error


class Collector:
    """Rolls out and scores the groups of a step. All ranks call :meth:`sample` together."""

    def __init__(self, config: Config, setup: Setup, trained: TrainedPolicy, rewards: Rewards) -> None:
        self.config = config
        self.setup = setup
        self.trained = trained
        self.rewards = rewards

    def sample(self, step: int, prompts: Sequence[PreparedPrompt], clock: StepClock) -> tuple[list[Group], Scores]:
        """Roll out this rank's prompts, score the completions, and resample groups without signal if configured.

        Args:
            step: counted from 0.
            prompts: P prompts from the feed.
            clock: in its phase ``rollout``; advanced to ``rewards``.

        Returns:
            P groups of G completions, and their (P, G) scores.

        Raises:
            NonFiniteError: the policy's logits are not finite.
            TrainingFailed: vLLM failed.
        """
        with self.trained.gathered(), _vllm_failure_stops_training(step), self.setup.sampling():
            groups = roll_out(self.config, self.setup, step, prompts)
            clock.start("rewards")
            scores = self.score(step, groups)
            if self.config.rollout.max_resample_times:
                groups, scores = resample(
                    groups,
                    scores,
                    max_attempts=self.config.rollout.max_resample_times,
                    roll_out=partial(self._roll_out_attempt, step),
                    score=partial(self.score, step),
                    global_indices=partial(indices_over_ranks, prompts),
                )
        return groups, scores

    def rehearse(self, prompts: Sequence[PreparedPrompt]) -> Rehearsal | None:
        """Hand changed weights over to vLLM, and compare; see :func:`medvqa_rl.rollout.vllm.agreement.rehearse`.

        Args:
            prompts: P prompts from the feed.

        Returns:
            What was found; None if vLLM does not sample.

        Raises:
            TrainingFailed: vLLM did not take over the changed weights.
        """
        if self.setup.vllm is None:
            return None

        def sample(rollout: RolloutConfig) -> list[Group]:
            with self.setup.sampling():
                return roll_out(self.config.model_copy(update={"rollout": rollout}), self.setup, 0, prompts)

        with self.trained.gathered(), _vllm_failure_stops_training(0):
            return rehearse(
                self.setup.policy, self.config.rollout, sample, least=lambda value: min(gather_object([value]))
            )

    def score(self, step: int, groups: Sequence[Group]) -> Scores:
        """Score every completion of P groups."""
        policy, rewards = self.setup.policy, self.config.rewards
        gains = image_gains(policy, groups, self.config, self.setup.datasets["train"]) if rewards.looking else None
        sure = answer_probabilities(policy, groups, self.config) if rewards.calibration else None
        count_tokens = policy.processor.count_tokens
        return self.rewards.score(groups, step=step, count_tokens=count_tokens, gains=gains, confidences=sure)

    def _roll_out_attempt(self, step: int, attempt: int, indices: Sequence[int]) -> list[Group]:
        """Roll out other prompts than the step's own.

        Args:
            attempt: counted from 1; each draws other prompts.
            indices: the prompts of the attempt that this rank rolls out.
        """
        train = self.config.train
        draws = step_samples(
            self.setup.datasets["train"], step, num_prompts=train.prompts_per_step, seed=train.seed, attempt=attempt
        )
        prompts = [
            prepare_prompt(self.setup, self.config, draw, resampled_occurrence(attempt, draw.epoch), step)
            for draw in (draws[index] for index in indices)
        ]
        return roll_out(self.config, self.setup, step, prompts)


@contextmanager
def _vllm_failure_stops_training(step: int) -> Iterator[None]:
    """Raise TrainingFailed in place of VllmError, so that the run saves the weights."""
    try:
        yield
    except VllmError as error:
        raise TrainingFailed(f"Step {step + 1}: {error}", ()) from error


def indices_over_ranks(prompts: Sequence[PreparedPrompt], indices: Sequence[int]) -> list[int] | None:
    """Number the groups that any rank needs to replace, and return the numbers of this rank's; None if there are none.

    Args:
        prompts: this rank's prompts.
        indices: those of them whose groups this rank needs to replace.
    """
    own = [prompts[index].position for index in indices]
    everyones = sorted(gather_object(own))
    return [everyones.index(position) for position in own] if everyones else None


def gather_records(prompts: Sequence[PreparedPrompt], records: Sequence[CompletionRecord]) -> list[CompletionRecord]:
    """Gather the records of all ranks in the order of the step's prompts, whichever rank has which prompt.

    Args:
        prompts: this rank's prompts.
        records: records of their completions, group after group.
    """
    size = len(records) // len(prompts)
    rows = [(prompt.position, records[index * size : (index + 1) * size]) for index, prompt in enumerate(prompts)]
    in_order: list[tuple[int, Sequence[CompletionRecord]]] = sorted(gather_object(rows), key=lambda row: row[0])
    return [record for _, group in in_order for record in group]
