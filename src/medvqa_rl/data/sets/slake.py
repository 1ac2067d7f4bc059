"""SLAKE (Liu et al. 2021, CC BY 4.0): questions about CT, MRI and X-ray images, in English or in Chinese.

The folder holds train.json, validate.json and test.json, and the images in ``imgs/``. Imports no torch.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    find_images,
    read_groups,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.unpack import unpack_zips
from medvqa_rl.data.splits import Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "val": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
"""File names of each split; the Hub copy has another one for validation."""
ANSWER_TYPES: dict[str, AnswerType] = {"CLOSED": "closed", "OPEN": "open"}
_POLAR = re.compile(r"吗|是否|能否|(.)[不没]\1")
"""Chinese that asks for yes or no: a particle, or a verb beside its negation (是不是). 还是 (or) asks to choose."""
GROUPS = {"modality": "modality", "organ": "location", "family": "content_type"}
KNOWN = {"q_lang", "answer_type", "qid", "img_name", "question", "answer", *GROUPS.values()}
OTHER_LANGUAGE = "question in the other language"


def load_slake(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of ``slake_en`` or ``slake_zh``.

    Each language is a data set of its own: mixing them would put 142 test images into training. Rows of the other
    language are left out first and counted in the notes, but not as dropped. Samples have the groups modality, organ,
    family (the content type) and answer_kind: yes/no if the answer is one of these (:func:`is_yes_no`), or if a closed
    Chinese question asks for one (its answer may be 正常, "normal"), else other.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    language = config.name.removeprefix("slake_")
    root = data_folder(config, "SLAKE", ["*.json", "imgs.zip"])
    if config.hub is not None:
        images = unpack_zips([root / "imgs.zip"], cache_folder(config.cache_dir))
        images = images / "imgs" if (images / "imgs").is_dir() else images
    else:
        images = image_folder(root, config, ("imgs",))
    folder = ImageFolder(images)
    files = {name: [_existing(root, names)] for name, names in FILES.items()}
    split_of_file = {paths[0]: name for name, paths in files.items()}
    source = Source(
        title=f"SLAKE ({language})",
        files=files,
        read=lambda path: read_slake(path, folder, language=language, split=split_of_file[path]),
        images=images,
    )
    return load_split(source, config, split, root)


def _existing(root: Path, names: tuple[str, ...]) -> Path:
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def read_slake(path: Path, folder: ImageFolder, *, language: str, split: Split) -> Reading:
    """Read the rows of one language from one file.

    Raises:
        ValueError: the file is not a JSON list.
    """
    reading = read_rows(
        path, partial(_parse, folder=folder, language=language, split=split), id_column="qid", known=KNOWN
    )
    issues = [issue for issue in reading.issues if issue.reason != OTHER_LANGUAGE]
    others = len(reading.issues) - len(issues)
    reading.issues = issues
    reading.total -= others
    reading.left_out[OTHER_LANGUAGE] = others
    return reading


def _parse(number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, language: str, split: Split) -> Row:
    given = required_text(fields, "q_lang", repairs)
    if given not in ("en", "zh"):
        raise Unusable("unknown q_lang", given)
    if given != language:
        raise Unusable(OTHER_LANGUAGE)
    kind = required_text(fields, "answer_type", repairs)
    answer_type = ANSWER_TYPES.get(kind.upper())
    if answer_type is None:
        raise Unusable("unknown answer_type", kind)
    qid = required_text(fields, "qid", {})  # a number by design, so not a repair
    name = required_text(fields, "img_name", repairs)
    question = required_text(fields, "question", repairs)
    answer = required_text(fields, "answer", repairs)
    is_polar = answer_type == "closed" and "还是" not in question and _POLAR.search(question) is not None
    return Row(
        id=f"slake_{language}/{qid}",
        question=question,
        answer=answer,
        answer_type=answer_type,
        options=(),
        images=find_images([name], folder, repairs),
        cluster=name,
        split=split,
        groups={"answer_kind": "yes/no" if is_polar or is_yes_no(answer) else "other"}
        | read_groups(fields, GROUPS, repairs),
    )
