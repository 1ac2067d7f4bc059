"""VQA-RAD (Lau et al. 2018, CC0): clinicians' questions about radiology images, in the authors' format.

The folder holds ``VQA_RAD Dataset Public.json`` and the images in ``images/`` (or ``VQA_RAD Image Folder/``, as in the
authors' archive). Imports no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.rows import (
    Reading,
    Repairs,
    Row,
    Unusable,
    find_images,
    is_missing,
    optional_text,
    read_rows,
    required_text,
)
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.splits import Split, connected
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, image_folder, load_split

FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDERS = ("images", "VQA_RAD Image Folder")

ORGANS = {"CHEST": "chest", "ABD": "abdomen", "HEAD": "head"}
REQUIRED = ("qid", "image_name", "question", "answer", "answer_type", "question_type", "image_organ", "phrase_type")
TAG_REPAIRS = {"ATRIB": "ATTRIB", "PRSE": "PRES"}
ANSWER_TYPES: dict[str, AnswerType] = {"closed": "closed", "open": "open"}
PHRASES: dict[str, Split] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
"""Phrase type -> official split."""

log = logging.getLogger(__name__)


def load_vqa_rad(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split.

    The official split is by question, and nearly all test images also occur in training. Its validation split is a
    tenth of the training images. ``data.split: image`` keeps all images of a case together.

    Samples have the groups organ (chest, abdomen, head), family (the sorted tags of the question type, joined by "+")
    and answer_kind (yes/no or other). ``data.families`` keeps rows with any of the given tags.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, "VQA-RAD", [FILE])
    images = image_folder(root, config, IMAGE_FOLDERS)
    source = Source(
        title="VQA-RAD",
        files={"train": [root / FILE], "test": [root / FILE]},
        read=partial(read_vqa_rad, folder=ImageFolder(images)),
        images=images,
        val_from_train=True,
    )
    return load_split(source, config, split, root)


def read_vqa_rad(path: Path, folder: ImageFolder) -> Reading:
    """Read the file.

    Raises:
        ValueError: the file is not a JSON list.
    """
    is_readable = cache(partial(_is_readable, folder.root))
    parse = partial(_parse, folder=folder, is_readable=is_readable)
    # Three rows of the training set repeat others; published counts include them.
    reading = read_rows(path, parse, id_column="qid", known=REQUIRED, keep_repeated=True)
    # A case is named by its first image, which decides its split.
    cases = connected((row.images[0], row.cluster) for row in reading.rows)
    reading.rows = [row._replace(cluster=cases[row.images[0]]) for row in reading.rows]
    return reading


def _parse(
    number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, is_readable: Callable[[str], bool]
) -> Row:
    for name in REQUIRED:
        if is_missing(fields.get(name)):
            raise Unusable(f"no {name}")
    numbers: Repairs = {}  # ids are numbers by design
    qid = required_text(fields, "qid", numbers)
    name, question, answer = (required_text(fields, key, numbers) for key in ("image_name", "question", "answer"))
    kind, phrase, types, organ, url = (
        optional_text(fields, key, numbers)
        for key in ("answer_type", "phrase_type", "question_type", "image_organ", "image_case_url")
    )
    answer_type = ANSWER_TYPES.get(kind.lower())
    if answer_type is None:
        raise Unusable("unknown answer_type", kind)
    if phrase not in PHRASES:
        raise Unusable("unknown phrase_type", phrase)
    (image,) = find_images([name], folder, repairs)
    if not is_readable(image):
        raise Unusable("unreadable image", name)
    tags = [tag.strip().upper() for tag in types.split(",") if tag.strip()]
    if kind != fields["answer_type"]:
        repairs["blanks in answer_type"] = repr(fields["answer_type"])
    if not isinstance(fields["answer"], str):
        repairs["answer that is a number"] = answer
    if not TAG_REPAIRS.keys().isdisjoint(tags):
        repairs["misspelt question_type"] = types
    return Row(
        id=f"vqa_rad/{qid}",
        question=question,
        answer=answer,
        answer_type=answer_type,
        options=(),
        images=(image,),
        cluster=url if url.startswith("http") else image,
        split=PHRASES[phrase],
        groups={
            "organ": ORGANS.get(organ, organ.lower()),
            "family": "+".join(sorted({TAG_REPAIRS.get(tag, tag) for tag in tags})) or "OTHER",
            "answer_kind": "yes/no" if is_yes_no(answer) else "other",
        },
    )


def _is_readable(root: Path, image: str) -> bool:
    """Whether the header of an image can be read; if not, the reason is logged."""
    try:
        FileImage(image, root).check()
    except ValueError as error:
        log.warning("%s", error)
        return False
    return True
