"""Answer questions: prepare prompts ahead, generate in batches of similar length, record.

Imports no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice, tee
from typing import TYPE_CHECKING, TypeVar

from medvqa_rl.config import EvalConfig, RolloutConfig
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.types import (
    Dataset,
    Group,
    Sample,
    Template,
)
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.data.images.fingerprints import image_hash
from medvqa_rl.data.images.prefetch import prefetch_map
from medvqa_rl.data.splits import choose
from medvqa_rl.evaluation.records import EvalRecord
from medvqa_rl.evaluation.scoring import AnswerSettings, Question, make_record

if TYPE_CHECKING:
    from medvqa_rl.rollout.decode import RolloutEngine

Progress = Callable[[int, int], None]
"""Called with the number of answered questions and their total."""

BATCHES_PER_CHUNK = 2
"""Questions are answered in chunks of this many batches. Inside a chunk the batch is refilled as sequences end. More
batches per chunk would keep it full for longer, but an interrupted evaluation would repeat more, and few questions
would be divided among fewer shards."""

Item = TypeVar("Item")
View = Callable[[Sample], Sample]
"""Returns what the model is shown in place of a sample, such as the same question with a blank image."""


def chosen_samples(dataset: Dataset, config: EvalConfig) -> list[Sample]:
    """Choose the questions to evaluate without decoding images; ``eval.seed`` picks ``eval.max_samples`` of them.

    Raises:
        ValueError: the data set is endless, or two of its samples have the same id.
    """
    if dataset.is_endless:
        raise ValueError(
            f"The data set {dataset.name} is endless and cannot be evaluated: use its val or test split, or set a "
            "number of samples."
        )
    keys = [str(index) for index in range(len(dataset))]
    samples = [dataset[index] for index in choose(keys, config.max_samples, config.seed)]
    if len({sample.id for sample in samples}) != len(samples):
        raise ValueError(f"Two samples of {dataset.name} have the same id: ids must be unique within a data set.")
    return samples


def batches(samples: Sequence[Sample], template: Template, size: int) -> list[list[Sample]]:
    """Split questions into batches, ordered by image and length: questions about the same images share their prefill,
    and prompts of similar length need little padding.

    The length is estimated at four characters or 784 pixels (28 x 28) per token, with pixels from the headers of image
    files. It depends on the questions alone, so a resumed evaluation forms the same batches.
    """

    def order(sample: Sample) -> tuple[float, tuple[str, ...], int]:
        content = render_prompt(sample, template).messages[-1]["content"]
        characters = sum(len(part["text"]) for part in content if part["type"] == "text")
        pixels = sum(source.header_pixels() or 0 for source in sample.images)
        return pixels / 784, tuple(source.key for source in sample.images), characters

    ordered = sorted(samples, key=order)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answer_all(
    load_engine: Callable[[], RolloutEngine],
    samples: Sequence[Sample],
    settings: AnswerSettings,
    *,
    view: View | None = None,
    done: Collection[str] = (),
    part: slice = slice(None),
    save: Callable[[Sequence[EvalRecord]], None],
    progress: Progress | None = None,
) -> None:
    """Answer every question that has no record yet, and save the records batch by batch.

    A chunk of :data:`BATCHES_PER_CHUNK` batches with a missing record is generated again as a whole, so that answers
    do not depend on where an earlier attempt was interrupted; only the missing records are saved.

    Args:
        load_engine: called only if a question is left.
        samples: the questions.
        settings: of this pass.
        view: defaults to showing the samples as they are.
        done: ids that already have a record.
        part: the chunks to answer. Every chunk is the same whoever answers it, so no answer depends on the division.
        save: called with the new records of each batch.
        progress: called after each batch.
    """
    size = settings.config.batch_size
    own = batches(samples, settings.template, size * BATCHES_PER_CHUNK)[part]
    unfinished = [batch for batch in own if any(sample.id not in done for sample in batch)]
    total = sum(map(len, own))
    count = sum(sample.id in done for batch in own for sample in batch)
    if not unfinished:
        return
    engine = load_engine()
    questions = prefetch_map(
        lambda sample: prepare(engine, sample, view),
        chain.from_iterable(unfinished),
        workers=settings.prefetch.workers,
        max_bytes=settings.prefetch.max_mib * 2**20,
        ahead=size,
        cost=lambda sample: engine.processor.encoding_bytes(sample if view is None else view(sample)),
        size=lambda question: 0 if question.prompt is None else question.prompt.nbytes,
    )
    with closing(questions):
        for chunk in unfinished:
            records = answer(engine, islice(questions, len(chunk)), settings)
            for missing in _batched((record for record in records if record.sample_id not in done), size):
                save(missing)
                count += len(missing)
                if progress is not None:
                    progress(count, total)


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items; the last one may be shorter."""
    rest = iter(items)
    return iter(lambda: list(islice(rest, size)), [])


