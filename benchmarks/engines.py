"""This package for ``benchmarks.step``, and checks that its steps are comparable with another engine's.

Both engines use the same weights, questions, images, rewards, group size, optimizer and loss. Both suppress all
control tokens including the stop tokens, so every completion has exactly ``length`` tokens (by default TRL suppresses
only the image token, and crashes if the policy samples another vision token). The sampled tokens differ because the
random numbers do, but the measured work does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Workload, make_config, make_data, now
from medvqa_rl.core.types import Completion, Group, Sample
from medvqa_rl.learning.batching.feed import make_feed
from medvqa_rl.learning.batching.sampler import step_samples
from medvqa_rl.learning.collector import roll_out
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.setup import make_accelerator, set_up, start_vllm, wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.processor import Processor
from medvqa_rl.models.reference import Reference, load_reference
from medvqa_rl.rewards import Rewards
from medvqa_rl.rollout.decode import RolloutEngine


@dataclass(frozen=True)
class Step:
    """Time and results of one step."""

    rollout: float
    """Seconds for preprocessing, sampling and decoding to text."""
    reward: float
    reference: float
    update: float
    """Seconds for everything else, so that the four phases add up to the step."""
    prompt_ids: list[list[int]]
    """(P,) token ids of each prompt, including image placeholders."""
    completion_ids: list[list[int]]
    """(B,) sampled token ids."""
    rewards: list[float]
    """(B,)"""
    loss: float
    entropy: float
    """Mean over the sampled tokens; close for both engines if they sample from the same distribution."""
    grad_norm: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return self.rollout + self.reward + self.reference + self.update

    @property
    def completion_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(map(len, self.completion_ids))

    def as_dict(self) -> dict[str, Any]:
        """The fields as a dict, for JSON."""
        return asdict(self)


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - began

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def samples_by_step(workload: Workload, steps: int) -> list[list[Sample]]:
    """The samples of each step, in the order in which this package draws them."""
    data = make_data(workload.prompts * steps, workload.side)
    return [
        [draw.sample for draw in step_samples(data, step, num_prompts=workload.prompts, seed=0, rank=0, num_ranks=1)]
        for step in range(steps)
    ]


def forbid_stopping(processor: Processor) -> None:
    """Suppress stop tokens, so that completions always reach the limit."""
    processor.suppressed_ids = tuple(sorted({*processor.suppressed_ids, *processor.stop_ids}))


def run_ours(
    workload: Workload,
    folder: Path,
    steps: int,
    *,
    attention: str | None = None,
    rollout: str | None = None,
    load_in_4bit: bool = False,
    reference_noise: float = 0.0,
) -> list[Step]:
    """Run training steps with this package.

    Args:
        folder: model folder.
        attention: ``model.attention``; None uses the default.
        rollout: ``rollout.engine``; None uses the default.
        load_in_4bit: ``model.load_in_4bit``.
        reference_noise: scale of noise added to the reference's weights, so that tests see a KL divergence above 0.
    """
    config = make_config(
        workload, folder, steps=steps, attention=attention, rollout=rollout, load_in_4bit=load_in_4bit
    )
    data = make_data(workload.prompts * steps, workload.side)
    accelerator = make_accelerator(config, workload.prompts)
    setup = set_up(config, data, None, with_validation=False)
    forbid_stopping(setup.policy.processor)
    decoder = "graph" if rollout == "graph" else "eager"
    setup.engine = RolloutEngine(setup.policy, config.prompt.template, engine=decoder)
    setup.vllm = start_vllm(config, accelerator, setup.policy)
    rewards = Rewards(config.rewards)
    watch = Stopwatch()
    reference = load_reference(setup.policy) if workload.beta > 0 else None
    if reference is not None:
        if reference_noise:
            with reference.active() as model:
                add_noise(model, reference_noise)
        _time_reference(reference, watch)
    learner = Learner(config, accelerator, setup.policy, reference, wrap(config, accelerator, setup.policy))
    done = []
    with make_feed(config, accelerator, setup, range(steps), workload.prompts) as feed:
        for step in range(steps):
            with watch.phase("rollout"), setup.sampling():
                groups = roll_out(config, setup, step, feed.prompts(step))
            with watch.phase("reward"):
                total = torch.from_numpy(rewards.score(groups, step=step).total)
            with watch.phase("update"):
                advantages = group_advantages(total, scale=config.advantage.scale)
                metrics = learner.update(groups, advantages, ~total.isnan(), step)
            seconds = watch.take()
            seconds["update"] -= seconds.get("reference", 0.0)
            done.append(
                Step(
                    **{phase: seconds.get(phase, 0.0) for phase in ("rollout", "reward", "reference", "update")},
                    prompt_ids=[group.prompt.input_ids.tolist() for group in groups],
                    completion_ids=[list(c.token_ids) for group in groups for c in group.completions],
                    rewards=total.flatten().tolist(),
                    loss=metrics["loss"],
                    entropy=metrics["entropy"],
                    grad_norm=metrics["grad_norm"],
                )
            )
    return done


def add_noise(model: torch.nn.Module, scale: float) -> None:
    """Add a little reproducible noise to all weights of the language model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "lora" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += scale * noise.to(parameter.device, parameter.dtype)


