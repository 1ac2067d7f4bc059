"""The user's own questions: a table or the records of another tool, and a folder of images. Imports no torch.

The folder holds one file per split (``train.jsonl``, ``test.csv`` ...), or one file ``data``, which needs a column
``split`` for ``data.split: official``. docs/data.md lists the columns that are read; reward functions get the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import is_yes_no, normalise, number_of
from medvqa_rl.core.types import LETTERS, AnswersAs, AnswerType
from medvqa_rl.data.images.windowing import split_fragment
from medvqa_rl.data.patients import patient_of
from medvqa_rl.data.reading.cells import (
    Survey,
    as_number,
    image_cells,
    option_cells,
    read_answers,
    survey,
    without_placeholders,
    without_tags,
)
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.options import Options, as_letter, find_gold, read_options, split_options
from medvqa_rl.data.reading.records import Standard
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    clean_text,
    distinct,
    find_images,
    optional_text,
    read_groups,
    read_rows,
    required_text,
    without_point_zero,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.tables import READABLE, is_saved, read_table
from medvqa_rl.data.reading.unpack import store_image, unpacked_images
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
    *(f"image_{number}" for number in range(1, 10)),
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
            f"{', '.join(READABLE)}."
        )
    given = config.columns.given
    embeds = [embeds_images(path, given) for path in dict.fromkeys(path for paths in files.values() for path in paths)]
    if any(embeds) and not all(embeds):
        raise ValueError(f"Of the tables in {root} some hold their images and some name files: use one way in all.")
    cache_dir = cache_folder(config.cache_dir)
    images = unpacked_images(cache_dir, "own") if any(embeds) else image_folder(root, config, ("images", ""))
    folder = ImageFolder(images)

    def read(path: Path) -> Reading:
        file_split = split_of_file.get(path, "")
        recipe = f"own {file_split} {config.split} {config.answers_as} {config.allow_text_only} {given}"
        reader = partial(
            read_own,
            path,
            folder,
            split=file_split,
            needs_split=config.split == "official",
            answers_as=config.answers_as,
            given=given,
            unpacks=any(embeds),
            allow_text_only=config.allow_text_only,
        )
        return read_indexed(path, folder, recipe, reader, cache_dir, is_shared=any(embeds))

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

    A table may also be a folder written by ``save_to_disk``: one with that name (or validation for val), or for data
    the folder itself.

    Raises:
        ValueError: there are several, with different suffixes.
    """
    found = [root / f"{stem}{suffix}" for suffix in READABLE if (root / f"{stem}{suffix}").is_file()]
    folders = {"val": [root / "val", root / "validation"], "data": [root / "data", root]}.get(stem, [root / stem])
    found += filter(is_saved, folders)
    if len(found) > 1:
        raise ValueError(
            f"{root} holds {' and '.join(path.name for path in found)}: keep one of them, so that no row counts twice."
        )
    return found


def embeds_images(path: Path, given: Mapping[str, str]) -> bool:
    """Whether a table holds the bytes of its images instead of their names, as its first row with an image says.

    Raises:
        ValueError: the table cannot be read.
    """
    standard = Standard(path, given)
    for _, fields in read_table(path, TableReport(path.name)):
        try:
            return isinstance(image_cells(standard(fields), {})[0], bytes)
        except Unusable:
            continue
    return False


def read_own(
    path: Path,
    folder: ImageFolder,
    *,
    split: str,
    needs_split: bool,
    answers_as: AnswersAs = "text",
    given: Mapping[str, str] = MappingProxyType({}),
    unpacks: bool = False,
    allow_text_only: bool = False,
) -> Reading:
    """Read one table.

    Args:
        path: the table.
        folder: the image folder.
        split: the split of all rows, or "" to read the column ``split``.
        needs_split: whether to drop rows without a split.
        answers_as: ``set`` makes a list of answers one answer; otherwise each of them is correct.
        given: our name -> column of the table, as the user gives them.
        unpacks: whether to write images that the table holds to the image folder.
        allow_text_only: whether rows without an image are usable.

    Raises:
        ValueError: the table cannot be read, or a required column is missing.
    """
    options = survey(_standard_rows(path, given))
    if options.is_unclear:
        raise ValueError(
            f"The answers in {path} are numbers of options, but neither 0 nor the number of the last option occurs, "
            "so they may count from 0 or from 1: write letters (A, B ...) or the texts of the options instead."
        )
    standard = Standard(path, given)
    report = TableReport(path.name)
    parse = partial(
        _parse,
        folder=folder,
        stem=path.stem,
        split=split,
        needs_split=needs_split,
        answers_as=answers_as,
        table=options,
        unpacks=unpacks,
        allow_text_only=allow_text_only,
    )
    reading = read_rows(path, parse, known=KNOWN, prepare=standard, report=report)
    standard.check()
    reading.about.append(standard.about(report) + _about_options(options) + " The images are in the table." * unpacks)
    return reading