def prepare(engine: RolloutEngine, sample: Sample, view: View | None = None) -> Question:
    """Decode the images of a question and encode its prompt. An unusable image affects only its own question."""
    shown = view(sample) if view is not None else sample
    try:
        images = [source.load() for source in shown.images]
        sources = tuple(MemoryImage(source.key, image) for source, image in zip(shown.images, images))
        prompt = engine.encode(replace(shown, images=sources))
    except ValueError as error:
        return Question(sample, sample, None, None, str(error))
    return Question(sample, shown, prompt, image_hash(images), None)


def answer(engine: RolloutEngine, questions: Iterable[Question], settings: AnswerSettings) -> Iterator[EvalRecord]:
    """Answer questions; yields their records in the same order. Greedy answers are decoded as a stream: a question
    joins when another is answered."""
    if settings.config.num_samples:
        for batch in _batched(questions, settings.config.batch_size):
            yield from _answer_with_samples(engine, batch, settings)
        return
    waiting: deque[Question] = deque()

    def usable() -> Iterator[Question]:
        for question in questions:
            waiting.append(question._replace(prompt=None))  # which is large
            if question.prompt is not None:
                yield question

    for group in _greedy(engine, usable(), settings):
        while waiting[0].reason is not None:
            yield make_record(waiting.popleft(), None, (), settings, engine.processor)
        yield make_record(waiting.popleft(), group, (), settings, engine.processor)
    for question in waiting:
        yield make_record(question, None, (), settings, engine.processor)


def _greedy(engine: RolloutEngine, questions: Iterable[Question], settings: AnswerSettings) -> Iterator[Group]:
    """Decode the answers of usable questions greedily."""
    asked, again = tee(questions)
    return engine.greedy(
        (question.shown for question in asked),
        max_completion_length=settings.max_completion_length,
        batch_size=settings.config.batch_size,
        prompts=(question.prompt for question in again if question.prompt is not None),
    )


def _answer_with_samples(
    engine: RolloutEngine, batch: Sequence[Question], settings: AnswerSettings
) -> Iterator[EvalRecord]:
    """Answer questions greedily and by sampling."""
    config = settings.config
    usable = [question for question in batch if question.prompt is not None]
    greedy = {group.sample.id: group for group in _greedy(engine, usable, settings)}
    assert greedy.keys() == {question.shown.id for question in usable}, "one answer per question, and ids are unique"
    sampled: dict[str, Group] = {}
    if usable:
        rollout = RolloutConfig(
            num_generations=config.num_samples,
            max_completion_length=settings.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            max_batch=max(1, config.batch_size // config.num_samples),
        )
        drawn = engine.rollout(
            [question.shown for question in usable],
            rollout,
            seed=config.seed,
            stream="eval",
            step=0,
            prompts=[question.prompt for question in usable if question.prompt is not None],
        )
        sampled = {group.sample.id: group for group in drawn}
    for question in batch:
        id = question.sample.id
        more = sampled[id].completions if id in sampled else ()
        yield make_record(question, greedy.get(id), more, settings, engine.processor)
