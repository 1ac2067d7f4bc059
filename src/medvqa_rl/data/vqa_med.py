"""VQA-Med 2019 (Ben Abacha et al., ImageCLEF): questions on modality, plane, organ system and abnormality.

The owners publish text files whose lines are ``image|question|answer`` (training and validation) or
``image|category|question|answer`` (test, with alternatives joined by ``#``), each beside a folder of JPEGs. They are
found below ``data.path`` wherever the archives were unpacked. Imports no torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.data.folder import ImageFolder
from medvqa_rl.data.rows import Reading, Repairs, Row, Unusable, images_of, read_rows, text_of
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import Source, data_folder, load_split
from medvqa_rl.data.tables import Fields
from medvqa_rl.prompts import normalise

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
SUFFIX = ".jpg"


def load_vqa_med(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split. The answer type is ``closed`` where the gold answer is yes or no, otherwise ``open``; test
    questions have the group family, their category.

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
        return read_vqa_med(path, folder, below.relative_to(root).as_posix(), place)

    source = Source(
        title="VQA-Med 2019",
        files=files,
        read=read,
        images=root,
        names={place: f"vqa_med/official/{place}" for place in FILES},
    )
    return load_split(source, config, split, root)


def read_vqa_med(path: Path, folder: ImageFolder, below: str, place: Split) -> Reading:
    """Read one file.

    Args:
        path: the file.
        folder: the data set's folder.
        below: the folder of this split's images, relative to it.
        place: the split, which decides on the columns.

    Raises:
        ValueError: the file cannot be read.
    """
    parse = partial(_parse, folder=folder, below=below, place=place)
    return read_rows(path, parse, columns=COLUMNS[place])


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, below: str, place: Split) -> Row:
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
