"""From questions to records: prepare prompts ahead, ask the engine in batches of similar length, score the answers.

Imports torch only through the engine that is passed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from medvqa_rl.config import EvalConfig, PrefetchConfig, RolloutConfig
from medvqa_rl.core.answers import ParsedAnswer, is_correct, parse_completion, read_choice, token_f1
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import Completion, Dataset, EncodedPrompt, Group, Sample, Template
from medvqa_rl.data.images.files import MemoryImage
from medvqa_rl.data.images.prefetch import prefetch_map
from medvqa_rl.data.phantom.claims import claims, faithfulness
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.data.splits import choose
from medvqa_rl.evaluation.measures.metrics import exact_match, rouge_l
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer

if TYPE_CHECKING:
    from PIL.Image import Image

    from medvqa_rl.models.qwen_vl import Processor
    from medvqa_rl.rollout.sampling import Stream

Progress = Callable[[int, int], None]
"""Called with the number of questions done and their total."""

View = Callable[[Sample], Sample]
"""What the model is shown instead of a sample, such as the same question with a blank image."""


class Engine(Protocol):
    """What evaluation needs of :class:`medvqa_rl.rollout.decode.RolloutEngine`."""

    @property
    def processor(self) -> Processor: ...

    def encode(self, sample: Sample) -> EncodedPrompt: ...

    def greedy(
        self,
        samples: Sequence[Sample],
        *,
        max_completion_length: int,
        batch_size: int,
        prompts: Sequence[EncodedPrompt] | None = None,
    ) -> Iterator[Group]: ...

    def rollout(
        self,
        samples: Sequence[Sample],
        config: RolloutConfig,
        *,
        seed: int,
        stream: Stream,
        step: int,
        prompts: Sequence[EncodedPrompt],
    ) -> list[Group]: ...


@dataclass(frozen=True)
class Asking:
    """How questions are asked."""

    config: EvalConfig
    max_completion_length: int
    template: Template = "think_answer"
    dataset: str = ""
    """Name of the data set, for the records."""
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    """How the prompts of the next batch are prepared; no answer depends on it."""


class Prepared(NamedTuple):
    """A question that is ready to be asked, or the reason why it cannot be."""

    sample: Sample
    """As it is in the data set."""
    shown: Sample
    """As the model is shown it."""
    prompt: EncodedPrompt | None
    """None where there is a reason."""
    image_hash: str | None
    reason: str


def chosen_samples(dataset: Dataset, config: EvalConfig) -> list[Sample]:
    """The questions to evaluate, their images not decoded yet; ``eval.max_samples`` keeps a choice by ``eval.seed``.

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
    """Questions in batches of prompts of similar length, so that little is padded.

    The length is estimated: four characters and 784 pixels (28 x 28) a token, the pixels of image files by their
    headers. It depends on the questions alone, so a continued evaluation forms the same batches.
    """

    def length(sample: Sample) -> float:
        content = render_prompt(sample, template).messages[0]["content"]
        characters = sum(len(part["text"]) for part in content if part["type"] == "text")
        return characters / 4 + sum(source.header_pixels() or 0 for source in sample.images) / 784

    ordered = sorted(samples, key=length)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answer_all(
    engine: Callable[[], Engine],
    samples: Sequence[Sample],
    asking: Asking,
    *,
    view: View | None = None,
    done: Collection[str] = (),
    keep: Callable[[Sequence[EvalRecord]], None],
    progress: Progress | None = None,
) -> None:
    """Ask every question that is not done yet, and hand the records over batch by batch.

    A batch of which anything is missing is asked again as a whole, so that its answers do not depend on where an
    earlier attempt stopped; only what is missing is handed over.

    Args:
        engine: gives the engine; called only if there is something to ask.
        samples: the questions.
        view: what the model is shown instead.
        done: ids that have a record already.
        keep: takes the records of a batch.
        progress: called after every batch.
    """
    count = sum(sample.id in done for sample in samples)
    size = asking.config.batch_size
    asked = [
        batch for batch in batches(samples, asking.template, size) if any(sample.id not in done for sample in batch)
    ]
    if not asked:
        return
    model = engine()
    questions = prefetch_map(
        lambda sample: prepare(model, sample, view),
        chain.from_iterable(asked),
        workers=asking.prefetch.workers,
        max_bytes=asking.prefetch.max_mib * 2**20,
        ahead=size,
        cost=lambda sample: model.processor.encoding_bytes(sample if view is None else view(sample)),
        size=lambda question: 0 if question.prompt is None else question.prompt.nbytes,
    )
    with closing(questions):
        for batch in asked:
            records = answer(model, list(islice(questions, len(batch))), asking)
            missing = [record for record in records if record.sample_id not in done]
            keep(missing)
            count += len(missing)
            if progress is not None:
                progress(count, len(samples))


