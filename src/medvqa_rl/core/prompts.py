"""What the model is asked and how its answer is read: the templates and the only answer parser.

A template declares the sections of its form; the one parser reads them for rewards, metrics, judges and reports, so
they cannot disagree. A prompt is built from the question, the options and the images alone, never from the gold.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from medvqa_rl.core.text import is_yes_no, neutralise, normalise
from medvqa_rl.core.types import LETTERS, Sample, Template

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
"""The last line of each prompt. Where reasoning is asked for, the words of think_answer are in it, which models of
this package know. The names of the kinds are those reported of RARL (arXiv 2506.06600); its texts are not known."""
SECTIONS: dict[Template, tuple[str, ...]] = {
    "think_answer": ("think", "answer"),
    "direct": (),
    "explain": ("think", "answer"),
    "short": ("answer",),
    "open_ended": ("think", "answer"),
    "choice": ("think", "answer"),
    "describe_think": ("describe", "think", "answer"),
}
"""The form of each: sections in tags, in this order. Without any, the whole text is the answer."""
CHOICE_HINT = "Answer with the letter."


def asks_reasoning(template: Template) -> bool:
    """Whether completions of a template have a section for reasoning."""
    return "think" in SECTIONS[template]


def read_templates(text: str) -> tuple[Template, ...]:
    """Names of templates separated by commas.

    Raises:
        ValueError: one is unknown or named twice, or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in INSTRUCTIONS:
            raise ValueError(f"There is no prompt {name!r}: choose from {', '.join(INSTRUCTIONS)}, with commas.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"The prompts {text!r} must name each prompt once, from {', '.join(INSTRUCTIONS)}.")
    return tuple(template for name in names for template in INSTRUCTIONS if template == name)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""The tags of the usual form, which the embedded models have tokens for."""
ALL_TAGS = ("<describe>", "</describe>", *TAGS)
"""The tags of all forms."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt before tokenizing."""

    messages: list[dict[str, Any]]
    """Chat messages in the form of Hugging Face processors: one user turn, images first."""
    neutralised: int
    """Special-token strings replaced in the question and the options."""


_NEEDS_OPTIONS = re.compile(r"\b(following|of (these|those)|options?|choices?|listed|statements?|except|not)\b", re.I)
"""Words of a question that mean its options: "which of the following", "which is not"."""
_NAMES_OPTIONS = re.compile(r"\b(above|below|both|either|neither|all|none|others?|these|those|and/or)\b", re.I)
"""Words of an option that mean the others: "all of the above", "both A and B", "none of these"."""
_MAX_OPTION_WORDS = 5
"""Nobody writes a longer option word by word without having seen it."""


def can_hide_options(sample: Sample) -> bool:
    """Whether a choice question can be asked without its options, to be answered by the text of the right one.

    It can where all options are short, different after :func:`normalise` and none means another one, and the question
    does not speak of them. That looks at the options as they are, never at which of them is right.
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
    """The sample as a template asks it. ``open_ended`` hides options where :func:`can_hide_options` allows it: the
    question is an open one then (closed where the answer is yes or no), and its gold answer the text of the right
    option, which every scorer compares with what was said. A letter that stands behind that text in the reference
    reasoning ("cyst B") is taken out, for nobody who does not see the options can know it. Everything else is asked
    as it is."""
    if template != "open_ended" or not can_hide_options(sample):
        return sample
    text = sample.answer_text
    is_closed = is_yes_no(text)
    return replace(
        sample,
        options=(),
        answer=text,
        answer_type="closed" if is_closed else "open",
        reasoning=re.sub(rf"\b({re.escape(text)}) {sample.answer}\b", r"\1", sample.reasoning),
    )


def fits(sample: Sample, template: Template) -> bool:
    """Whether a template asks a question in a way of its own: ``choice`` needs options, and ``open_ended`` none, or
    some that can be hidden. Depends on question and options only."""
    if template == "choice":
        return bool(sample.options)
    return template != "open_ended" or not sample.options or can_hide_options(sample)


def render_prompt(sample: Sample, template: Template = "think_answer") -> RenderedPrompt:
    """Ask the sample's question in the named form. Depends on question, options and images only.

    A template that does not fit (:func:`fits`) asks as ``think_answer`` would: ``open_ended`` shows the options that
    cannot be hidden, and ``choice`` does not speak of options where there are none.
    """
    sample = as_asked(sample, template)
    question, count = neutralise(sample.question.strip())
    lines = [question]
    for letter, option in zip(LETTERS, sample.options):
        text, replaced = neutralise(option.strip())
        count += replaced
        lines.append(f"{letter}: {text}")
    if sample.options:
        lines.append(CHOICE_HINT)
    lines.append(INSTRUCTIONS[template if fits(sample, template) else "think_answer"])
    content: list[dict[str, Any]] = [{"type": "image"} for _ in sample.images]
    content.append({"type": "text", "text": "\n".join(lines)})
    return RenderedPrompt([{"role": "user", "content": content}], count)


def render_answer(think: str, answer: str, template: Template = "think_answer", *, description: str = "") -> str:
    """A completion in the requested form, as supervised fine-tuning and the gold check write it. A section without
    text is left out: what the data does not have is not invented."""
    texts = {"describe": description, "think": think, "answer": answer}
    clean = {name: neutralise(text.strip())[0] for name, text in texts.items()}
    if not SECTIONS[template]:
        return clean["answer"]
    return "".join(f"<{name}>{clean[name]}</{name}>" for name in SECTIONS[template] if clean[name])
