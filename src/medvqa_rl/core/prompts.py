"""Prompt templates: what the model is asked, and the format of its answer. Imports no torch.

A template declares the sections of its format; :mod:`medvqa_rl.core.answers` parses them. A prompt is built from the
question, the options and the images only, never from the gold answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

from medvqa_rl.core.text import is_yes_no, neutralise, normalise
from medvqa_rl.core.types import DEFAULT_WORDING, LETTERS, Sample, Template, Wording

_THINK_ANSWER = "Think in <think></think>, then answer in <answer></answer>."
INSTRUCTIONS: dict[Template, str] = {
    "think_answer": _THINK_ANSWER,
    "direct": "Answer with the answer only.",
    "explain": f"{_THINK_ANSWER} Explain step by step what the image shows and why that gives the answer.",
    "short": "Answer in a few words in <answer></answer>, without explanation.",
    "open_ended": f"{_THINK_ANSWER} Use your own words, as few as possible.",
    "choice": f"{_THINK_ANSWER} Compare the options and name the letter of the right one.",
    "describe_think": f"Describe the image in <describe></describe>. {_THINK_ANSWER}",
}
"""The last line of each prompt. Every prompt for reasoning contains the words of think_answer, which the embedded
models were trained on. The names follow RARL (arXiv 2506.06600), whose prompt texts are not published."""
SECTIONS: dict[Template, tuple[str, ...]] = {
    "think_answer": ("think", "answer"),
    "direct": (),
    "explain": ("think", "answer"),
    "short": ("answer",),
    "open_ended": ("think", "answer"),
    "choice": ("think", "answer"),
    "describe_think": ("describe", "think", "answer"),
}
"""The format of each template: tagged sections in this order. Without sections, the whole text is the answer."""
CHOICE_HINT = "Answer with the letter."


def asks_reasoning(template: Template) -> bool:
    """Whether a template asks for reasoning."""
    return "think" in SECTIONS[template]


def read_templates(text: str) -> tuple[Template, ...]:
    """Parse comma-separated template names.

    Raises:
        ValueError: a name is unknown or repeated, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in INSTRUCTIONS:
            raise ValueError(f"There is no prompt template {name!r}: choose from {', '.join(INSTRUCTIONS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--prompts is {text!r}, but must name each template once, from {', '.join(INSTRUCTIONS)}.")
    return tuple(cast("list[Template]", names))


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""The tags of think_answer, which are tokens of the embedded models."""
ALL_TAGS = DEFAULT_WORDING.tags
"""The tags of all templates."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt before tokenization."""

    messages: list[dict[str, Any]]
    """Chat messages as Hugging Face processors take them: a system prompt if there is one of the user's, then one user
    turn, images first."""
    neutralised: int
    """Number of special-token strings replaced in the question and the options."""


_NEEDS_OPTIONS = re.compile(r"\b(following|of (these|those)|options?|choices?|listed|statements?|except|not)\b", re.I)
"""Words of a question that refer to its options: "which of the following", "which is not"."""
_NAMES_OPTIONS = re.compile(r"\b(above|below|both|either|neither|all|none|others?|these|those|and/or)\b", re.I)
"""Words of an option that refer to other options: "all of the above", "both A and B", "none of these"."""
_MAX_OPTION_WORDS = 5
"""Longer options are unlikely to be produced word for word without having been shown."""


def can_hide_options(sample: Sample) -> bool:
    """Whether a choice question can be asked without its options and answered with the text of the correct one.

    True if all options are short, distinct after :func:`normalise` and refer to no other option, and the question does
    not refer to them. Does not depend on which option is correct.
    """
    texts = [normalise(option) for option in sample.options]
    return (
        len(texts) > 1
        and all(texts)
        and len(set(texts)) == len(texts)
        and max(len(text.split()) for text in texts) <= _MAX_OPTION_WORDS
        and not any(_NAMES_OPTIONS.search(option) for option in sample.options)
        and not _NEEDS_OPTIONS.search(sample.question)
    )


