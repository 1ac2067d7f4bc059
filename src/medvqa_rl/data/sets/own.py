"""Your own questions: a table in JSON Lines, CSV or parquet, and a folder of images. Imports no torch.

The folder holds train, val and test (``train.jsonl``, ``test.csv`` ...), or one file ``data`` with a column ``split``,
or one file ``data`` alone for ``data.split: image``. The columns are in ``COLUMNS``; others are left alone.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import LETTERS, AnswerType
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    clean,
    find_gold,
    images_of,
    is_missing,
    optional_text,
    read_options,
    read_rows,
    text_of,
)
from medvqa_rl.data.reading.tables import Fields
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import SPLITS, Source, data_folder, load_split

COLUMNS = {
    "image": "path of the image below the image folder; several as a list, or separated by | in CSV",
    "images": "the same as image; use one of the two",
    "question": "the question",
    "answer": "the gold answer; for choice questions the option's letter, or its text",
    "options": "choice questions: the options as a list, or separated by | in CSV",
    "answer_type": "choice, closed or open; without it: choice with options, closed for yes and no, otherwise open",
    "id": "names the row, unique within the file; without it the row's position",
    "split": "train, val or test, in a file named data",
    "patient": "all rows of a patient stay in one split",
    "reasoning": "reference reasoning for supervised fine-tuning",
    "description": "what is known of the image in words, for judges that grade reasoning and for supervised learning",
    "modality": "results are broken down by it",
    "organ": "results are broken down by it",
    "family": "results are broken down by it; data.families selects by it",
}
"""What a column means. image (or images), question and answer must be there."""

TABLES = (".jsonl", ".csv", ".parquet")
REQUIRED = ("question", "answer")
ANSWER_TYPES: tuple[AnswerType, ...] = ("choice", "closed", "open")
GROUPS = ("modality", "organ", "family")


def load_own(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split.

    Images lie in ``data.image_folder`` below ``data.path``, in ``images/``, or in ``data.path`` itself. Paths that
    leave that folder are refused, links that do included.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "your own data", ["**"])
    named = "images" if config.image_folder is None else config.image_folder
    images = root / named
    if not images.is_dir():
        if config.image_folder is not None:
            raise ValueError(f"There is no folder {named!r} in {root}: set data.image_folder to that of the images.")
        images = root
    files: dict[Split, list[Path]] = {name: tables_named(root, name) for name in SPLITS}
    combined = tables_named(root, "data")
    if combined and any(files.values()):
        raise ValueError(
            f"{root} holds {combined[0].name} as well as files for the splits: keep one or the other, lest a row "
            "counts twice."
        )
    if combined:
        files = dict.fromkeys(SPLITS, combined)
    if not any(files.values()):
        raise ValueError(
            f"There is no table of questions in {root}: name it train, val, test or data, with one of the endings "
            f"{', '.join(TABLES)}."
        )
    folder = ImageFolder(images)
    places = {} if combined else {paths[0]: name for name, paths in files.items() if paths}

    def read(path: Path) -> Reading:
        place = places.get(path, "")
        recipe = f"own {place} {config.split}"
        reader = partial(read_own, path, folder, place=place, needs_split=config.split == "official")
        return read_indexed(path, folder, recipe, reader, cache_folder(config.cache_dir))

    source = Source(
        title="your own data",
        files=files,
        read=read,
        images=images,
        names={name: f"own/{root.name}/{name}" for name in SPLITS},
        val_from_train=not files["val"],
    )
    return load_split(source, config, split, root)


def tables_named(root: Path, stem: str) -> list[Path]:
    """The table with a name, at most one.

    Raises:
        ValueError: there are several, with different endings.
    """
    found = [root / f"{stem}{suffix}" for suffix in TABLES if (root / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(path.name for path in found)}: keep one of them, lest a row counts twice."
        )
    return found


def read_own(path: Path, folder: ImageFolder, *, place: str, needs_split: bool) -> Reading:
    """Read one table.

    Args:
        path: the table.
        folder: the folder of the images.
        place: the split of all rows; "" where the column ``split`` says it.
        needs_split: whether a row without a split is unusable.

    Raises:
        ValueError: the table cannot be read, or a column is missing.
    """
    ids: set[str] = set()
    parse = partial(_parse, folder=folder, stem=path.stem, place=place, needs_split=needs_split, ids=ids)
    return read_rows(path, parse, required=REQUIRED)


def _parse(
    number: int,
    fields: Fields,
    repairs: Repairs,
    *,
    folder: ImageFolder,
    stem: str,
    place: str,
    needs_split: bool,
    ids: set[str],
) -> Row:
    question = text_of(fields, "question", repairs)
    if not place and needs_split:
        place = text_of(fields, "split", repairs)
        if place not in SPLITS:
            raise Unusable("unknown split", place)
    column = "images" if is_missing(fields.get("image")) else "image"
    names = _list(fields.get(column), column, repairs)
    if not names:
        raise Unusable("no image")
    images = images_of(names, folder, repairs)
    answer = text_of(fields, "answer", repairs)
    cells = _list(fields.get("options"), "options", repairs)
    kind = optional_text(fields, "answer_type", repairs).lower()
    if kind and kind not in ANSWER_TYPES:
        raise Unusable("unknown answer_type", kind)
    is_choice = kind == "choice" or (not kind and bool(cells))
    texts: tuple[str, ...] = ()
    if is_choice:
        options = read_options(cells, repairs)
        texts = options.texts
        answer = find_gold(options, *_letter_or_text(answer), repairs)
    is_closed = kind == "closed" or (not kind and normalise(answer) in ("yes", "no"))
    answer_type: AnswerType = "choice" if is_choice else "closed" if is_closed else "open"
    ignored: Repairs = {}  # ids and patients may be numbers
    name = optional_text(fields, "id", ignored) or str(number)
    if name in ids:
        raise Unusable("repeated id", name)
    ids.add(name)
    patient = optional_text(fields, "patient", ignored)
    together = f"patient {patient}" if patient else split_fragment(images[0])[0]
    groups = {group: text for group in GROUPS if (text := optional_text(fields, group, repairs))}
    return Row(
        id=f"own/{stem}/{name}",
        question=question,
        answer=answer,
        answer_type=answer_type,
        options=texts,
        images=images,
        together=together,
        place=place,
        groups=groups,
        reasoning=optional_text(fields, "reasoning", repairs),
        description=optional_text(fields, "description", repairs),
    )


def _letter_or_text(answer: str) -> tuple[str | None, str]:
    """(letter, text) of an answer: a lone letter is the option's letter, anything else is its text."""
    letter = answer.strip(" .:()").upper()
    return (letter, "") if len(letter) == 1 and letter in LETTERS else (None, answer)


def _list(value: object, name: str, repairs: Repairs) -> list[str]:
    """A list of texts: a list, a text that is a JSON list, or a text with bars between its parts.

    Raises:
        Unusable: it is none of these.
    """
    if is_missing(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"{name} is not a JSON list", value) from None
        value = parsed
    if isinstance(value, str):
        value = [part for part in value.split("|") if part.strip()]
    if not isinstance(value, list | tuple):
        raise Unusable(f"{name} is not a list or text", f"a {type(value).__name__}")
    return [_item(part, name, repairs) for part in value]


def _item(part: object, name: str, repairs: Repairs) -> str:
    text = clean(part, name, repairs)
    if not text:
        raise Unusable(f"empty {name}")
    return text
