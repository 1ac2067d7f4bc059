"""How each family of models is prompted. Imports no torch.

Changing a character here changes ``prompt_hash``, which invalidates cached grades and changes the identity of every
result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from medvqa_rl.core.text import neutralise
from medvqa_rl.rewards.judges.protocol import JudgeRequest
from medvqa_rl.rewards.judges.rubric import COHERENCE, Rubric


@dataclass(frozen=True)
class JudgePrompt:
    """The prompt of a family of models for Yes or No, and how it is given any other instruction."""

    name: str
    text: Callable[[JudgeRequest, Rubric], str]
    """The text before Yes or No, for a rubric with these two levels."""
    yes: str = " Yes"
    no: str = " No"
    adds_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens before the text; a chat template already contains them."""
    wrap: Callable[[str, int], str] | None = None
    """Puts a message, and a number of images before it, into the model's instruction format; None for models that
    only continue text."""
    marks: tuple[str, ...] = ()
    """Strings that end a turn without being special tokens."""

    def render(self, request: JudgeRequest, rubric: Rubric = COHERENCE) -> str:
        """The text before Yes or No."""
        return self.text(request, rubric)

    def hash_for(self, rubric: Rubric) -> str:
        """16 hexadecimal digits of the prompt and its two answers."""
        shown = [self.name, self.yes, self.no, *(self.render(probe, rubric) for probe in rubric.probes)]
        return hashlib.sha256("\0".join(shown).encode()).hexdigest()[:16]

    @property
    def hash(self) -> str:
        """:meth:`hash_for` coherence judged by text."""
        return self.hash_for(COHERENCE)


def instruction_prompt(
    name: str,
    wrap: Callable[[str, int], str],
    *,
    yes: str = " Yes",
    no: str = " No",
    adds_special_tokens: bool = True,
    marks: tuple[str, ...] = (),
) -> JudgePrompt:
    """The prompt of a model that follows instructions.

    Args:
        wrap: puts the user's message, behind a number of images, into the model's format, up to where the assistant
            speaks.
    """

    def text(request: JudgeRequest, rubric: Rubric) -> str:
        return wrap(rubric.render(request), len(rubric.images(request)))

    return JudgePrompt(name, text, yes, no, adds_special_tokens, wrap, marks)


ENDPOINT = instruction_prompt("endpoint", lambda text, images: text, yes="Yes", no="No", adds_special_tokens=False)

BIOGPT = JudgePrompt(
    "biogpt", lambda request, rubric: f"{rubric.task}\n{rubric.describe(request)}\n{rubric.asks}, Yes or No?\nAnswer:"
)
"""For models that only continue text, as BioGPT does: the answer follows "Answer:"."""

BIOMISTRAL = instruction_prompt(
    "biomistral", lambda text, images: f"[INST] {text} [/INST]", marks=("[INST]", "[/INST]")
)
"""Mistral's instruction format, which BioMistral uses too."""

PHANTOM = JudgePrompt("phantom", lambda request, rubric: neutralise(request.reasoning.strip())[0])
"""The embedded judges of text only read the reasoning; their next token is the verdict."""


def chat_prompt(apply_template: Callable[[str, int], str]) -> JudgePrompt:
    """The prompt of a model with a chat template."""
    return instruction_prompt("chat", apply_template, yes="Yes", no="No", adds_special_tokens=False)


def defuse(text: str, special: Iterable[str]) -> str:
    """Insert a space into every string that a tokenizer would read as a special token, so that no text can end its own
    prompt."""
    for token in special:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def defused(request: JudgeRequest, special: Iterable[str]) -> JudgeRequest:
    """The request with :func:`defuse` applied to each of its texts."""
    names = tuple(special)
    texts: dict[str, Any] = {
        name: defuse(text, names) for name, text in vars(request).items() if isinstance(text, str)
    }
    return replace(request, options=tuple(defuse(option, names) for option in request.options), **texts)
