"""Score an answer: from a question and its completions to a record. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from medvqa_rl.config import EvalConfig, PrefetchConfig
from medvqa_rl.core.answers import (
    ParsedAnswer,
    answer_span,
    compared,
    is_correct,
    parse_completion,
    read_choice,
    token_f1,
)
from medvqa_rl.core.text import shown
from medvqa_rl.core.types import DEFAULT_WORDING, Completion, EncodedPrompt, Group, Sample, Template, Wording
from medvqa_rl.data.phantom.claims import claims, distinct_truths, faithfulness
from medvqa_rl.data.phantom.drawing import PhantomImage
from medvqa_rl.evaluation.measures.confidence import answer_probability
from medvqa_rl.evaluation.measures.metrics import exact_match, rouge_l
from medvqa_rl.evaluation.records import EvalRecord, SampledAnswer

if TYPE_CHECKING:
    from medvqa_rl.models.processor import Processor


@dataclass(frozen=True)
class AnswerSettings:
    """Settings of one pass over a data set."""

    config: EvalConfig
    max_completion_length: int
    template: Template = "think_answer"
    dataset: str = ""
    """Name of the data set, for the records."""
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    """How prompts are prepared ahead; no answer depends on it."""


class Question(NamedTuple):
    """A question with its encoded prompt, or with the reason why there is none."""

    sample: Sample
    """As it is in the data set."""
    shown: Sample
    """As the model is shown it."""
    prompt: EncodedPrompt | None
    image_hash: str | None
    reason: str | None
    """Why the prompt is None."""


def make_record(
    question: Question,
    group: Group | None,
    sampled: Sequence[Completion],
    settings: AnswerSettings,
    processor: Processor,
) -> EvalRecord:
    """Score one question. Groups and image key are the data set's, everything else is of the question as shown.

    Args:
        group: holds the greedy completion; None makes the record unscored.
        sampled: further completions.
        processor: of the policy, which counts and decodes tokens.
    """
    sample, shown, template = question.sample, question.shown, settings.template
    record = EvalRecord(
        sample_id=sample.id,
        image_key=sample.image_key,
        question=shown.question,
        options=shown.options,
        gold=shown.answer,
        alternatives=shown.alternatives,
        answers_as=shown.answers_as,
        output="",
        think=None,
        answer=None,
        is_correct=None,
        is_well_formed=False,
        has_answer=False,
        is_truncated=False,
        num_tokens=0,
        token_f1=None,
        answer_type=shown.answer_type,
        groups=dict(sample.groups),
        unscored_reason=question.reason,
        why="unscored: the image could not be used",
        dataset=settings.dataset,
        template=template,
        description=shown.description,
    )
    if group is None:
        return record
    completion = group.completions[0]
    wording = group.wording
    parsed = parse_completion(completion.text, template, wording)
    think = parsed.think or ""
    is_open = shown.answer_type == "open"
    answer = None if parsed.answer is None else compared(parsed.answer, shown.answers_as)
    golds = [compared(gold, shown.answers_as) for gold in shown.answers]
    scenes = [image.scene for image in sample.images if isinstance(image, PhantomImage)]
    scene = scenes[0] if len(scenes) == 1 else None
    return replace(
        record,
        output=completion.text,
        think=parsed.think,
        answer=parsed.answer,
        is_correct=is_correct(shown, parsed.answer),
        is_well_formed=parsed.is_well_formed,
        has_answer=parsed.answer is not None,
        is_truncated=completion.is_truncated,
        num_tokens=len(completion.token_ids),
        token_f1=token_f1(answer, *golds) if is_open else None,
        exact_match=exact_match(answer, *golds) if is_open else None,
        rouge_l=rouge_l(answer, *golds) if is_open else None,
        choice=_letter(shown, parsed.answer),
        why=explain_score(shown, completion, parsed, template, wording),
        prompt_hash=hashlib.sha256(group.prompt.text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        image_hash=question.image_hash,
        sampled=tuple(_sampled_answer(shown, completion, template, wording) for completion in sampled),
        tags=() if wording.tags == DEFAULT_WORDING.tags else wording.tags,
        think_tokens=0 if parsed.think is None else processor.count_tokens(think),
        answer_probability=_probability(group, processor),
        num_claims=None if scene is None else len(claims(think)),
        faithfulness=None if scene is None else faithfulness(think, scene),
        distinct_truths=None if scene is None else distinct_truths(think, scene),
    )


def _probability(group: Group, processor: Processor) -> float | None:
    """The probability of the greedy answer of a group."""
    completion = group.completions[0]
    span = answer_span(completion.text, group.template, group.wording)
    if span is None or completion.logps is None:
        return None
    opened = len(group.prompt.opening)  # by the prompt, so it has no tokens
    return answer_probability(
        completion.token_ids, completion.logps, (span[0] - opened, span[1] - opened), processor.decode
    )


def explain_score(
    sample: Sample, completion: Completion, parsed: ParsedAnswer, template: Template, wording: Wording
) -> str:
    """Explain in words the result of :func:`medvqa_rl.core.answers.is_correct`."""
    if parsed.answer is None:
        if completion.is_truncated:
            return "no answer: the token limit came first"
        if template == "direct":
            return "no answer: the output is empty"
        count = completion.text.count(wording.answer[0])
        return f"no answer: {count} answer sections" if count != 1 else "no answer: its section is empty or unclosed"
    if sample.answer_type == "choice":
        letter = read_choice(parsed.answer, sample.options)
        if letter is None:
            return "the answer names none of the options"
        golds = " or ".join(sample.answers)
        return f"the answer names {letter}, " + ("the gold" if letter in sample.answers else f"not {golds}")
    given = compared(parsed.answer, sample.answers_as)
    golds = " or ".join(repr(compared(gold, sample.answers_as)) for gold in sample.answers)
    is_equal = is_correct(sample, parsed.answer)
    return f"normalised, {shown(given)} " + ("is the gold answer" if is_equal else f"is not {golds}")


def _letter(sample: Sample, answer: str | None) -> str | None:
    """The option that an answer to a choice question names."""
    return read_choice(answer, sample.options) if answer is not None and sample.answer_type == "choice" else None


def _sampled_answer(sample: Sample, completion: Completion, template: Template, wording: Wording) -> SampledAnswer:
    """Score one sampled completion."""
    answer = parse_completion(completion.text, template, wording).answer
    is_right = is_correct(sample, answer)
    vote = _letter(sample, answer)
    if is_right and sample.alternatives:
        vote = sample.answer  # correct answers vote together
    if answer is not None and vote is None and sample.answer_type != "choice":
        vote = compared(answer, sample.answers_as) or answer.strip()
    return SampledAnswer(
        output=completion.text,
        answer=answer,
        vote=vote,
        is_correct=is_right,
        num_tokens=len(completion.token_ids),
        is_truncated=completion.is_truncated,
    )
