"""The user's own questions: a table in JSON Lines, CSV or parquet, and a folder of images. Imports no torch.

The folder holds one file per split (``train.jsonl``, ``test.csv`` ...), or one file ``data``, which needs a column
``split`` for ``data.split: official``. docs/data.md lists the columns that are read; reward functions get the others.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import is_yes_no, normalise
from medvqa_rl.core.types import AnswersAs, AnswerType
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.patients import patient_of
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.options import Options, as_letter, find_gold, option_columns, read_options
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    clean_text,
    distinct,
    find_images,
    is_missing,
    optional_text,
    read_groups,
    read_rows,
    required_text,
    without_point_zero,
)
from medvqa_rl.data.reading.tables import WRITABLE, Fields
from medvqa_rl.data.splits import SPLITS, Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

ANSWER_TYPES: tuple[AnswerType, ...] = ("choice", "closed", "open")
BOOLEANS = {
    "true": "yes",
    "false": "no",
    "wahr": "ja",
    "falsch": "nein",
    "vrai": "oui",
    "faux": "non",
    "verdadero": "sí",
    "falso": "no",
}
"""What pandas and spreadsheets write for yes and no, in the language of the spreadsheet."""
GROUPS = {"modality": "modality", "organ": "organ", "family": "family"}
KNOWN = {
    *("id", "image", "images", "question", "answer", "options", "answer_type", "reasoning", "description"),
    *GROUPS.values(),
}
"""Columns whose values the samples have in their fields; rewards get the others too, such as patient."""


def load_own(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split.

    Images are in ``data.image_folder`` below ``data.path``, by default in ``images/`` or in ``data.path`` itself. No
    path or symbolic link may leave that folder.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "your own data", ["**"])
    images = image_folder(root, config, ("images", ""))
    files: dict[Split, list[Path]] = {name: find_table(root, name) for name in SPLITS}
    combined = find_table(root, "data")
    if combined and any(files.values()):
        raise ValueError(
            f"{root} holds {combined[0].name} as well as files for the splits: keep one or the other, so that no row "
            "counts twice."
        )
    split_of_file = {paths[0]: name for name, paths in files.items() if paths}
    if combined:
        files = dict.fromkeys(SPLITS, combined)
    if not any(files.values()):
        raise ValueError(
            f"There is no table of questions in {root}: name it train, val, test or data, with one of the suffixes "
            f"{', '.join(WRITABLE)}."
        )
    folder = ImageFolder(images)

    def read(path: Path) -> Reading:
        file_split = split_of_file.get(path, "")
        recipe = f"own {file_split} {config.split} {config.answers_as}"
        reader = partial(
            read_own,
            path,
            folder,
            split=file_split,
            needs_split=config.split == "official",
            answers_as=config.answers_as,
        )
        return read_indexed(path, folder, recipe, reader, cache_folder(config.cache_dir))

    source = Source(
        title="your own data",
        files=files,
        read=read,
        images=images,
        names={name: f"own/{root.name}/{name}" for name in SPLITS},
        val_from_train=not files["val"],
        is_own=True,
    )
    return load_split(source, config, split, root)


def find_table(root: Path, stem: str) -> list[Path]:
    """Find the table with a name, whatever its suffix: a list of one path, or an empty one.

    Raises:
        ValueError: there are several, with different suffixes.
    """
    found = [root / f"{stem}{suffix}" for suffix in WRITABLE if (root / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(path.name for path in found)}: keep one of them, so that no row counts twice."
        )
    return found


def read_own(
    path: Path, folder: ImageFolder, *, split: str, needs_split: bool, answers_as: AnswersAs = "text"
) -> Reading:
    """Read one table.

    Args:
        path: the table.
        folder: the image folder.
        split: the split of all rows, or "" to read the column ``split``.
        needs_split: whether to drop rows without a split.
        answers_as: ``set`` makes a list of answers one answer; otherwise each of them is correct.

    Raises:
        ValueError: the table cannot be read, or a required column is missing.
    """
    parse = partial(_parse, folder=folder, stem=path.stem, split=split, needs_split=needs_split, answers_as=answers_as)
    return read_rows(path, parse, required=("question", "answer"), known=KNOWN)


def _parse(
    number: int,
    fields: Fields,
    repairs: Repairs,
    *,
    folder: ImageFolder,
    stem: str,
    split: str,
    needs_split: bool,
    answers_as: AnswersAs,
) -> Row:
    question = required_text(fields, "question", repairs)
    if not split and needs_split:
        split = required_text(fields, "split", repairs)
        if split not in SPLITS:
            raise Unusable("unknown split", split)
    images = find_images(image_names(fields, repairs), folder, repairs)
    answers = [without_point_zero(answer) for answer in read_answers(fields, repairs)]
    cells = _list(fields.get("options"), "options", repairs) or _option_cells(fields, repairs)
    kind = optional_text(fields, "answer_type", repairs).lower()
    if kind and kind not in ANSWER_TYPES:
        raise Unusable("unknown answer_type", kind)
    texts: tuple[str, ...] = ()
    answer_type: AnswerType
    if kind == "choice" or (not kind and cells):
        answer_type = "choice"
        numbers_only = all(without_point_zero(cell) != cell for cell in cells)
        options = read_options(list(map(without_point_zero, cells)) if numbers_only else cells, repairs)
        texts = options.texts
        answers = [_find_letter(options, answer, repairs) for answer in answers]
    else:
        if answers_as == "set":
            answers = [", ".join(answers)]
        answers = [text for answer in answers for text in _in_words(answer, question)]
        answer_type = "closed" if kind == "closed" or (not kind and is_yes_no(answers[0])) else "open"
    numbers: Repairs = {}  # ids may be numbers
    row_id = without_point_zero(optional_text(fields, "id", numbers)) or str(number)
    column, patient = patient_of(fields)
    patient = clean_text(patient, column, numbers)
    return Row(
        id=f"own/{stem}/{row_id}",
        question=question,
        answer=answers[0],
        answer_type=answer_type,
        options=texts,
        images=images,
        cluster=f"patient {patient}" if patient else split_fragment(images[0])[0],
        split=split,
        groups=read_groups(fields, GROUPS, repairs),
        reasoning=optional_text(fields, "reasoning", repairs),
        description=optional_text(fields, "description", repairs),
        patient=patient,
        alternatives=distinct(answers[1:], answers[0]),
    )


def read_answers(fields: Fields, repairs: Repairs) -> list[str]:
    """The answers of a row: one, or a list as in :func:`_list`, without its empty parts.

    Raises:
        Unusable: there is none, or it is not text.
    """
    value = fields.get("answer")
    if isinstance(value, str) and not ("|" in value or _LIST.match(value)):
        return [required_text(fields, "answer", repairs)]
    if isinstance(value, list | tuple):
        value = [part for part in value if not is_missing(part) and str(part).strip()]
    elif not isinstance(value, str):
        return [required_text(fields, "answer", repairs)]
    answers = _list(value, "answer", repairs)
    if not answers:
        raise Unusable("empty answer")
    return answers


_LIST = re.compile(r"\s*\[\s*[\"'\]]")
"""How a list of texts begins, in JSON or by mistake in Python's form. Other texts may begin with a bracket."""


