"""SLAKE (Liu et al. 2021, CC BY 4.0): questions about CT, MRI and X-ray images, in English or in Chinese.

The folder holds train.json, validate.json and test.json, and the images in ``imgs/``. Imports no torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import normalise
from medvqa_rl.core.types import AnswerType
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, Unusable, images_of, optional_text, read_rows, text_of
from medvqa_rl.data.reading.tables import Fields
from medvqa_rl.data.reading.unpack import unpack_zips
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import Source, data_folder, image_folder, load_split

FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "val": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
"""Names of the files of each split; the Hub copy calls one of them differently."""
ANSWER_TYPES: dict[str, AnswerType] = {"CLOSED": "closed", "OPEN": "open"}
YES_NO = ("yes", "no", "是", "否", "不是")
OTHER_LANGUAGE = "question in the other language"


def load_slake(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of ``slake_en`` or ``slake_zh``.

    Rows of the other language are left out before anything else and counted in the notes; they are not dropped rows,
    because each language is a data set of its own. Mixing the two would put 142 test images into training. Samples
    have the groups modality, organ, family (the content type) and answer_kind (yes/no or other).

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
    files = {place: [_existing(root, names)] for place, names in FILES.items()}
    places: dict[str, Split] = {paths[0].name: place for place, paths in files.items()}
    source = Source(
        title=f"SLAKE ({language})",
        files=files,
        read=lambda path: read_slake(path, folder, language=language, place=places[path.name]),
        images=images,
        names={place: f"slake_{language}/official/{place}" for place in FILES},
    )
    return load_split(source, config, split, root)


def _existing(root: Path, names: tuple[str, ...]) -> Path:
    return next((root / name for name in names if (root / name).is_file()), root / names[0])


def read_slake(path: Path, folder: ImageFolder, *, language: str, place: str) -> Reading:
    """Read the rows of one language of one file.

    Raises:
        ValueError: the file is not a JSON list.
    """
    ids: set[str] = set()
    parse = partial(_parse, folder=folder, language=language, place=place, ids=ids)
    reading = read_rows(path, parse)
    others = [issue for issue in reading.issues if issue.reason == OTHER_LANGUAGE]
    reading.issues = [issue for issue in reading.issues if issue.reason != OTHER_LANGUAGE]
    reading.total -= len(others)
    reading.left_out[OTHER_LANGUAGE] = len(others)
    return reading


def _parse(
    number: int, fields: Fields, repairs: Repairs, *, folder: ImageFolder, language: str, place: str, ids: set[str]
) -> Row:
    given = text_of(fields, "q_lang", repairs)
    if given not in ("en", "zh"):
        raise Unusable("unknown q_lang", given)
    if given != language:
        raise Unusable(OTHER_LANGUAGE)
    kind = text_of(fields, "answer_type", repairs)
    answer_type = ANSWER_TYPES.get(kind.upper())
    if answer_type is None:
        raise Unusable("unknown answer_type", kind)
    number_repairs: Repairs = {}  # qid is a number by design
    qid = text_of(fields, "qid", number_repairs)
    name = text_of(fields, "img_name", repairs)
    answer = text_of(fields, "answer", repairs)
    row = Row(
        id=f"slake_{language}/{qid}",
        question=text_of(fields, "question", repairs),
        answer=answer,
        answer_type=answer_type,
        options=(),
        images=images_of([name], folder, repairs),
        together=name,
        place=place,
        groups={"answer_kind": "yes/no" if normalise(answer) in YES_NO else "other"}
        | {
            group: text
            for group, column in (("modality", "modality"), ("organ", "location"), ("family", "content_type"))
            if (text := optional_text(fields, column, repairs))
        },
    )
    if qid in ids:
        raise Unusable("repeated qid", qid)
    ids.add(qid)
    return row
