"""The prompts of every step, prepared by background threads while the step before it is computed.

What a step works on stays a function of the step alone (:mod:`sampler`): how many threads prepare
it, and how far they were when a run was killed, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import islice
from types import TracebackType
from typing import NamedTuple

from accelerate.accelerator import Accelerator

from medvqa_rl.config import Config, PrefetchConfig, PromptConfig
from medvqa_rl.core.prompts import as_asked
from medvqa_rl.core.types import Dataset, EncodedPrompt, Sample
from medvqa_rl.data.images.prefetch import work_ahead
from medvqa_rl.learning.batching.mixing import template_for
from medvqa_rl.learning.batching.sampler import Draw, samples_at
from medvqa_rl.learning.run.errors import UnusableSampleError
from medvqa_rl.learning.setup import Setup
from medvqa_rl.rollout.decode import RolloutEngine


class Prepared(NamedTuple):
    """A sample as its prompt asks it, the epoch that it is drawn in, the prompt, and its number in the step over all
    ranks."""

    sample: Sample
    epoch: int
    prompt: EncodedPrompt
    place: int


class Feed(AbstractContextManager["Feed"]):
    """Prompts of consecutive steps. Leaving the context ends the threads."""

    def __init__(
        self,
        dataset: Dataset,
        engine: RolloutEngine,
        prefetch: PrefetchConfig,
        *,
        steps: range,
        num_prompts: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        asking: PromptConfig = PromptConfig(),
    ) -> None:
        """
        Args:
            dataset: samples are drawn from it by the caller's thread; their images are loaded by others.
            engine: encodes the prompts.
            prefetch: threads, and the bound on their memory.
            steps: those that will be asked for, in their order; nothing beyond is prepared.
            num_prompts: P, prompts of a step over all ranks.
            seed: of the order of the samples.
            rank: which share of them this is.
            num_ranks: among how many.
            asking: how questions are asked.
        """

        def draws() -> Iterator[tuple[int, Draw]]:
            for step in steps:
                for draw in samples_at(
                    dataset,
                    step,
                    num_prompts=num_prompts,
                    seed=seed,
                    rank=rank,
                    num_ranks=num_ranks,
                    cost=engine.expected_tokens,
                ):
                    yield step, draw

        def prepare(place: tuple[int, Draw]) -> Prepared:
            step, draw = place
            return prepared(engine, draw, draw.epoch, asking, seed=seed, step=step)

        self._share = num_prompts // num_ranks
        self._steps = iter(steps)
        self._prepared = work_ahead(
            prepare,
            draws(),
            workers=prefetch.workers,
            max_bytes=prefetch.max_mib * 2**20,
            ahead=self._share,
            cost=lambda place: engine.encoding_bytes(place[1].sample),
            size=lambda made: made.prompt.nbytes,
        )

    def at(self, step: int) -> list[Prepared]:
        """This rank's prompts of a step; the threads turn to the next one.

        Raises:
            UnusableSampleError: an image cannot be used; the message names file and sample.
        """
        expected = next(self._steps)
        assert step == expected, f"step {step} was asked for where {expected} is prepared"
        try:
            return list(islice(self._prepared, self._share))
        except ValueError as error:
            raise UnusableSampleError(str(error)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prepared.close()


def prepared(
    engine: RolloutEngine, draw: Draw, occurrence: int, asking: PromptConfig, *, seed: int, step: int
) -> Prepared:
    """A sample asked by the template that its place in the run draws.

    Raises:
        ValueError: an image cannot be used; the message names file and sample.
    """
    template = template_for(draw.sample, asking, seed=seed, step=step, occurrence=occurrence)
    asked = as_asked(draw.sample, template)
    return Prepared(asked, occurrence, engine.encode(asked, template), draw.place)


def prepare_now(setup: Setup, config: Config, draw: Draw, occurrence: int, step: int) -> Prepared:
    """A prompt that no feed has prepared.

    Args:
        occurrence: what tells it from other draws of the same sample in the step.

    Raises:
        UnusableSampleError: an image cannot be used; the message names file and sample.
    """
    try:
        return prepared(setup.engine, draw, occurrence, config.prompt, seed=config.train.seed, step=step)
    except ValueError as error:
        raise UnusableSampleError(str(error)) from error


def make_feed(config: Config, accelerator: Accelerator, setup: Setup, steps: range, num_prompts: int) -> Feed:
    """The prompts that this rank trains on, from the settings."""
    return Feed(
        setup.datasets["train"],
        setup.engine,
        config.prefetch,
        steps=steps,
        num_prompts=num_prompts,
        seed=config.train.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        asking=config.prompt,
    )
