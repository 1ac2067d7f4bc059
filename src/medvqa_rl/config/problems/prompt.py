"""Problems with the user's own prompts and tags. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from string import Formatter

from medvqa_rl.config import Config
from medvqa_rl.core.types import DEFAULT_WORDING

_CONTROL = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_TAG = re.compile(r"[^\w\s](?=.*\w).*[^\w\s]")


def prompt_problems(config: Config) -> Iterator[tuple[str, ...]]:
    """Yield a sentence and its settings for each problem."""
    for name, text in (("system", config.prompt.system), ("instruction", config.prompt.instruction)):
        if text is not None and not text.strip():
            yield f"prompt.{name} is empty: write a text, or set it to null.", f"prompt.{name}"
        elif text is not None and (found := _CONTROL.search(text)):
            yield (
                f"prompt.{name} holds {found[0]}, which a tokenizer reads as a control token: leave it out, since the "
                "chat template writes these.",
                f"prompt.{name}",
            )
    if config.prompt.instruction:
        yield from _instruction_problems(config.prompt.instruction, config)
    yield from _tag_problems(config)


def _instruction_problems(instruction: str, config: Config) -> Iterator[tuple[str, ...]]:
    try:
        parts = list(Formatter().parse(instruction))
    except ValueError as error:
        yield (
            f"prompt.instruction has a single brace ({error}): write literal braces twice, {{{{ and }}}}.",
            "prompt.instruction",
        )
        return
    names = [
        f"{name}{'!' if how else ''}{how or ''}{':' if spec else ''}{spec}"
        for _, name, spec, how in parts
        if name is not None
    ]
    if unknown := [name for name in names if name not in ("question", "options")]:
        yield (
            f"prompt.instruction has the placeholder {{{unknown[0]}}}, but only {{question}} and {{options}} are "
            "filled in: remove it, or write literal braces twice, {{ and }}.",
            "prompt.instruction",
        )
    elif "question" not in names:
        yield (
            "prompt.instruction has no {question}, so no question would be asked: write it where the question goes.",
            "prompt.instruction",
        )
    elif "options" not in names and "choice" in config.data.answer_types:
        yield (
            "prompt.instruction has no {options}, but data.answer_types keeps choice questions: write it where the "
            "options belong (it is left out of other questions), or set data.answer_types=[closed,open].",
            "prompt.instruction",
            "data.answer_types",
        )


def _tag_problems(config: Config) -> Iterator[tuple[str, ...]]:
    tags = [
        (f"prompt.tags.{section}", tag)
        for section in ("describe", "think", "answer")
        for tag in getattr(config.prompt.tags, section)
    ]
    for setting, tag in tags:
        if tag not in DEFAULT_WORDING.tags and not _TAG.fullmatch(tag):
            yield (
                f"{setting} has the tag {tag!r}, but a tag is a name between punctuation on one line, such as "
                "<reasoning> or [/answer].",
                setting,
            )
        elif _CONTROL.search(tag):
            yield (
                f"{setting} has the tag {tag!r}, which a tokenizer reads as a control token: choose another.",
                setting,
            )
    for index, (setting, tag) in enumerate(tags):
        for other_setting, other in tags[index + 1 :]:
            first, second = tag.casefold(), other.casefold()
            if first in second or second in first:
                how = "equal" if first == second else "parts of each other"
                yield (
                    f"The tags {tag!r} of {setting} and {other!r} of {other_setting} are {how}, so they could not be "
                    "told apart: choose different ones.",
                    *dict.fromkeys((setting, other_setting)),
                )
                return
