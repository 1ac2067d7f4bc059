"""The prompts of each step, prepared by background threads while the previous step is computed.

The samples of a step are a pure function of the step (sampler.py). They do not depend on the number of threads or on
how far the threads were when a run was interrupted.
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
from medvqa_rl.core.types import Dataset, EncodedPrompt, ImageSource, Sample
from medvqa_rl.data.images.prefetch import prefetch_map
from medvqa_rl.learning.batching.mixing import template_for
from medvqa_rl.learning.batching.sampler import DrawnSample, step_samples
from medvqa_rl.learning.run.errors import UnusableSampleError
from medvqa_rl.learning.setup import Setup
from medvqa_rl.rollout.decode import RolloutEngine


class PreparedPrompt(NamedTuple):
    """A sample with its encoded prompt."""

    sample: Sample
    """The sample as its template asks it."""
    occurrence: int
    """Distinguishes repeated draws of the sample within the step: the epoch, or that and the resampling attempt."""
    prompt: EncodedPrompt
    position: int
    """Its index among the step's prompts over all ranks."""


class Feed(AbstractContextManager["Feed"]):
    """Prompts of consecutive steps. Leaving the context stops the threads."""

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
        prompt_config: PromptConfig = PromptConfig(),
        in_order: bool = False,
    ) -> None:
        """
        Args:
            dataset: samples are drawn in the caller's thread; the threads load their images.
            engine: encodes the prompts.
            prefetch: number of threads and their memory limit.
            steps: the steps to prepare, in the order in which :meth:`prompts` is called.
            num_prompts: P, prompts per step over all ranks.
            seed: seed of the sample order.
            prompt_config: which templates to use.
            in_order: read the data set in its own order.
        """

        def draws() -> Iterator[tuple[int, DrawnSample]]:
            for step in steps:
                for draw in step_samples(
                    dataset,
                    step,
                    num_prompts=num_prompts,
                    seed=seed,
                    rank=rank,
                    num_ranks=num_ranks,
                    in_order=in_order,
                    cost=engine.processor.expected_tokens,
                ):
                    yield step, draw

        def prepare(item: tuple[int, DrawnSample]) -> PreparedPrompt:
            step, draw = item
            return _prepare(engine, draw, draw.epoch, prompt_config, seed=seed, step=step)

        self._share = num_prompts // num_ranks
        self._steps = iter(steps)
        self._prepared = prefetch_map(
            prepare,
            draws(),
            workers=prefetch.workers,
            max_bytes=prefetch.max_mib * 2**20,
            ahead=self._share,
            cost=lambda item: engine.processor.encoding_bytes(item[1].sample),
            size=lambda prepared: prepared.prompt.nbytes,
        )

    def prompts(self, step: int) -> list[PreparedPrompt]:
        """This rank's prompts of a step. The threads then start on the next step.

        Raises:
            UnusableSampleError: an image cannot be used; the message names the file and the sample.
        """
        expected = next(self._steps)
        assert step == expected, f"step {step} was requested, but {expected} is next"
        return list(islice(self._prepared, self._share))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prepared.close()


def _prepare(
    engine: RolloutEngine, draw: DrawnSample, occurrence: int, config: PromptConfig, *, seed: int, step: int
) -> PreparedPrompt:
    """Draw a sample's template and encode its prompt.

    Raises:
        UnusableSampleError: an image cannot be used; the message names the file and the sample.
    """
    template = template_for(draw.sample, config, seed=seed, step=step, occurrence=occurrence)
    asked = as_asked(draw.sample, template)
    try:
        prompt = engine.encode(asked, template)
    except ValueError as error:
        raise UnusableSampleError(str(error), [image.key for image in asked.images if not _loads(image)]) from error
    return PreparedPrompt(asked, occurrence, prompt, draw.position)


def _loads(image: ImageSource) -> bool:
    try:
        image.load()
    except ValueError:
        return False
    return True


def prepare_prompt(setup: Setup, config: Config, draw: DrawnSample, occurrence: int, step: int) -> PreparedPrompt:
    """Prepare a single prompt outside of a feed, such as one that is resampled.

    Args:
        occurrence: distinguishes this draw from other draws of the same sample within the step.

    Raises:
        UnusableSampleError: an image cannot be used; the message names the file and the sample.
    """
    return _prepare(setup.engine, draw, occurrence, config.prompt, seed=config.train.seed, step=step)


def make_feed(config: Config, accelerator: Accelerator, setup: Setup, steps: range, num_prompts: int) -> Feed:
    """The feed of this rank's training prompts."""
    return Feed(
        setup.datasets["train"],
        setup.engine,
        config.prefetch,
        steps=steps,
        num_prompts=num_prompts,
        seed=config.train.seed,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        prompt_config=config.prompt,
        in_order=config.data.order != "shuffled",
    )