def prepare(engine: Engine, sample: Sample, view: View | None = None) -> Prepared:
    """Decode the images of a question and encode its prompt. An image that cannot be used is told apart from any other
    error and spoils its own question only."""
    shown = view(sample) if view is not None else sample
    try:
        images = [source.load() for source in shown.images]
        sources = tuple(MemoryImage(source.key, image) for source, image in zip(shown.images, images))
        prompt = engine.encode(replace(shown, images=sources))
    except ValueError as error:
        return Prepared(sample, shown, None, None, str(error))
    return Prepared(sample, shown, prompt, image_hash(images), "")


def answer(engine: Engine, batch: Sequence[Prepared], asking: Asking) -> list[EvalRecord]:
    """Records of some questions in their order."""
    config = asking.config
    ready = [(question.shown, question.prompt) for question in batch if question.prompt is not None]
    samples, prompts = [shown for shown, _ in ready], [prompt for _, prompt in ready]
    greedy: dict[str, Group] = {}
    sampled: dict[str, Group] = {}
    if ready:
        groups = engine.greedy(
            samples,
            max_completion_length=asking.max_completion_length,
            batch_size=config.batch_size,
            prompts=prompts,
        )
        greedy = {group.sample.id: group for group in groups}
        assert greedy.keys() == {sample.id for sample in samples}, "one answer per question, and ids are unique"
    if ready and config.num_samples:
        rollout = RolloutConfig(
            num_generations=config.num_samples,
            max_completion_length=asking.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            max_batch=max(1, config.batch_size // config.num_samples),
        )
        drawn = engine.rollout(samples, rollout, seed=config.seed, stream="eval", step=0, prompts=prompts)
        sampled = {group.sample.id: group for group in drawn}
    return [
        _unscored(question.sample, asking, question.reason)
        if question.prompt is None
        else replace(
            _scored(question, greedy[question.sample.id], sampled.get(question.sample.id), asking),
            **_reasoning(engine, question.sample, greedy[question.sample.id], asking.template),
        )
        for question in batch
    ]


def image_hash(images: Iterable[Image]) -> str | None:
    """16 hexadecimal digits of the SHA-256 of sizes and RGB pixels in order; None without images."""
    digest, pixels = hashlib.sha256(), b""
    for image in images:
        pixels = (image if image.mode == "RGB" else image.convert("RGB")).tobytes()
        digest.update(f"{image.size}".encode() + pixels)
    return digest.hexdigest()[:16] if pixels else None


def why(sample: Sample, completion: Completion, parsed: ParsedAnswer, template: Template) -> str:
    """In words, why :func:`medvqa_rl.core.answers.is_correct` says what it says."""
    if parsed.answer is None:
        if completion.is_truncated:
            return "no answer: the token limit came first"
        if template == "direct":
            return "no answer: the output is empty"
        count = completion.text.count("<answer>")
        return f"no answer: {count} answer sections" if count != 1 else "no answer: its section is empty or unclosed"
    if sample.answer_type == "choice":
        letter = read_choice(parsed.answer, sample.options)
        if letter is None:
            return "the answer names none of the options"
        return f"the answer names {letter}, " + ("the gold" if letter == sample.answer else f"not {sample.answer}")
    given, gold = normalise(parsed.answer), normalise(sample.answer)
    is_equal = is_correct(sample, parsed.answer)
    return f"normalised, {given!r} " + ("is the gold answer" if is_equal else f"is not {gold!r}")


def _scored(question: Prepared, group: Group, sampled: Group | None, asking: Asking) -> EvalRecord:
    """The record of an answered question; groups and cluster are the sample's, the rest is as it was shown."""
    sample, shown = question.sample, question.shown
    completion = group.completions[0]
    parsed = parse_completion(completion.text, asking.template)
    is_open = shown.answer_type == "open"
    return EvalRecord(
        sample_id=sample.id,
        image_key=sample.image_key,
        question=shown.question,
        options=shown.options,
        gold=shown.answer,
        output=completion.text,
        think=parsed.think,
        answer=parsed.answer,
        is_correct=is_correct(shown, parsed.answer),
        is_well_formed=parsed.is_well_formed,
        has_answer=parsed.answer is not None,
        is_truncated=completion.is_truncated,
        num_tokens=len(completion.token_ids),
        token_f1=token_f1(parsed.answer, shown.answer) if is_open else None,
        answer_type=shown.answer_type,
        groups=dict(sample.groups),
        exact_match=exact_match(parsed.answer, shown.answer) if is_open else None,
        rouge_l=rouge_l(parsed.answer, shown.answer) if is_open else None,
        choice=_letter(shown, parsed.answer),
        why=why(shown, completion, parsed, asking.template),
        dataset=asking.dataset,
        template=asking.template,
        prompt_hash=hashlib.sha256(group.prompt.text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        image_hash=question.image_hash,
        description=shown.description,
        sampled=() if sampled is None else tuple(_sampled(shown, c, asking.template) for c in sampled.completions),
    )


def _reasoning(engine: Engine, sample: Sample, group: Group, template: Template) -> dict[str, Any]:
    """Tokens of the reasoning and, where the scene is known, its claims."""
    think = parse_completion(group.completions[0].text, template).think
    measured: dict[str, Any] = {"think_tokens": 0 if think is None else engine.processor.count_tokens(think)}
    scenes = [image.scene for image in sample.images if isinstance(image, PhantomImage)]
    if len(scenes) == 1:
        measured["num_claims"] = len(claims(think or ""))
        measured["faithfulness"] = faithfulness(think or "", scenes[0])
    return measured


def _letter(sample: Sample, answer: str | None) -> str | None:
    return read_choice(answer, sample.options) if answer is not None and sample.answer_type == "choice" else None


def _sampled(sample: Sample, completion: Completion, template: Template) -> SampledAnswer:
    answer = parse_completion(completion.text, template).answer
    vote = _letter(sample, answer)
    if answer is not None and sample.answer_type != "choice":
        vote = normalise(answer) or answer.strip()
    return SampledAnswer(
        output=completion.text,
        answer=answer,
        vote=vote,
        is_correct=is_correct(sample, answer),
        num_tokens=len(completion.token_ids),
        is_truncated=completion.is_truncated,
    )


def _unscored(sample: Sample, asking: Asking, reason: str) -> EvalRecord:
    return EvalRecord(
        sample_id=sample.id,
        image_key=sample.image_key,
        question=sample.question,
        options=sample.options,
        gold=sample.answer,
        output="",
        think=None,
        answer=None,
        is_correct=None,
        is_well_formed=False,
        has_answer=False,
        is_truncated=False,
        num_tokens=0,
        token_f1=None,
        answer_type=sample.answer_type,
        groups=dict(sample.groups),
        unscored_reason=reason,
        why="unscored: the image could not be used",
        dataset=asking.dataset,
        template=asking.template,
        description=sample.description,
    )
