"""PMC-VQA (Zhang et al. 2023): choice questions about figures of articles, in the CSV files of both versions.

Version 1 has train.csv, test.csv and test_clean.csv (the answer as text, its letter as ``Answer_label``) with
``images/``. Version 2 has train_2.csv and test_2.csv (the answer as a letter) with ``figures/``. Imports no torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    find_gold,
    images_of,
    optional_text,
    read_options,
    read_rows,
    strip_quotes,
    text_of,
)
from medvqa_rl.data.reading.tables import Fields
from medvqa_rl.data.reading.unpack import unpack_zips
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import Source, data_folder, image_folder, load_split

FILES = {"v1": ("train", "test"), "v1_clean": ("train", "test_clean"), "v2": ("train_2", "test_2")}
"""Variant -> stems of the training and the test file."""
IMAGE_FOLDERS = {
    "v1": ("images",),
    "v1_clean": ("images",),
    "v2": ("figures", "images_2/figures", "images_2", "images"),
}
ARCHIVES = {"v1": ("images.zip",), "v1_clean": ("images.zip",), "v2": ("images_2.zip",)}
CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
REQUIRED = ("Figure_path", "Question", "Answer", *CHOICES)


def load_pmc_vqa(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of the files that ``data.variant`` names.

    There is no official validation split: a tenth of the articles of the training file becomes one, so that a figure
    and its neighbours in the same article stay together. Nor is there an official subset: ``data.num_train`` and the
    like choose one by ``data.seed``, and the notes name it by a hash of its ids. Options keep their published order,
    skewed letters included.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    variant = config.variant
    train, test = FILES[variant]
    root = data_folder(config, "PMC-VQA", [f"{train}.csv", f"{test}.csv", *ARCHIVES[variant]])
    if config.hub is not None:
        images = unpack_zips([root / name for name in ARCHIVES[variant]], cache_folder(config.cache_dir))
        images = next((images / name for name in IMAGE_FOLDERS[variant] if (images / name).is_dir()), images)
    else:
        images = image_folder(root, config, IMAGE_FOLDERS[variant])
    folder = ImageFolder(images)

    def read(path: Path) -> Reading:
        return read_indexed(
            path, folder, "pmc_vqa", partial(read_pmc_vqa, path, folder), cache_folder(config.cache_dir)
        )

    source = Source(
        title="PMC-VQA",
        files={"train": [root / f"{train}.csv"], "test": [root / f"{test}.csv"]},
        read=read,
        images=images,
        names={"train": f"pmc_vqa/{train}/train", "val": f"pmc_vqa/{train}/val", "test": f"pmc_vqa/{test}/test"},
        val_from_train=True,
    )
    return load_split(source, config, split, root)


def read_pmc_vqa(path: Path, folder: ImageFolder) -> Reading:
    """Read one of the CSV files.

    Raises:
        ValueError: it is not CSV with the columns of PMC-VQA.
    """
    place = "train" if path.stem.startswith("train") else "test"

    def parse(number: int, fields: Fields, repairs: Repairs) -> Row:
        return parse_row(fields, folder, id=f"pmc_vqa/{path.stem}/{number}", place=place, repairs=repairs)

    return read_rows(path, parse, required=REQUIRED)


def parse_row(fields: Fields, folder: ImageFolder, *, id: str, place: str, repairs: Repairs) -> Row:
    """Read one row of either version.

    The gold option is the one that letter and text agree on (:func:`find_gold`); version 2 has
    the letter only.

    Raises:
        Unusable: the row cannot be used.
    """
    figure = text_of(fields, "Figure_path", repairs)
    question = text_of(fields, "Question", repairs)
    if len(question) > 2 and question[0] == question[-1] and question[0] in "\"'" and question.count(question[0]) == 2:
        repairs["quotes around the question removed"] = question
        question = question[1:-1].strip()
    elif (stripped := strip_quotes(question)) != question:
        repairs["stray quotes removed"] = question
        question = stripped
    options = read_options([optional_text(fields, name, repairs) for name in CHOICES], repairs)
    answer = text_of(fields, "Answer", repairs)
    if "Answer_label" in fields:
        gold = find_gold(options, optional_text(fields, "Answer_label", repairs), answer, repairs)
    else:
        gold = find_gold(options, answer, "", repairs)
    images = images_of([figure], folder, repairs)
    return Row(
        id=id,
        question=question,
        answer=gold,
        answer_type="choice",
        options=options.texts,
        images=images,
        together=figure.split("_")[0],
        place=place,
        groups={},
    )