def _time_reference(reference: Reference, watch: Stopwatch) -> None:
    """Make a reference record the time of its passes."""
    active: Callable[[], Any] = reference.active

    @contextmanager
    def timed() -> Iterator[Any]:
        with watch.phase("reference"), active() as model:
            yield model

    reference.active = timed  # type: ignore[method-assign]


def same_work(ours: Sequence[Step], theirs: Sequence[Step], tolerance: float = 0.02) -> list[str]:
    """Describe how the work of two engines differs; empty if it is the same.

    The prompts must be equal token for token, and every completion must have the same number of tokens. Sampling used
    different random numbers, so losses and entropies are only compared approximately.

    Args:
        tolerance: absolute tolerance for losses; the relative tolerance for entropies is ten times as large.
    """
    found = []
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if mine.prompt_ids != other.prompt_ids:
            found.append(f"step {step}: the prompts differ")
        if list(map(len, mine.completion_ids)) != list(map(len, other.completion_ids)):
            found.append(f"step {step}: the lengths of the completions differ")
        if abs(mine.loss - other.loss) > tolerance:
            found.append(f"step {step}: the losses are {mine.loss:.5f} and {other.loss:.5f}")
        if abs(mine.entropy - other.entropy) > 10 * tolerance * other.entropy:
            found.append(f"step {step}: the entropies are {mine.entropy:.4f} and {other.entropy:.4f}")
    return found


def replay(
    workload: Workload, folder: Path, steps: Sequence[Step], *, reference_noise: float = 0.0
) -> tuple[float, float]:
    """Compute loss and gradient norm with this package for the completions of the other engine's first step.

    Args:
        steps: steps returned by ``run_trl`` with the same workload, folder and noise.
    """
    config = make_config(workload, folder)
    accelerator = make_accelerator(config, workload.prompts)
    setup = set_up(config, make_data(workload.prompts, workload.side), None, with_validation=False)
    policy = setup.policy
    step, samples = steps[0], samples_by_step(workload, len(steps))[0]
    ids = iter(step.completion_ids)
    groups = [
        Group(
            sample,
            policy.processor.encode(sample, config.prompt.template),
            [Completion(tuple(next(ids)), "", True) for _ in range(workload.generations)],
        )
        for sample in samples
    ]
    reference = load_reference(policy) if workload.beta > 0 else None
    if reference is not None and reference_noise:
        with reference.active() as model:
            add_noise(model, reference_noise)
    learner = Learner(config, accelerator, policy, reference, wrap(config, accelerator, policy))
    total = torch.tensor(step.rewards).view(workload.prompts, workload.generations).double()
    experience = learner.prepare(groups, group_advantages(total, scale="group"), ~total.isnan())
    policy.model.train()
    metrics, _ = learner.accumulate(experience)
    return metrics["loss"], metrics["grad_norm"]
