"""The vocabulary of the package: samples, prompts, completions, groups and scores. Imports no torch.

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
"""Names of the prompts' forms; :mod:`medvqa_rl.core.prompts` has their texts and sections."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ImageSource(Protocol):
    """An image that is decoded only when asked for."""

    @property
    def key(self) -> str:
        """Names the image: equal keys are the same image (the cluster of the bootstrap, the key of caches)."""
        ...

    def load(self) -> Image:
        """Decode to RGB.

        Raises:
            ValueError: the file is missing, unreadable or not an image; the message names it.
        """
        ...

    def header_pixels(self) -> int | None:
        """Width times height where that is known without decoding the image, else None."""
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
    """A reference reasoning for supervised fine-tuning; empty where the data set has none."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """What results are broken down by, such as modality, organ and family."""
    description: str = ""
    """What is known of the image in words, such as a report: graders of reasoning are shown it, and supervised
    fine-tuning teaches it where the prompt asks for a description. No prompt has it."""

    @property
    def image_key(self) -> str:
        """The cluster of this question: all questions about the same images share it."""
        return "+".join(image.key for image in self.images) or self.id

    @property
    def answer_text(self) -> str:
        """The gold answer as text: the option's text for choice questions."""
        return self.options[LETTERS.index(self.answer)] if self.answer_type == "choice" else self.answer


class Dataset(Protocol):
    """Samples of one split. Indexing draws or reads the sample; images are decoded later."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """A hash of what the samples are (ids, questions, answers or the recipe that draws them)."""
        ...

    @property
    def notes(self) -> Mapping[str, int]:
        """What loading dropped, repaired or neutralised: a reason and its count."""
        ...

    @property
    def is_endless(self) -> bool:
        """True where samples are drawn on demand and an epoch would never end."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it, image placeholders expanded."""

    input_ids: NDArray[np.int64]
    """(T,) token ids."""
    pixel_values: NDArray[np.float32] | None
    """(patches of all images, channels * temporal * patch * patch), or None for text only."""
    image_grid_thw: NDArray[np.int64] | None
    """(images, 3) patches in time, height and width."""
    text: str
    """The prompt as rendered, with one placeholder per image."""
    neutralised: int = 0
    """Special-token strings of the data set that were made harmless."""
    template: Template = "think_answer"
    """The form that it asks for."""

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.input_ids.nbytes + (0 if self.pixel_values is None else self.pixel_values.nbytes)


@dataclass(frozen=True)
class Completion:
    """One sampled answer to a prompt."""

    token_ids: tuple[int, ...]
    """The sampled tokens, the end-of-sequence token included when it was reached."""
    text: str
    """The tokens decoded without special tokens."""
    is_truncated: bool
    """True when the token limit came before the end-of-sequence token."""
    logps: tuple[float, ...] | None = None
    """Log-probability of each token where it was sampled, NaN where unknown; None where training's own engine did."""


@dataclass
class Group:
    """The completions of one prompt; never split over ranks or micro-batches."""

    sample: Sample
    prompt: EncodedPrompt
    completions: Sequence[Completion]
    image_features: torch.Tensor | None = None
    """(image tokens, hidden) features kept from the rollout where the vision tower is frozen, else None."""

    @property
    def template(self) -> Template:
        """The form in which completions are read: the one that the prompt asks for."""
        return self.prompt.template


@dataclass(frozen=True)
class Scores:
    """Rewards of P groups of G completions. NaN is unscored: our failure, not the model's."""

    total: NDArray[np.float64]
    """(P, G) weighted sum of the parts; NaN where any enabled part is NaN."""
    parts: Mapping[str, NDArray[np.float64]]
    """(P, G) each part before its weight."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Scalars that reward functions logged through ``log_metric``."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """(P * G) values per completion, prompt by prompt, that reward functions logged through ``log_extra``."""
