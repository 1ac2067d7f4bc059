"""What judges are asked: one fixed prompt per family of models. Imports no torch.

A change of a character here changes ``prompt_hash``, and with it every cache and every result's identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from medvqa_rl.core.text import neutralise
from medvqa_rl.core.types import LETTERS
from medvqa_rl.rewards.judges.protocol import JudgeRequest

ROLE = (
    "You review the reasoning behind an answer to a question about a medical image. You cannot see the image. "
    "Reasoning is clinically coherent when its findings fit the kind of image and the organ, when nothing in it "
    "contradicts anything else, when the conclusion follows from what is stated, and when nothing is said twice to "
    "fill space."
)
ASK = "Is this reasoning clinically coherent? Answer with Yes or No only."
ASK_PLAIN = "Is this reasoning clinically coherent, Yes or No?"

PROBES = (
    JudgeRequest("Which organ is shown?", ("lung", "brain"), "The image shows a lung."),
    JudgeRequest("Is there a mass?", (), "No mass is seen. The answer is no."),
)
"""Requests that show what a prompt is: their rendering is what ``prompt_hash`` is the hash of."""


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt and how its two answers are written behind it."""

    name: str
    render: Callable[[JudgeRequest], str]
    """The text before the answer."""
    yes: str = " Yes"
    no: str = " No"
    adds_special_tokens: bool = True
    """Whether the tokenizer puts its own tokens before the text; a chat template has them already."""
    wrap: Callable[[str], str] | None = None
    """How any message is put to the model; None for models that continue text and follow no instruction."""

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of what is asked."""
        shown = [self.name, self.yes, self.no, *map(self.render, PROBES)]
        return hashlib.sha256("\0".join(shown).encode()).hexdigest()[:16]


def describe_case(request: JudgeRequest) -> str:
    """Question, options and reasoning, with tags and special-token strings made harmless."""
    lines = [f"Question: {neutralise(request.question.strip())[0]}"]
    if request.options:
        options = [f"{letter}: {neutralise(text.strip())[0]}" for letter, text in zip(LETTERS, request.options)]
        lines.append(f"Options: {'; '.join(options)}")
    lines.append(f"Reasoning: {neutralise(request.reasoning.strip())[0]}")
    return "\n".join(lines)


def chat_text(request: JudgeRequest) -> str:
    """The one message that chat models and endpoints get."""
    return f"{ROLE}\n\n{describe_case(request)}\n\n{ASK}"


BIOGPT = JudgePrompt("biogpt", lambda request: f"{ROLE}\n{describe_case(request)}\n{ASK_PLAIN}\nAnswer:")
"""For models that continue text, as BioGPT does: the answer stands behind "Answer:"."""

BIOMISTRAL = JudgePrompt(
    "biomistral", lambda request: f"[INST] {chat_text(request)} [/INST]", wrap=lambda text: f"[INST] {text} [/INST]"
)
"""Mistral's instruction format, which BioMistral took over."""

PHANTOM = JudgePrompt("phantom", lambda request: neutralise(request.reasoning.strip())[0])
"""The embedded judges read the reasoning alone, and their next token is the verdict."""


def chat_prompt(apply_template: Callable[[str], str]) -> JudgePrompt:
    """The prompt of a chat model.

    Args:
        apply_template: turns the user's message into the text up to where the assistant speaks.
    """
    return JudgePrompt("chat", lambda request: apply_template(chat_text(request)), "Yes", "No", False, apply_template)


def defuse(text: str, special: Iterable[str]) -> str:
    """The text with a space put into every string that a tokenizer would read as one of its special tokens, so that
    reasoning cannot end its own prompt."""
    for token in special:
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def defused(request: JudgeRequest, special: Iterable[str]) -> JudgeRequest:
    """A request none of whose texts holds a special token (:func:`defuse`)."""
    names = tuple(special)
    return JudgeRequest(
        defuse(request.question, names),
        tuple(defuse(option, names) for option in request.options),
        defuse(request.reasoning, names),
    )