def _standard_rows(path: Path, given: Mapping[str, str]) -> Iterator[Fields]:
    """The rows of a table under our names, without unusable ones."""
    standard = Standard(path, given)
    for _, fields in read_table(path, TableReport(path.name)):
        try:
            yield standard(fields)
        except Unusable:
            continue


def _about_options(table: Survey) -> str:
    """Sentences on where the options are and how answers name them, if not as documented for our own columns."""
    text = ""
    if table.in_question:
        text += f" Options are read from the text of {number_of(table.questions, 'question')}."
    elif table.questions:
        text += (
            f" {table.questions:,} of {number_of(table.rows, 'question')} may contain options (A. ... B. ...): they "
            "are not read, because the other questions have none."
        )
    if table.first is not None:
        text += f" Answers are numbers of options, counted from {table.first}."
    return text


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
    table: Survey,
    unpacks: bool,
    allow_text_only: bool,
) -> Row:
    question = without_placeholders(required_text(fields, "question", repairs))
    if not question:
        raise Unusable("empty question")
    if not split and needs_split:
        split = required_text(fields, "split", repairs)
        if split not in SPLITS:
            raise Unusable("unknown split", split)
    cells_of_images = image_cells(fields, repairs, may_lack=allow_text_only)
    images = _find_images(cells_of_images, folder, repairs, unpacks=unpacks)
    answers = [without_point_zero(answer) for answer in read_answers(fields, repairs)]
    cells = option_cells(fields, repairs)
    if found := split_options(question):
        stem_of_question, texts_in_question = found
        if table.in_question:
            cells = list(texts_in_question)
        if [*map(normalise, cells)] == [*map(normalise, texts_in_question)]:
            question = stem_of_question  # the prompt lists the options
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
        answers = [_find_letter(options, answer, repairs, table.first) for answer in answers]
    else:
        if answers_as == "set":
            answers = [", ".join(answers)]
        answers = [text for answer in answers for text in _in_words(answer, question)]
        answer_type = "closed" if kind == "closed" or (not kind and is_yes_no(answers[0])) else "open"
    groups = read_groups(fields, GROUPS, repairs)
    if allow_text_only:
        groups |= {"input": "image" if images else "text"}
    numbers: Repairs = {}  # ids may be numbers
    row_id = without_point_zero(optional_text(fields, "id", numbers)) or str(number)
    column, patient = patient_of(fields)
    patient = clean_text(patient, column, numbers)
    target = fields.get("answer")
    return Row(
        id=f"own/{stem}/{row_id}",
        question=question,
        answer=answers[0],
        answer_type=answer_type,
        options=texts,
        images=images,
        cluster=f"patient {patient}" if patient else cluster_of(images, question),
        split=split,
        groups=groups,
        reasoning=optional_text(fields, "reasoning", repairs)
        or (without_tags(clean_text(target, "answer", {}))[1] if isinstance(target, str) else ""),
        description=optional_text(fields, "description", repairs),
        patient=patient,
        alternatives=distinct(answers[1:], answers[0]),
    )


def cluster_of(images: Sequence[str], question: str) -> str:
    """What keeps rows in one split: the first image, slices of a volume being one; without images, the question."""
    return split_fragment(images[0])[0] if images else f"question {normalise(question)}"


def _find_images(
    cells: Iterable[str | bytes], folder: ImageFolder, repairs: Repairs, *, unpacks: bool
) -> tuple[str, ...]:
    """The paths of a row's images relative to the folder; images that the table holds are written there.

    Raises:
        Unusable: an image is missing, empty or outside the folder, or the table should not hold images.
    """
    paths: list[str] = []
    for cell in cells:
        if isinstance(cell, str):
            paths += find_images([cell], folder, repairs)
        elif unpacks:
            paths.append(store_image(cell, folder.root))
        else:
            raise Unusable("image inside the table, whose first row names a file")
    return tuple(paths)


def _find_letter(options: Options, answer: str, repairs: Repairs, first: int | None) -> str:
    """The letter of the option that an answer names.

    Args:
        first: the number of the first option, if answers are numbers of options.

    Raises:
        Unusable: it names none.
    """
    if first is not None and (number := as_number(answer)) is not None and answer not in options.texts:
        if not first <= number < first + len(options.texts):
            raise Unusable("label outside the options", answer)
        return find_gold(options, LETTERS[number - first], "", repairs)
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
