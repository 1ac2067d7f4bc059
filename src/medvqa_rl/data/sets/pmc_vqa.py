"""PMC-VQA (Zhang et al. 2023): multiple-choice questions about figures of articles, in CSV files of two versions.

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
from medvqa_rl.data.reading.options import QUOTES, find_gold, read_options, strip_quotes
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, find_images, optional_text, read_rows, required_text
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.unpack import unpack_zips
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

FILES = {"v1": ("train", "test"), "v1_clean": ("train", "test_clean"), "v2": ("train_2", "test_2")}
"""Variant -> stems of the training and the test file."""
IMAGE_FOLDERS = {
    "v1": ("images",),
    "v1_clean": ("images",),
    "v2": ("figures", "images_2/figures", "images_2", "images"),
}
ARCHIVES = {"v1": "images.zip", "v1_clean": "images.zip", "v2": "images_2.zip"}
CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
REQUIRED = ("Figure_path", "Question", "Answer", *CHOICES)


def load_pmc_vqa(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of the files of ``data.variant``.

    A tenth of the articles of the training file becomes the validation split, because there is no official one; all
    figures of an article stay together. Options keep their published order, whose gold letters are skewed.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    variant = config.variant
    train, test = FILES[variant]
    archive = ARCHIVES[variant]
    root = data_folder(config, "PMC-VQA", [f"{train}.csv", f"{test}.csv", archive])
    cache_dir = cache_folder(config.cache_dir)
    if config.hub is not None:
        images = image_folder(unpack_zips([root / archive], cache_dir), config, (*IMAGE_FOLDERS[variant], ""))
    else:
        images = image_folder(root, config, IMAGE_FOLDERS[variant])
    folder = ImageFolder(images)

    def read(path: Path) -> Reading:
        return read_indexed(path, folder, "pmc_vqa", partial(read_pmc_vqa, path, folder), cache_dir)

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
    """Read one CSV file of either version.

    Raises:
        ValueError: the file is not CSV with the columns of PMC-VQA.
    """
    split: Split = "train" if path.stem.startswith("train") else "test"
    return read_rows(
        path,
        partial(_parse, folder=folder, stem=path.stem, split=split),
        required=REQUIRED,
        known={*REQUIRED, "Answer_label"},
    )


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, stem: str, split: Split) -> Row:
    figure = required_text(fields, "Figure_path", repairs)
    question = required_text(fields, "Question", repairs)
    if len(question) > 2 and question[0] == question[-1] and question[0] in "\"'" and question.count(question[0]) == 2:
        repairs["quotes around the question removed"] = question
        question = question[1:-1].strip()
    elif (stripped := strip_quotes(question)) != question:
        repairs[QUOTES] = question
        question = stripped
    options = read_options([optional_text(fields, name, repairs) for name in CHOICES], repairs)
    answer = required_text(fields, "Answer", repairs)
    if "Answer_label" in fields:
        gold = find_gold(options, optional_text(fields, "Answer_label", repairs), answer, repairs)
    else:  # version 2: the answer is a letter
        gold = find_gold(options, answer, "", repairs)
    return Row(
        id=f"pmc_vqa/{stem}/{number}",
        question=question,
        answer=gold,
        answer_type="choice",
        options=options.texts,
        images=find_images([figure], folder, repairs),
        cluster=figure.split("_")[0],
        split=split,
        groups={},
    )
