"""VQA-Med 2019 (Ben Abacha et al., ImageCLEF): questions on modality, plane, organ system and abnormality.

The owners publish text files whose lines are ``image|question|answer`` (training and validation) or
``image|category|question|answer`` (test, with alternatives joined by ``#``), each beside a folder of JPEGs. The
questions of training and validation come a second time in ``QAPairsByCategory``, one file for each category
(``C1_Modality_train.txt``), which is where their categories are taken from. All are found below ``data.path`` wherever
the archives were unpacked. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.text import normalise
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, Unusable, images_of, read_rows, text_of
from medvqa_rl.data.reading.tables import Fields, Report, read_table
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import Source, data_folder, load_split

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
CATEGORIES: dict[str, str] = {
    "C1_Modality": "modality",
    "C2_Plane": "plane",
    "C3_Organ": "organ",
    "C4_Abnormality": "abnormality",
}
"""Begin of the name of a file by category -> the name of the category, as the test file writes it."""
SUFFIX = ".jpg"

QuestionKey = tuple[str, ...]
"""Image, question and answer."""


def load_vqa_med(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. The answer type is ``closed`` where the gold answer is yes or no, otherwise ``open``. The group
    family is the category: modality, plane, organ or abnormality; without the files by category, training and
    validation questions have none.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "VQA-Med 2019", ["**"])
    files = {place: sorted(root.rglob(name))[:1] for place, name in FILES.items()}
    if not any(files.values()):
        raise ValueError(
            f"There is none of the files {', '.join(FILES.values())} in {root} or below: set data.path to the folder "
            "of VQA-Med 2019, with its archives unpacked."
        )
    places: dict[str, Split] = {name: place for place, name in FILES.items()}
    folder = ImageFolder(root)

    def read(path: Path) -> Reading:
        place = places[path.name]
        below = next((found for found in sorted(root.rglob(IMAGE_FOLDERS[place])) if found.is_dir()), None)
        if below is None:
            raise ValueError(
                f"There is no folder {IMAGE_FOLDERS[place]!r} in {root} or below: unpack the images of VQA-Med 2019."
            )
        return read_vqa_med(path, folder, below.relative_to(root).as_posix(), place, read_categories(root, place))

    source = Source(
        title="VQA-Med 2019",
        files=files,
        read=read,
        images=root,
        names={place: f"vqa_med/official/{place}" for place in FILES},
    )
    return load_split(source, config, split, root)


def read_categories(root: Path, place: Split) -> dict[QuestionKey, str]:
    """The category of every question in the files by category; a question that is in several has none.

    Raises:
        ValueError: a file cannot be read.
    """
    found: dict[QuestionKey, str] = {}
    ambiguous: set[QuestionKey] = set()
    for begin, category in CATEGORIES.items() if place != "test" else ():
        for path in sorted(root.rglob(f"{begin}_{place}.txt"))[:1]:
            # What is wrong with a line is told where the question itself is read.
            for _, fields in read_table(path, Report(path.name), columns=COLUMNS[place]):
                key = _question_key(fields)
                if found.setdefault(key, category) != category:
                    ambiguous.add(key)
    return {key: category for key, category in found.items() if key not in ambiguous}


def _question_key(fields: Fields) -> QuestionKey:
    return tuple(" ".join(str(fields[name]).split()) for name in ("image", "question", "answer"))


def read_vqa_med(
    path: Path, folder: ImageFolder, below: str, place: Split, categories: Mapping[QuestionKey, str]
) -> Reading:
    """Read one file.

    Args:
        path: the file.
        folder: the data set's folder.
        below: the folder of this split's images, relative to it.
        place: the split, which decides on the columns.
        categories: of the questions, where the file does not name them.

    Raises:
        ValueError: the file cannot be read.
    """
    parse = partial(_parse, folder=folder, below=below, place=place, categories=categories)
    return read_rows(path, parse, columns=COLUMNS[place])


def _parse(
    number: int,
    fields: Fields,
    repairs: Repairs,
    *,
    folder: ImageFolder,
    below: str,
    place: Split,
    categories: Mapping[QuestionKey, str],
) -> Row:
    name = text_of(fields, "image", repairs)
    question = text_of(fields, "question", repairs)
    answer = text_of(fields, "answer", repairs)
    if "#" in answer:
        alternatives = [part.strip() for part in answer.split("#") if part.strip()]
        if not alternatives:
            raise Unusable("empty answer", answer)
        repairs["several reference answers, the first counts"] = answer
        answer = alternatives[0]
    images = images_of([f"{below}/{name}{'' if name.endswith(SUFFIX) else SUFFIX}"], folder, repairs)
    is_binary = normalise(answer) in ("yes", "no")
    groups = {"answer_kind": "yes/no" if is_binary else "other"}
    if "category" in fields:
        groups["family"] = text_of(fields, "category", repairs)
    elif categories:
        category = categories.get(_question_key(fields))
        if category is None:
            repairs["in no file by category, or in several: no family"] = question
        else:
            groups["family"] = category
    return Row(
        id=f"vqa_med/{place}/{number}",
        question=question,
        answer=answer,
        answer_type="closed" if is_binary else "open",
        options=(),
        images=images,
        together=name,
        place=place,
        groups=groups,
    )
