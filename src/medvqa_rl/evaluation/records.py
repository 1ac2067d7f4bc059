"""What an evaluation stores, one record per question: the lines of ``samples.jsonl``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from medvqa_rl.core.files import write_text
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.core.types import LETTERS, AnswerType, Template


@dataclass(frozen=True)
class SampledAnswer:
    """One of the k sampled answers to a question."""

    output: str
    answer: str | None
    vote: str | None
    """What it counts as in a majority vote: an option's letter, or the normalised answer; None has no vote."""
    is_correct: bool
    num_tokens: int
    is_truncated: bool


@dataclass(frozen=True)
class EvalRecord:
    """One question with the model's greedy answer: a line of ``samples.jsonl``."""

    sample_id: str
    image_key: str
    """The cluster: questions about the same images share it."""
    question: str
    options: tuple[str, ...]
    gold: str
    """The gold answer: an option's letter for choice questions, text otherwise."""
    output: str
    """The completion as decoded; empty where unscored."""
    think: str | None
    answer: str | None
    """The answer as parsed; None is no answer."""
    is_correct: bool | None
    """The score. None is unscored: our failure, left out of every rate."""
    is_well_formed: bool
    has_answer: bool
    is_truncated: bool
    """The token limit came before the end."""
    num_tokens: int
    token_f1: float | None
    """Token F1 of open questions; None for others and where unscored."""
    answer_type: AnswerType
    """As the data set annotates it."""
    groups: Mapping[str, str] = field(default_factory=dict)
    unscored_reason: str | None = None
    exact_match: float | None = None
    """Exact match of open questions; None for others and where unscored."""
    rouge_l: float | None = None
    """ROUGE-L of open questions; None for others and where unscored."""
    choice: str | None = None
    """Choice questions: the letter of the option that the answer names; None where it names none."""
    why: str = ""
    """Why the score is what it is, in words."""
    dataset: str = ""
    template: Template = "think_answer"
    prompt_hash: str | None = None
    """First 16 hexadecimal digits of the SHA-256 of the prompt as the model got it; None where it got none."""
    image_hash: str | None = None
    """The same of the decoded pixels of the images that were shown; None without images."""
    sampled: tuple[SampledAnswer, ...] = ()
    """The k sampled answers, where there are any, besides the greedy one."""
    think_tokens: int | None = None
    """Tokens of the reasoning as the policy's tokenizer encodes it, 0 where it is not closed; None: not counted."""
    num_claims: int | None = None
    """Phantom world: checkable claims of the reasoning; None for other data."""
    faithfulness: float | None = None
    """Phantom world: share of the claims that are true of the scene; None without claims."""
    nll: float | None = None
    """Negative log-likelihood in nats of the output without its tags under ``perplexity_by``."""
    nll_tokens: int | None = None
    """Tokens that this was summed over."""
    perplexity_by: str | None = None
    """The language model that was asked; None: perplexity was not measured."""
    similarity: float | None = None
    """Cosine between reasoning with answer and the reference answer."""
    similarity_by: str | None = None
    """What compared them: ``tfidf`` or an embedding model; None: similarity was not measured."""
    verdict: float | None = None
    """1 where a judge finds the reasoning coherent, else 0; None where it failed or was not asked."""
    verdict_by: str | None = None
    """The judge that was asked."""
    description: str = ""
    """What the data set says of the image in words, for judges that grade; empty where it says nothing."""

    @property
    def is_scored(self) -> bool:
        return self.is_correct is not None

    @property
    def gold_text(self) -> str:
        """The gold answer as text: the option's text for choice questions."""
        is_letter = self.answer_type == "choice" and bool(self.options)
        return self.options[LETTERS.index(self.gold)] if is_letter else self.gold

    @property
    def reference(self) -> str:
        """The gold answer as people and graders are shown it: for choice questions with its letter before it."""
        is_letter = self.answer_type == "choice" and bool(self.options)
        return f"{self.gold}: {self.gold_text}" if is_letter else self.gold

    @property
    def answer_kind(self) -> str:
        """``yes/no`` where the gold answer says either, else ``other``, whatever the data set's annotation."""
        return "yes/no" if is_yes_no(self.gold_text) else "other"


REQUIRED = frozenset(
    item.name for item in fields(EvalRecord) if item.default is MISSING and item.default_factory is MISSING
)


def record_line(record: EvalRecord) -> str:
    """A record as one line of JSON in ASCII, so that no character of an output can break the line or the file."""
    return json.dumps(asdict(record)) + "\n"


def write_records(records: Iterable[EvalRecord], path: Path) -> None:
    """Write one line per record, all of them or none."""
    write_text(path, "".join(map(record_line, records)))


def parse_record(line: str, where: str) -> EvalRecord:
    """Read one line. Fields that an older version did not write get their defaults.

    Raises:
        ValueError: the line is no evaluation record; ``where`` names it in the message.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}): evaluate again.") from error
    names = {item.name for item in fields(EvalRecord)}
    if not isinstance(row, dict) or not REQUIRED <= row.keys() <= names:
        raise ValueError(f"{where} is not an evaluation record of this version: evaluate again.")
    try:
        sampled = tuple(SampledAnswer(**answer) for answer in row.get("sampled", ()))
        return EvalRecord(**{**row, "options": tuple(row["options"]), "sampled": sampled})
    except TypeError as error:
        raise ValueError(f"{where} is not an evaluation record of this version ({error}): evaluate again.") from error


def read_records(path: Path) -> list[EvalRecord]:
    """Read a ``samples.jsonl``.

    Raises:
        ValueError: the file is missing or a line of it is no evaluation record.
    """
    if not path.is_file():
        raise ValueError(
            f"There are no evaluation records at {path}: name a samples.jsonl that `medvqa-rl eval` wrote."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse_record(line, f"Line {number} of {path}") for number, line in enumerate(lines, start=1)]
