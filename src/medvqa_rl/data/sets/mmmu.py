"""The medical subjects of MMMU (Yue et al. 2024, arXiv 2311.16502) as a test set: questions of college exams with up
to seven images. Imports no torch.

The answers of MMMU's test split are not published, so its validation split, 30 questions for each subject, is the test
set. Images are written once to the cache folder.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.reading.cells import image_cells, name_images, option_cells, read_answers, without_placeholders
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.options import find_gold, read_options
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    distinct,
    optional_text,
    read_groups,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.unpack import store_image, unpacked_images
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, load_split

SUBJECTS = (
    "Basic_Medical_Science",
    "Clinical_Medicine",
    "Diagnostics_and_Laboratory_Medicine",
    "Pharmacy",
    "Public_Health",
)
"""The discipline "Health and Medicine"."""
GROUPS = {"subfield": "subfield", "difficulty": "topic_difficulty"}
IMAGES = tuple(f"image_{number}" for number in range(1, 8))
KNOWN = {"id", "question", "options", "answer", "question_type", "explanation", *IMAGES, *GROUPS.values()}


def load_mmmu(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. All questions are test questions; ``data.split: image`` makes the other splits.

    Reads ``SUBJECT/validation-*.parquet``. Samples have the groups family (the subject), subfield and difficulty.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "MMMU", [f"{subject}/validation-*.parquet" for subject in SUBJECTS])
    files = [path for subject in SUBJECTS for path in sorted((root / subject).glob("validation-*.parquet"))]
    cache_dir = cache_folder(config.cache_dir)
    images = unpacked_images(cache_dir, config.name)

    def read(path: Path) -> Reading:
        reader = partial(read_mmmu, path, images)
        return read_indexed(path, ImageFolder(images), config.name, reader, cache_dir, is_shared=True)

    source = Source("MMMU", {"test": files}, read, images)
    return load_split(source, config, split, root)


def read_mmmu(path: Path, images: Path) -> Reading:
    """Read the file of one subject and unpack its images.

    Raises:
        ValueError: the file is not parquet with these columns, or pyarrow is not installed.
    """
    parse = partial(_parse, images=images, subject=path.parent.name)
    required = ("id", "question", "options", "answer", "question_type", "image_1")
    return read_rows(path, parse, file=f"{path.parent.name}/{path.name}", required=required, known=KNOWN)


def _parse(number: int, fields: Fields, repairs: Repairs, *, images: Path, subject: str) -> Row:
    question = without_placeholders(required_text(fields, "question", repairs))
    cells = image_cells(fields, repairs)
    if not all(isinstance(cell, bytes) for cell in cells):
        raise Unusable("no image")
    options: tuple[str, ...] = ()
    if required_text(fields, "question_type", repairs) == "multiple-choice":
        read = read_options([name_images(text) for text in option_cells(fields, repairs)], repairs)
        options = read.texts
        answers = [find_gold(read, required_text(fields, "answer", repairs), "", repairs)]
    else:
        answers = read_answers(fields, repairs)
    if answers == ["?"]:
        raise Unusable("answer is not published")
    answer_type: AnswerType = "choice" if options else "closed" if is_yes_no(answers[0]) else "open"
    names = tuple(store_image(cell, images) for cell in cells if isinstance(cell, bytes))
    return Row(
        id=f"mmmu/{required_text(fields, 'id', repairs)}",
        question=question,
        answer=answers[0],
        answer_type=answer_type,
        options=options,
        images=names,
        cluster=names[0],
        split="test",
        groups={"family": subject, **read_groups(fields, GROUPS, repairs)},
        reasoning=optional_text(fields, "explanation", repairs),
        alternatives=distinct(answers[1:], answers[0]),
    )
