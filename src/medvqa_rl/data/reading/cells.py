"""The cells of a question in the forms that tables and records of the field have: images, answers, options.

Imports no torch.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from medvqa_rl.core.answers import parse_completion
from medvqa_rl.core.types import LETTERS
from medvqa_rl.data.reading.issues import NO_IMAGE
from medvqa_rl.data.reading.options import option_columns, split_options
from medvqa_rl.data.reading.rows import (
    Repairs,
    Unusable,
    clean_text,
    is_missing,
    optional_text,
    required_text,
    without_point_zero,
)
from medvqa_rl.data.reading.sheets import Fields

_TEXT_KEYS = ("content", "text", "value", "option", "answer")
_LETTER_KEYS = ("letter", "label", "key", "id", "name", "index")
"""What the objects in a list of options call their text and their letter."""

_PLACEHOLDER = re.compile(r"<\|?(?:image|image_pad|vision_start|vision_end|img)\|?>", re.IGNORECASE)
_NUMBERED = re.compile(r"<image[ _]?(\d{1,2})>", re.IGNORECASE)
_DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


def read_list(value: object, name: str, repairs: Repairs) -> list[str]:
    """A list of texts: given as a list, as JSON or Python text of one, or separated by "|".

    Raises:
        Unusable: the value is none of these, or one of the texts is empty.
    """
    value = _parsed(value, name, "[")
    if is_missing(value):
        return []
    if isinstance(value, str):
        value = [part for part in value.split("|") if part.strip()]
    if not isinstance(value, list | tuple):
        raise Unusable(f"{name} is not a list or text", f"a {type(value).__name__}")
    texts = [clean_text(part, name, repairs) for part in value]
    if not all(texts):
        raise Unusable(f"empty {name}")
    return texts


def _parsed(value: object, name: str, opening: str) -> Any:
    """A text that begins with a bracket as the list or object that it is in JSON or Python; other values unchanged.

    Raises:
        Unusable: it is neither.
    """
    if not (isinstance(value, str) and value.lstrip()[:1] in tuple(opening)):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, list | tuple | dict):
            return parsed
    raise Unusable(f"{name} is not a JSON list", value)


# --- images -------------------------------------------------------------------------------------------------------


def image_cells(fields: Fields, repairs: Repairs, *, may_lack: bool = False) -> list[str | bytes]:
    """The images of a row, names or the bytes of files, from the columns image, images, or image_1, image_2 ...

    Args:
        may_lack: whether a row without an image is usable; the list is then empty.

    Raises:
        Unusable: there is none, or a value is neither a name nor an image.
    """
    for column in ("image", "images"):
        if cells := _images(fields.get(column), column, repairs):
            return cells
    numbered = [name for name in fields if re.fullmatch(r"image_\d{1,2}", name)]
    numbered.sort(key=lambda name: int(name.rpartition("_")[2]))
    if cells := [cell for name in numbered for cell in _images(fields[name], name, repairs)]:
        return cells
    if may_lack:
        return []
    raise Unusable(NO_IMAGE)


def _images(value: object, name: str, repairs: Repairs) -> list[str | bytes]:
    if isinstance(value, bytes | Mapping):
        value = [value]
    if isinstance(value, str) and _DATA_ADDRESS.match(value):
        value = [value]
    if not (isinstance(value, list | tuple) and any(isinstance(item, bytes | Mapping) for item in value)):
        names = read_list(value, name, repairs)
    else:
        names = []
        found: list[str | bytes] = []
        for item in value:
            if isinstance(item, Mapping):
                item = _image_of(item)
            found.append(item if isinstance(item, bytes) else clean_text(item, name, repairs))
        if not all(found):
            raise Unusable(f"empty {name}")
        return found
    return [_decoded(text) for text in names]


def _image_of(item: Mapping[Any, Any]) -> Any:
    """The bytes or the name in an object of the ``datasets`` library, of a chat message, or similar."""
    if isinstance(item.get("bytes"), bytes) and item["bytes"]:
        return item["bytes"]
    for key in ("path", "image", "image_url", "url", "file_name", "filename"):
        if isinstance(item.get(key), Mapping):
            return _image_of(item[key])
        if isinstance(item.get(key), str) and item[key]:
            return _decoded(item[key])
    raise Unusable("no image")


def _decoded(text: str) -> str | bytes:
    """The bytes of a ``data:`` address; other texts are names.

    Raises:
        Unusable: the address is damaged, or on the web.
    """
    if match := _DATA_ADDRESS.match(text):
        try:
            return base64.b64decode(text[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise Unusable("damaged base64 of an image") from None
    if text.lower().startswith(("http://", "https://")):
        raise Unusable("image is a web address", text)
    return text.removeprefix("file://")


# --- questions and answers ----------------------------------------------------------------------------------------


def without_placeholders(question: str) -> str:
    """A question without the marks for its images: "<image>" goes, "<image 2>" inside a sentence is "image 2"."""
    if "<" not in question:
        return question
    text = _PLACEHOLDER.sub(" ", question)
    text = re.sub(rf"^(?:\s*{_NUMBERED.pattern})+|(?:{_NUMBERED.pattern}\s*)+$", " ", text, flags=re.IGNORECASE)
    return " ".join(name_images(text).split())


def name_images(text: str) -> str:
    """A text in which marks such as "<image 2>" are "image 2"."""
    return _NUMBERED.sub(r"image \1", text)


def read_answers(fields: Fields, repairs: Repairs) -> list[str]:
    """The answers of a row: one, or a list as in :func:`read_list`, without its empty parts.

    Raises:
        Unusable: there is none, or it is not text.
    """
    value = fields.get("answer")
    if isinstance(value, str) and not ("|" in value or _LIST.match(value)):
        return [without_tags(required_text(fields, "answer", repairs))[0]]
    if isinstance(value, list | tuple):
        value = [part for part in value if not is_missing(part) and str(part).strip()]
    elif not isinstance(value, str):
        return [required_text(fields, "answer", repairs)]
    answers = read_list(value, "answer", repairs)
    if not answers:
        raise Unusable("empty answer")
    return [without_tags(answer)[0] for answer in answers]


_LIST = re.compile(r"\s*\[\s*[\"'\]]")
"""How a list of texts begins, in JSON or Python. Other texts may begin with a bracket."""


def without_tags(answer: str) -> tuple[str, str]:
    """The answer and the reasoning in a target of training, such as ``<think>...</think> <answer>B</answer>``.

    Other texts are the answer, without reasoning.
    """
    if "<answer>" in answer and (parsed := parse_completion(answer)).answer:
        return parsed.answer, parsed.think or ""
    if answer.startswith("<think>") and "</think>" in answer:
        think, _, rest = answer.removeprefix("<think>").partition("</think>")
        return (rest.strip(), think.strip()) if rest.strip() else (answer, "")
    return answer, ""


# --- options ------------------------------------------------------------------------------------------------------


def option_cells(fields: Fields, repairs: Repairs) -> list[str]:
    """The options of a row in order, empty if it has none: a list, an object by letter, a list of objects, JSON or
    Python text of these, texts separated by "|", or a column for each.

    Raises:
        Unusable: they are in another form, or their letters are not A, B ... in order.
    """
    value = _parsed(fields.get("options"), "options", "[{")
    if isinstance(value, Mapping):
        return _of_object(value, repairs)
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return _of_objects(value, repairs)
    if cells := read_list(value, "options", repairs):
        return cells
    cells = [optional_text(fields, column, repairs) for column in option_columns(tuple(fields))]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _of_object(options: Mapping[Any, Any], repairs: Repairs) -> list[str]:
    """The options of ``{"A": "left", "B": "right"}``, or of ``{"label": ["A", "B"], "text": ["left", "right"]}``."""
    texts, labels = options.get("text"), options.get("label")
    if isinstance(texts, list | tuple) and isinstance(labels, list | tuple) and len(texts) == len(labels):
        options = dict(zip(map(str, labels), texts))
    filled = {str(name).strip(): text for name, text in options.items() if not is_missing(text) and text != ""}
    return _in_order(filled, repairs)


def _of_objects(options: Iterable[Mapping[Any, Any]], repairs: Repairs) -> list[str]:
    """The options of ``[{"letter": "A", "content": "left"}, ...]``; without letters, in the given order."""
    texts, letters = [], []
    for option in options:
        text = next((key for key in _TEXT_KEYS if key in option), None)
        if text is None:
            raise Unusable("options are in an unknown form", ", ".join(map(str, option)))
        texts.append(option[text])
        letters += [str(option[key]).strip() for key in _LETTER_KEYS if key in option and key != text][:1]
    if not letters:
        return [clean_text(text, "options", repairs) for text in texts]
    if len(letters) != len(texts) or len({*letters}) != len(letters):
        raise Unusable("options are in an unknown form", ", ".join(letters))
    return _in_order(dict(zip(letters, texts)), repairs)


def _in_order(options: Mapping[str, Any], repairs: Repairs) -> list[str]:
    """The options by letter, or by number from 0 or 1.

    Raises:
        Unusable: a letter or number is missing.
    """
    names = {without_point_zero(name).upper().removeprefix("OPTION").strip(" _-()."): name for name in options}
    number = len(options)
    for expected in (LETTERS[:number], [*map(str, range(number))], [*map(str, range(1, number + 1))]):
        if names.keys() == {*expected}:
            return [clean_text(options[names[name]], "options", repairs) for name in expected]
    raise Unusable("options are not named A, B ... in order", ", ".join(options))


# --- what a whole table says about its rows -----------------------------------------------------------------------

UNSETTLED_ROWS = 1000
"""So many first rows without options are enough: the table has no choice questions whose form must be found out."""


@dataclass(frozen=True)
class Survey:
    """What the rows of a table say together about their options."""

    questions: int = 0
    """Number of rows whose question ends in options, if no row has options elsewhere."""
    rows: int = 0
    """Number of rows that were looked at."""
    first: int | None = None
    """The number of the first option, 0 or 1, if answers number the options; None if they don't."""
    is_unclear: bool = False
    """Whether answers number the options, and may do so from 0 or from 1."""

    @property
    def in_question(self) -> bool:
        """Whether options are read from the text of the questions: only if every row has them there."""
        return 0 < self.questions == self.rows