def as_asked(sample: Sample, template: Template) -> Sample:
    """Return the sample as a template asks it.

    ``open_ended`` hides options if :func:`can_hide_options` allows it: the question becomes an open one (closed if the
    answer is yes or no) whose gold answer is the text of the correct option. The letter after that text in the
    reference reasoning ("cyst B") is removed, because it cannot be known without the options. Other samples are
    returned unchanged.
    """
    if template != "open_ended" or not can_hide_options(sample):
        return sample
    text = sample.answer_text
    is_closed = is_yes_no(text)
    return replace(
        sample,
        options=(),
        answer=text,
        alternatives=tuple(sample.options[LETTERS.index(letter)] for letter in sample.alternatives),
        answer_type="closed" if is_closed else "open",
        reasoning=re.sub(rf"\b({re.escape(text)}) {sample.answer}\b", r"\1", sample.reasoning),
    )


def fits(sample: Sample, template: Template) -> bool:
    """Whether a template suits a question: ``choice`` needs options, ``open_ended`` needs none or ones that can be
    hidden. Depends on the question and the options only."""
    if template == "choice":
        return bool(sample.options)
    return template != "open_ended" or not sample.options or can_hide_options(sample)


def _neutralise(text: str, wording: Wording, controls: Collection[str] = ()) -> tuple[str, int]:
    """Neutralise control strings (:func:`medvqa_rl.core.text.neutralise`), the user's own tags and special tokens of a
    tokenizer in a text."""
    text, count = neutralise(text)
    for tag in {*wording.tags, *controls}.difference(ALL_TAGS):
        text, replaced = re.subn(re.escape(tag), lambda match: _bracketed(match[0]), text, flags=re.IGNORECASE)
        count += replaced
    return text, count


def _bracketed(tag: str) -> str:
    """A tag between other brackets, so that it is none."""
    return f"[{tag[1:-1]}]" if tag.startswith("(") else f"({tag[1:-1]})"


def instruction_for(template: Template, wording: Wording = DEFAULT_WORDING) -> str:
    """The last line of a template's prompts, with the tags of the wording."""
    text = INSTRUCTIONS[template]
    for section in SECTIONS["describe_think"]:
        text = text.replace("".join(DEFAULT_WORDING.tag(section)), "".join(wording.tag(section)))
    return text


_OPTIONS_LINE = re.compile(r"^[ \t]*\{options\}[ \t]*\n?", re.M)


def render_prompt(
    sample: Sample,
    template: Template = "think_answer",
    wording: Wording = DEFAULT_WORDING,
    *,
    controls: Collection[str] = (),
) -> RenderedPrompt:
    """Render the prompt of a sample. Depends on the question, the options and the images only.

    A template that does not fit the question (:func:`fits`) uses the instruction of ``think_answer``: ``open_ended``
    shows options that cannot be hidden, and ``choice`` does not mention options if there are none. An instruction of
    the user's own is the whole text; a line with only ``{options}`` goes if there are none. ``controls`` are special
    tokens of the tokenizer that the data must not contain.
    """
    sample = as_asked(sample, template)
    question, count = _neutralise(sample.question.strip(), wording, controls)
    options = []
    for letter, option in zip(LETTERS, sample.options):
        text, replaced = _neutralise(option.strip(), wording, controls)
        count += replaced
        options.append(f"{letter}: {text}")
    if wording.instruction and template == wording.template:
        pattern = wording.instruction if options else _OPTIONS_LINE.sub("", wording.instruction)
        text = pattern.format(question=question, options="\n".join(options)).strip()
    else:
        lines = [question, *options, *([CHOICE_HINT] if options else [])]
        lines.append(instruction_for(template if fits(sample, template) else "think_answer", wording))
        text = "\n".join(lines)
    content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    content.append({"type": "text", "text": text})
    system: list[dict[str, Any]] = [{"role": "system", "content": wording.system}] if wording.system else []
    return RenderedPrompt([*system, {"role": "user", "content": content}], count)


def render_answer(
    think: str,
    answer: str,
    template: Template = "think_answer",
    wording: Wording = DEFAULT_WORDING,
    *,
    description: str = "",
) -> str:
    """Render a reference completion in the requested format, for supervised fine-tuning and the gold check. Sections
    without text are left out."""
    texts = {"describe": description, "think": think, "answer": answer}
    clean = {name: _neutralise(text.strip(), wording)[0] for name, text in texts.items()}
    if not SECTIONS[template]:
        return clean["answer"]
    return "".join(clean[name].join(wording.tag(name)) for name in SECTIONS[template] if clean[name])
