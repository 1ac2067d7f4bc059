"""Records of an evaluation, one per question: the lines of ``samples.jsonl``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from medvqa_rl.core.answers import without_tags
from medvqa_rl.core.files import parse_json, write_text
from medvqa_rl.core.prompts import ALL_TAGS
from medvqa_rl.core.text import is_yes_no, shown
from medvqa_rl.core.types import LETTERS, AnswersAs, AnswerType, Template, reference_text

Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class SampledAnswer:
    """One of the k sampled answers to a question."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    output: str
    answer: str | None
    vote: str | None
    """Its vote in a majority vote: an option's letter, or the normalised answer; None abstains."""
    is_correct: bool
    num_tokens: Count
    is_truncated: bool


@dataclass(frozen=True)
class EvalRecord:
    """One question with the model's greedy answer: a line of ``samples.jsonl``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sample_id: str
    image_key: str
    """The cluster: shared by questions about the same images."""
    question: str
    options: tuple[str, ...]
    gold: str
    """The gold answer: an option's letter for choice questions, text otherwise."""
    output: str
    """The completion as decoded; empty where unscored."""
    think: str | None
    answer: str | None
    """The parsed answer; None means no answer."""
    is_correct: bool | None
    """The score. None means unscored: our failure, excluded from every rate."""
    is_well_formed: bool
    has_answer: bool
    is_truncated: bool
    """The token limit was reached before the end-of-sequence token."""
    num_tokens: Count
    token_f1: Share | None
    """Open questions only; None for others and if unscored."""
    answer_type: AnswerType
    """As the data set annotates it."""
    groups: Mapping[str, str] = field(default_factory=dict)
    unscored_reason: str | None = None
    exact_match: Share | None = None
    """As ``token_f1``."""
    rouge_l: Share | None = None
    """As ``token_f1``."""
    choice: str | None = None
    """Choice questions only: the letter of the option that the answer names; None if it names none."""
    why: str = ""
    """Explains the score in words."""
    dataset: str = ""
    template: Template = "think_answer"
    prompt_hash: str | None = None
    """First 16 hexadecimal digits of the SHA-256 of the rendered prompt; None if unscored."""
    image_hash: str | None = None
    """The same for the decoded pixels of the images shown; None without images."""
    sampled: tuple[SampledAnswer, ...] = ()
    """The k sampled answers, if any, besides the greedy one."""
    think_tokens: Count | None = None
    """Tokens of the reasoning under the policy's tokenizer, 0 if the section is unclosed; None if not counted."""
    answer_probability: Share | None = None
    """Probability of the answer under the model, given the prompt and the reasoning; None without an answer, or where
    another engine answered."""
    num_claims: Count | None = None
    """Number of checkable claims in the reasoning; PhantomVQA only."""
    faithfulness: Share | None = None
    """Share of these claims that are true of the scene; None without claims."""
    distinct_truths: Count | None = None
    """Number of different claims that are true of the scene; PhantomVQA only."""
    nll: float | None = None
    """Negative log-likelihood in nats of the output, tags removed, under ``perplexity_by``."""
    nll_tokens: Count | None = None
    """Number of tokens that ``nll`` sums over."""
    perplexity_by: str | None = None
    """The language model; None if perplexity was not measured."""
    similarity: float | None = None
    """Cosine similarity between reasoning plus answer and the reference answer."""
    similarity_by: str | None = None
    """``tfidf`` or the embedding model; None if similarity was not measured."""
    verdict: float | None = None
    """1 if the judge finds the reasoning coherent, else 0; None if it failed or was not used."""
    verdict_by: str | None = None
    """The judge."""
    description: str = ""
    """The data set's description of the image, for judges that grade; may be empty."""
    alternatives: tuple[str, ...] = ()
    """Further answers that are as correct as ``gold``."""
    answers_as: AnswersAs = "text"
    """How answers were compared, ``data.answers_as``."""
    tags: tuple[str, ...] = ()
    """The tags of the prompt, if they are the user's own."""

    @property
    def is_scored(self) -> bool:
        return self.is_correct is not None

    @property
    def references(self) -> tuple[str, ...]:
        """Every correct answer as text, the gold answer first."""
        golds = (self.gold, *self.alternatives)
        is_letter = self.answer_type == "choice" and bool(self.options)
        return tuple(self.options[LETTERS.index(gold)] for gold in golds) if is_letter else golds

    @property
    def gold_text(self) -> str:
        """The gold answer as text: the option's text for choice questions."""
        return self.references[0]

    @property
    def reference(self) -> str:
        """The gold answer as shown to people and graders (:func:`medvqa_rl.core.types.reference_text`)."""
        return reference_text((self.gold, *self.alternatives), self.options if self.answer_type == "choice" else ())

    @property
    def text(self) -> str:
        """The output without its tags."""
        return without_tags(self.output, self.tags or ALL_TAGS)

    @property
    def answer_kind(self) -> str:
        """``yes/no`` if the gold answer is either, else ``other``; independent of the data set's annotation."""
        return "yes/no" if is_yes_no(self.gold_text) else "other"


_SCHEMA = TypeAdapter(EvalRecord)


def record_line(record: EvalRecord) -> str:
    """Format a record as one line of ASCII JSON, so that no character of an output can break the file."""
    return _without_halves(json.dumps(asdict(record))) + "\n"


def _without_halves(line: str) -> str:
    """A line of JSON with a question mark for half a character (a lone surrogate), which older versions wrote."""
    if "\\ud" not in line:
        return line
    try:
        return json.dumps(json.loads(json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace")))
    except (ValueError, RecursionError):  # the parser says what is wrong
        return line


def write_records(records: Iterable[EvalRecord], path: Path) -> None:
    """Write one line per record, all of them or none."""
    write_text(path, "".join(map(record_line, records)))


def parse_record(line: str | bytes, where: str) -> EvalRecord:
    """Parse one line. Fields that an older version did not write get their defaults.

    Raises:
        ValueError: the line is not an evaluation record; the message begins with ``where`` and names the field.
    """
    text = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else line
    record = parse_json(
        _SCHEMA, _without_halves(text).encode("utf-8", "surrogateescape"), where, "evaluate again, or restore the file"
    )
    letters = LETTERS[: len(record.options)]
    for gold in (record.gold, *record.alternatives) if record.answer_type == "choice" and letters else ():
        if len(gold) != 1 or gold not in letters:
            raise ValueError(
                f"{where} has the gold answer {shown(gold)}, but its options are {', '.join(letters)}: evaluate "
                "again, or restore the file."
            )
    return record


def read_records(path: Path) -> list[EvalRecord]:
    """Read a ``samples.jsonl``.

    Raises:
        ValueError: the file is missing, a line is not an evaluation record, or two are of the same question.
    """
    if not path.is_file():
        raise ValueError(
            f"There are no evaluation records at {path}: name a samples.jsonl that `medvqa-rl eval` wrote."
        )
    records: dict[str, EvalRecord] = {}
    # Only a newline ends a line: texts contain the other characters that str.splitlines splits at.
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        if not line and number == 1:
            break
        record = parse_record(line, where := f"Line {number} of {path}")
        if records.setdefault(record.sample_id, record) is not record:
            raise ValueError(f"{where} has the sample_id {shown(record.sample_id)} a second time: evaluate again.")
    return list(records.values())