def _find_letter(options: Options, answer: str, repairs: Repairs) -> str:
    """The letter of the option that an answer names.

    Raises:
        Unusable: it names none.
    """
    letter = as_letter(answer)
    try:
        return find_gold(options, letter or None, "" if letter else answer, repairs)
    except Unusable:
        if (word := BOOLEANS.get(normalise(answer))) is None:
            raise
        return find_gold(options, None, word, repairs)


def _in_words(answer: str, question: str) -> tuple[str, ...]:
    """The answers that a boolean stands for, or the answer itself. The first is the one that the question asks for."""
    word = BOOLEANS.get(normalise(answer))
    if word is None:
        return (answer,)
    asks_for_it = len(BOOLEANS.keys() & set(normalise(question).split())) > 1
    return (answer, word) if asks_for_it else (word, answer)


def image_names(fields: Fields, repairs: Repairs) -> list[str]:
    """The image names of a row, from the column image or images.

    Raises:
        Unusable: there is none, or the value is not a list or text.
    """
    for column in ("image", "images"):
        if names := _list(fields.get(column), column, repairs):
            return names
    raise Unusable("no image")


def _option_cells(fields: Fields, repairs: Repairs) -> list[str]:
    """The options of a row that has each in a column of its own, without the empty ones at the end."""
    cells = [optional_text(fields, column, repairs) for column in option_columns(tuple(fields))]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _list(value: object, name: str, repairs: Repairs) -> list[str]:
    """A list of texts, given as a list, as a JSON list, or separated by "|".

    Raises:
        Unusable: the value is none of these, or one of the texts is empty.
    """
    if is_missing(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"{name} is not a JSON list", str(value)) from None
    if isinstance(value, str):
        value = [part for part in value.split("|") if part.strip()]
    if not isinstance(value, list | tuple):
        raise Unusable(f"{name} is not a list or text", f"a {type(value).__name__}")
    texts = [clean_text(part, name, repairs) for part in value]
    if not all(texts):
        raise Unusable(f"empty {name}")
    return texts
