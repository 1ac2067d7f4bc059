"""VQA-Med 2019 (Ben Abacha et al., ImageCLEF): questions on modality, plane, organ system and abnormality.

The archives hold text files with a folder of JPEGs beside each. Lines are ``image|question|answer`` (training and
validation) or ``image|category|question|answer`` (test, with alternative answers joined by ``#``). The categories of
training and validation questions come from ``QAPairsByCategory``, which repeats them in one file per category
(``C1_Modality_train.txt``). Files are found anywhere below ``data.path``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.issues import TableReport
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    distinct,
    find_images,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.tables import read_table
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, load_split

FILES: dict[Split, str] = {
    "train": "All_QA_Pairs_train.txt",
    "val": "All_QA_Pairs_val.txt",
    "test": "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
}
COLUMNS: dict[Split, tuple[str, ...]] = {
    "train": ("image", "question", "answer"),
    "val": ("image", "question", "answer"),
    "test": ("image", "category", "question", "answer"),
}
IMAGE_FOLDERS: dict[Split, str] = {"train": "Train_images", "val": "Val_images", "test": "VQAMed2019_Test_Images"}
CATEGORIES = {
    "C1_Modality": "modality",
    "C2_Plane": "plane",
    "C3_Organ": "organ",
    "C4_Abnormality": "abnormality",
}
"""Start of a file name in ``QAPairsByCategory`` -> the category, as in the test file."""
SUFFIX = ".jpg"

QuestionKey = tuple[str, ...]
"""Image, question and answer."""


def load_vqa_med(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split.

    The answer type is ``closed`` if the gold answer is yes or no, else ``open``. The group family is the category:
    modality, plane, organ or abnormality. Training and validation questions have none without ``QAPairsByCategory``.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "VQA-Med 2019", ["**"])
    files = {name: sorted(root.rglob(file))[:1] for name, file in FILES.items()}
    if not any(files.values()):
        raise ValueError(
            f"There is none of the files {', '.join(FILES.values())} in {root} or below: set data.path to the folder "
            "of VQA-Med 2019, with its archives unpacked."
        )
    split_of_file: dict[str, Split] = {file: name for name, file in FILES.items()}
    folder = ImageFolder(root)

    def read(path: Path) -> Reading:
        file_split = split_of_file[path.name]
        images = next((found for found in sorted(root.rglob(IMAGE_FOLDERS[file_split])) if found.is_dir()), None)
        if images is None:
            raise ValueError(
                f"There is no folder {IMAGE_FOLDERS[file_split]!r} in {root} or below: unpack the images of "
                "VQA-Med 2019."
            )
        below = images.relative_to(root).as_posix()
        return read_vqa_med(path, folder, below, file_split, read_categories(root, file_split))

    return load_split(Source("VQA-Med 2019", files, read, root), config, split, root)


def read_categories(root: Path, split: Split) -> dict[QuestionKey, str]:
    """Read the category of every question from the files of ``QAPairsByCategory``, except questions in several files.

    Raises:
        ValueError: a file cannot be read.
    """
    if split == "test":
        return {}
    found: dict[QuestionKey, str] = {}
    ambiguous: set[QuestionKey] = set()
    for start, category in CATEGORIES.items():
        for path in sorted(root.rglob(f"{start}_{split}.txt"))[:1]:
            # Bad lines are reported when the questions themselves are read.
            for _, fields in read_table(path, TableReport(path.name), columns=COLUMNS[split]):
                key = _question_key(fields)
                if found.setdefault(key, category) != category:
                    ambiguous.add(key)
    return {key: category for key, category in found.items() if key not in ambiguous}


def _question_key(fields: Fields) -> QuestionKey:
    return tuple(" ".join(str(fields[name]).split()) for name in ("image", "question", "answer"))


def read_vqa_med(
    path: Path, folder: ImageFolder, below: str, split: Split, categories: Mapping[QuestionKey, str]
) -> Reading:
    """Read one file.

    Args:
        path: the file.
        folder: the data set's folder.
        below: folder of this split's images, relative to ``folder``.
        split: the split, which determines the columns.
        categories: from :func:`read_categories`.

    Raises:
        ValueError: the file cannot be read.
    """
    parse = partial(_parse, folder=folder, below=below, split=split, categories=categories)
    return read_rows(path, parse, columns=COLUMNS[split], known=COLUMNS[split])


def _parse(
    number: int,
    fields: Fields,
    repairs: Repairs,
    *,
    folder: ImageFolder,
    below: str,
    split: Split,
    categories: Mapping[QuestionKey, str],
) -> Row:
    name = required_text(fields, "image", repairs)
    question = required_text(fields, "question", repairs)
    answer = required_text(fields, "answer", repairs)
    answer, *alternatives = [part.strip() for part in answer.split("#") if part.strip()] or [""]
    if not answer:
        raise Unusable("empty answer", "#")
    images = find_images([f"{below}/{name.removesuffix(SUFFIX)}{SUFFIX}"], folder, repairs)
    groups = {"answer_kind": "yes/no" if is_yes_no(answer) else "other"}
    if "category" in fields:
        groups["family"] = required_text(fields, "category", repairs)
    elif category := categories.get(_question_key(fields)):
        groups["family"] = category
    elif categories:
        repairs["in no file by category, or in several: no family"] = question
    return Row(
        id=f"vqa_med/{split}/{number}",
        question=question,
        answer=answer,
        answer_type="closed" if is_yes_no(answer) else "open",
        options=(),
        images=images,
        cluster=name,
        split=split,
        groups=groups,
        alternatives=distinct(alternatives, answer),
    )