def survey(rows: Iterable[Fields]) -> Survey:
    """Find out whether options are in the text of the questions, and whether answers number the options.

    Answers number the options if no answer of a choice question is a text or letter, and some number is not the text
    of an option. They do so from 0 if 0 occurs, else from 1 if the number of options occurs.
    """
    seen = questions = with_options = 0
    numbers: list[tuple[int, int]] = []
    are_numbers = True
    for fields in rows:
        seen += 1
        try:
            cells = option_cells(fields, {})
        except Unusable:
            with_options += 1
            continue
        with_options += bool(cells)
        question = fields.get("question")
        if not cells and isinstance(question, str) and (found := split_options(without_placeholders(question))):
            questions += 1
            cells = list(found[1])
        if cells and are_numbers:
            number = as_number(fields.get("answer"))
            are_numbers = number is not None
            if number is not None and str(number) not in map(without_point_zero, cells):
                numbers.append((number, len(cells)))
        is_settled = with_options > 0 and not are_numbers
        if is_settled or (seen == UNSETTLED_ROWS and not (with_options or questions)):
            break
    counted = (0 if with_options else questions, seen)
    if not numbers or not are_numbers:
        return Survey(*counted)
    if any(number == 0 for number, _ in numbers):
        return Survey(*counted, first=0)
    if any(number == options for number, options in numbers):
        return Survey(*counted, first=1)
    return Survey(*counted, is_unclear=True)


def as_number(value: object) -> int | None:
    """A whole number from 0 to 26, written as a number or a text; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = without_point_zero(str(value).strip())
    return int(text) if text.isdecimal() and len(text) < 3 and int(text) <= len(LETTERS) else None
