"""The data types of the package: samples, prompts, completions and groups. Imports no torch.

Legend for shapes everywhere: P prompts, G completions per prompt, B = P * G completions, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

AnswerType = Literal["choice", "closed", "open"]
"""choice: one of the options; closed: a short answer from a small set such as yes and no; open: free text."""

Template = Literal["think_answer", "direct", "explain", "short", "open_ended", "choice", "describe_think"]
"""Names of the prompt templates; :mod:`medvqa_rl.core.prompts` has their texts and sections."""

AnswersAs = Literal["text", "set"]
"""How answers that are no choice are compared: as a text, or as a set of parts in any order."""
Tag = tuple[str, str]
"""The opening and the closing tag of a section."""


@dataclass(frozen=True)
class Wording:
    """The user's own words and tags, declared once for prompts, parser, rewards and SFT targets."""

    system: str = ""
    """System prompt; empty leaves it to the chat template."""
    instruction: str = ""
    """User message with ``{question}`` and ``{options}``, in place of the text of ``template``; empty keeps that."""
    template: Template = "think_answer"
    """The template whose text the instruction replaces."""
    describe: Tag = ("<describe>", "</describe>")
    think: Tag = ("<think>", "</think>")
    answer: Tag = ("<answer>", "</answer>")

    def tag(self, section: str) -> Tag:
        """The tags of the section describe, think or answer."""
        return {"describe": self.describe, "think": self.think, "answer": self.answer}[section]

    @property
    def tags(self) -> tuple[str, ...]:
        return (*self.describe, *self.think, *self.answer)


DEFAULT_WORDING = Wording()

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ImageSource(Protocol):
    """An image that is decoded only when asked for."""

    @property
    def key(self) -> str:
        """Identifies the image: equal keys are the same image. The bootstrap clusters by it, caches use it."""
        ...

    def load(self) -> Image:
        """Decode to RGB.

        Raises:
            ValueError: the file is missing, unreadable or not an image; the message names it.
        """
        ...

    def header_pixels(self) -> int | None:
        """Return width times height if that is known without decoding the image, else None."""
        ...


@dataclass(frozen=True)
class Sample:
    """One question about one or more images, with its gold answer."""

    id: str
    """Stable and unique within its data set."""
    question: str
    answer: str
    """The gold answer: an option's letter for choice questions, text otherwise."""
    answer_type: AnswerType
    images: tuple[ImageSource, ...] = ()
    options: tuple[str, ...] = ()
    """Texts of the options in the order A, B, C ...; empty unless answer_type is choice."""
    reasoning: str = ""
    """Reference reasoning for supervised fine-tuning; empty if the data set has none."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Keys by which results are broken down, such as modality, organ and family."""
    description: str = ""
    """A description of the image, such as a report. Judges that grade reasoning see it, and SFT uses it as the target
    of prompts that ask for a description. It is never part of a prompt."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the data set's table, for the user's reward functions."""
    alternatives: tuple[str, ...] = ()
    """Further answers that are as correct as ``answer``, in the same form."""
    answers_as: AnswersAs = "text"
    """How answers are compared, ``data.answers_as``; choice questions are always compared by option."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Every correct answer, the gold answer first."""
        return (self.answer, *self.alternatives)

    @property
    def reference(self) -> str:
        """The gold answer as shown to people and judges (:func:`reference_text`)."""
        return reference_text(self.answers, self.options)

    @property
    def gold(self) -> str:
        """The gold answer in records of training: ``answer``, or the reference if there are several."""
        return self.reference if self.alternatives else self.answer

    @property
    def image_key(self) -> str:
        """The bootstrap cluster: all questions about the same images share it."""
        return "+".join(image.key for image in self.images) or self.id

    @property
    def answer_text(self) -> str:
        """The gold answer as text; for choice questions, the text of the option."""
        return self.options[LETTERS.index(self.answer)] if self.answer_type == "choice" else self.answer


def reference_text(answers: Sequence[str], options: Sequence[str] = ()) -> str:
    """The correct answers as shown to people and judges: ``B: text`` for options; further ones follow the first."""
    first, *others = [f"{answer}: {options[LETTERS.index(answer)]}" if options else answer for answer in answers]
    return f"{first}{ALSO_CORRECT}{'; '.join(others)})" if others else first


ALSO_CORRECT = " (also correct: "
"""Separates the first correct answer from the others in a :func:`reference_text`."""


class Dataset(Protocol):
    """The samples of one split. Indexing generates or reads a sample; images are decoded later."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Hash of the samples: of their ids, questions and answers, or of the recipe that generates them."""
        ...

    @property
    def notes(self) -> Mapping[str, int]:
        """What loading dropped, repaired or neutralised: reason -> count."""
        ...

    @property
    def is_endless(self) -> bool:
        """Whether samples are generated on demand, so that an epoch never ends."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt with image placeholders expanded."""

    input_ids: NDArray[np.int64]
    """(T,) token ids."""
    image_inputs: Mapping[str, NDArray[Any]]
    """The preprocessed images as arguments of the model's forward, such as pixel_values; empty without images."""
    text: str
    """The rendered prompt, with one placeholder per image."""
    neutralised: int = 0
    """Number of special-token strings in the data that were neutralised."""
    template: Template = "think_answer"
    """The format that it asks for."""
    wording: Wording = DEFAULT_WORDING
    """With these tags."""

    @property
    def opening(self) -> str:
        """The think tag and the white space after it, if the prompt ends with them: the chat templates of models that
        always reason open the section, and the completion continues inside it. Else empty."""
        tag = self.wording.think[0]
        return self.text[self.text.rindex(tag) :] if self.text.rstrip().endswith(tag) else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.input_ids.nbytes + sum(array.nbytes for array in self.image_inputs.values())


@dataclass(frozen=True)
class Completion:
    """One sampled answer to a prompt."""

    token_ids: tuple[int, ...]
    """The sampled tokens, including the end-of-sequence token if it was reached."""
    text: str
    """The decoded tokens, without special tokens, after the opening think tag if it is part of the prompt."""
    is_truncated: bool
    """Whether the token limit was reached before the end-of-sequence token."""
    logps: tuple[float, ...] | None = None
    """Log-probabilities of the tokens: at temperature 1 where they were decoded greedily; as reported where another
    engine (vLLM) sampled them, NaN where unknown; None where the own engine sampled."""


@dataclass
class Group:
    """The completions of one prompt; never split over ranks or micro-batches."""

    sample: Sample
    prompt: EncodedPrompt
    completions: Sequence[Completion]
    image_features: torch.Tensor | None = None
    """(image tokens, width) features cached from the rollout if the vision tower is frozen, else None."""

    @property
    def template(self) -> Template:
        """The format in which completions are parsed: the one that the prompt asks for."""
        return self.prompt.template

    @property
    def wording(self) -> Wording:
        """The tags with which completions are parsed."""
        return self.prompt.wording
