"""Recognise the records of other tools by their shape, and bring tables and records into our columns.

A shape is a function that returns a record's fields under our names (:mod:`medvqa_rl.data.sets.own`), or None if the
record has another shape. What a shape does not read keeps its name. Imports no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from medvqa_rl.core.text import number_of, printable, shown
from medvqa_rl.data.reading.columns import REQUIRED, AmbiguousColumns, is_own, standard_names
from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.rows import Unusable, is_missing
from medvqa_rl.data.reading.sheets import WINDOWS_1252, Fields

Record = dict[str, Any]

_PERSON, _MODEL = ("user", "human"), ("assistant", "gpt", "model", "chatgpt")


def _export(record: Fields) -> Record | None:
    """This package's export in JSON Lines or parquet: TRL's columns and the parts that they were made of."""
    if not {"prompt", "images", "solution", "question", "options", "answer_type"} <= record.keys():
        return None
    found = _without(record, "prompt", "solution", "answers", "groups")
    answers = record.get("answers")
    found["answer"] = answers if isinstance(answers, list) and len(answers) > 1 else record["solution"]
    return found | _groups(record.get("groups"))


def _groups(value: Any) -> Record:
    try:
        groups = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return {}
    return {name: groups[name] for name in ("modality", "organ", "family") if name in groups} if groups else {}


def _conversations(record: Fields) -> Record | None:
    """LLaVA and ShareGPT: ``conversations`` of ``{"from": "human", "value": ...}``."""
    turns = record.get("conversations")
    return _chat(record, "conversations", turns) if _are_messages(turns) else None


def _messages(record: Fields) -> Record | None:
    """Chat ``messages`` of OpenAI, transformers and ms-swift."""
    turns = record.get("messages")
    return _chat(record, "messages", turns) if _are_messages(turns) else None


def _verl(record: Fields) -> Record | None:
    """verl: ``prompt`` and ``reward_model.ground_truth``."""
    rule = record.get("reward_model")
    if not (isinstance(rule, Mapping) and "ground_truth" in rule and "prompt" in record):
        return None
    found = _prompt({**record, "solution": rule["ground_truth"]}) or {}
    extra = record.get("extra_info")
    if isinstance(extra, Mapping) and isinstance(extra.get("question"), str) and extra["question"].strip():
        found["question"] = extra["question"]  # without the instruction of the prompt
    return _without(found, "reward_model")


def _prompt(record: Fields) -> Record | None:
    """TRL: ``prompt``, a text or messages, and ``solution``."""
    prompt = record.get("prompt")
    if "solution" not in record or "question" in record:
        return None
    if isinstance(prompt, str):
        found = _without(record, "prompt") | {"question": prompt}
    elif _are_messages(prompt):
        found = _chat(record, "prompt", prompt)
    else:
        return None
    return _without(found, "solution") | {"answer": record["solution"]}


def _swift(record: Fields) -> Record | None:
    """ms-swift: ``query`` and ``response``."""
    return _renamed(record, "query", "response")


def _problem(record: Fields) -> Record | None:
    """EasyR1, R1-V and Med-R1: ``problem`` and ``answer`` or ``solution``."""
    return _renamed(record, "problem", "answer" if "answer" in record else "solution")


SHAPES: Mapping[str, Callable[[Fields], Record | None]] = {
    "records of medvqa-rl data export": _export,
    "LLaVA/ShareGPT conversations": _conversations,
    "chat messages": _messages,
    "verl records (prompt, reward_model)": _verl,
    "TRL records (prompt, solution)": _prompt,
    "ms-swift records (query, response)": _swift,
    "EasyR1/R1-V records (problem, solution)": _problem,
}
"""Name of each shape -> the function that recognises it; the first that does counts."""


def recognise(record: Fields) -> tuple[str, Fields]:
    """The name of a record's shape and its fields under our names; a record of no known shape is returned unchanged.

    Raises:
        Unusable: the record has a known shape and no single question and answer.
    """
    for name, shape in SHAPES.items():
        if (found := shape(record)) is not None:
            return name, found
    return "", record


def _without(record: Fields, *names: str) -> Record:
    return {name: value for name, value in record.items() if name not in names}


def _renamed(record: Fields, question: str, answer: str) -> Record | None:
    if question not in record or answer not in record or "question" in record:
        return None
    return _without(record, question, answer) | {"question": record[question], "answer": record[answer]}


def _are_messages(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def _chat(record: Fields, column: str, turns: Sequence[Mapping[str, Any]]) -> Record:
    """The question and the answer of a conversation, and the images in its messages.

    Raises:
        Unusable: it has no question, or several.
    """
    said: dict[str, list[str]] = {"question": [], "answer": []}
    images: list[Any] = []
    for turn in turns:
        role = str(turn.get("role", turn.get("from"))).lower()
        content = turn.get("content", turn.get("value"))
        text = " ".join(_texts(content))
        if role in _PERSON:
            said["question"].append(text)
            images += _images(content)
        elif role in _MODEL:
            said["answer"].append(text)
    if len(said["question"]) != 1 or len(said["answer"]) > 1:
        raise Unusable("not one question and one answer", f"{len(said['question'])} questions in {column}")
    found = _without(record, column) | {"question": said["question"][0]}
    if said["answer"] and not {"answer", "solution"} & record.keys():  # beside these it is a target of training
        found["answer"] = said["answer"][0]
    if images and all(is_missing(found.get(name)) or not found.get(name) for name in ("image", "images")):
        found["images"] = images
    return found


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list | tuple) else ()
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _images(content: Any) -> list[Any]:
    parts = content if isinstance(content, list | tuple) else ()
    kinds = ("image", "image_url", "input_image")
    named = [part for part in parts if isinstance(part, Mapping) and part.get("type") in kinds]
    return [part for part in named if any(part.get(key) for key in ("image", "image_url", "url", "path", "bytes"))]


# --- a table ------------------------------------------------------------------------------------------------------


@dataclass
class Standard:
    """Brings the rows of one table into our columns, and remembers how."""

    path: Path
    given: Mapping[str, str] = field(default_factory=dict)
    """Our name -> column, as the user gives them. Rows are then read as they are, whatever their shape."""
    shapes: Counter[str] = field(default_factory=Counter)
    renamed: dict[str, str] = field(default_factory=dict)
    """Our name -> column that has another name."""
    columns: dict[str, None] = field(default_factory=dict)
    """The columns of all rows."""
    standard: set[str] = field(default_factory=set)
    """Our names that occur in any row."""
    _known: set[tuple[str, ...]] = field(default_factory=set)

    def __call__(self, row: Fields) -> Fields:
        """The fields of a row under our names.

        Raises:
            Unusable: see :func:`recognise`.
            ValueError: two columns have the same meaning.
        """
        shape, record = ("", row) if self.given else recognise(row)
        names = tuple(record)
        try:
            mapping = standard_names(names, tuple(self.given.items()))
        except AmbiguousColumns as error:
            raise ValueError(self._ambiguous(error)) from error
        self.shapes[shape] += 1
        if names not in self._known:
            self._known.add(names)
            self.columns |= dict.fromkeys(row)
            self.standard |= {*mapping.values(), *(name for name in names if name in ("images", "image_1"))}
            others = {name: column for column, name in mapping.items() if column in row and not is_own(column)}
            self.renamed |= others
        taken = {name for column, name in mapping.items() if column != name}
        if not taken:
            return record
        kept = {name: value for name, value in record.items() if name not in mapping and name not in taken}
        return kept | {name: record[column] for column, name in mapping.items()}

    def check(self, required: Sequence[str] = REQUIRED) -> None:
        """Refuse a table that lacks a required column in all of its rows.

        Raises:
            ValueError: it does; the message says how to name the column.
        """
        for name, column in self.given.items():
            if name not in self.standard and self.columns:
                raise ValueError(
                    f"The table {self.path} has no column {shown(column)}, which is to be {name}; it has "
                    f"{printable(', '.join(self.columns))}: give one of these with --columns {name}=COLUMN (in a "
                    f"config data.columns.{name})."
                )
        has = self.standard | ({"image"} if self.standard & {"images", "image_1"} else set())
        missing = [name for name in required if name not in has]
        if missing and self.columns:
            example = ",".join(f"{name}=COLUMN" for name in missing)
            raise ValueError(
                f"The table {self.path} has no column {', '.join(missing)}; it has "
                f"{printable(', '.join(self.columns))}: rename its columns, or say which they are with --columns "
                f"{example} (in a config {' and '.join(f'data.columns.{name}' for name in missing)})."
            )

    def _ambiguous(self, error: AmbiguousColumns) -> str:
        columns = [shown(column) for column in error.columns]
        return (
            f"The columns {' and '.join(columns)} of {self.path} can both be {error.standard}: say which it is with "
            f"--columns {error.standard}={error.columns[0]} (in a config data.columns.{error.standard})."
        )

    def about(self, report: TableReport) -> str:
        """A sentence on what the table is: its number of rows, their form and the columns read under other names."""
        known = {name: count for name, count in self.shapes.items() if name}
        parts = [f"{number_of(report.total, 'row')}"]
        if known:
            parts[0] += " of " + " and ".join(
                name if count == report.total else f"{name} ({count:,})" for name, count in known.items()
            )
        if report.about:
            parts.append(report.about)
        if windows := sum(issue.reason == WINDOWS_1252 for issue in report.issues):
            parts.append(f"{windows:,} of them {WINDOWS_1252}")
        text = f"{report.file}: {', '.join(parts)}"
        if self.renamed and not known:
            text += "; " + ", ".join(f"{name} is {shown(column)}" for name, column in self.renamed.items())
        return f"{text}."
