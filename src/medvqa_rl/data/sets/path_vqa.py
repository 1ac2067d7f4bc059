"""Path-VQA (He et al. 2020) and the Hub copy of VQA-RAD: parquet files with the columns image, question and answer,
where image holds the bytes of an image file. Imports no torch.

Each distinct image is written once to the cache folder and named by the hash of its bytes, so that questions about the
same image share its name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import is_yes_no
from medvqa_rl.data.reading.folder import EMPTY, MISSING, ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, Unusable, read_rows, required_text
from medvqa_rl.data.reading.sheets import Fields
from medvqa_rl.data.reading.unpack import store_image, unpacked_images
from medvqa_rl.data.splits import SPLITS, Split
from medvqa_rl.data.stored import Source, StoredDataset, data_folder, load_split

TITLES = {"path_vqa": "Path-VQA", "vqa_rad_hub": "VQA-RAD (Hub copy)"}
REQUIRED = ("image", "question", "answer")


def load_image_parquet(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of ``path_vqa`` or ``vqa_rad_hub``.

    Files are found by name (``train-00000-of-00003.parquet``) in the folder or its ``data/``. Answers have no
    annotated type: yes and no are ``closed``, others ``open``. The type groups results but never changes a prompt.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    title = TITLES[config.name]
    root = data_folder(config, title, ["data/*.parquet", "*.parquet"])
    found = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    files: dict[Split, list[Path]] = {name: [path for path in found if path.name.startswith(name)] for name in SPLITS}
    if not any(files.values()):
        raise ValueError(
            f"There is no parquet file in {root} or {root / 'data'} whose name begins with train, val or test: set "
            f"data.path to the folder of {title}."
        )
    cache_dir = cache_folder(config.cache_dir)
    images = unpacked_images(cache_dir, config.name)
    split_of_file = {path: name for name, paths in files.items() for path in paths}

    def read(path: Path) -> Reading:
        reader = partial(read_image_parquet, path, images, dataset=config.name, split=split_of_file[path])
        return read_indexed(path, ImageFolder(images), config.name, reader, cache_dir, is_shared=True)

    source = Source(title, files, read, images, val_from_train=not files["val"])
    return load_split(source, config, split, root)


def read_image_parquet(path: Path, images: Path, *, dataset: str, split: Split) -> Reading:
    """Read one file and unpack its images.

    Raises:
        ValueError: the file is not parquet with these columns, or pyarrow is not installed.
    """
    parse = partial(_parse, images=images, stem=f"{dataset}/{path.stem}", split=split)
    return read_rows(path, parse, required=REQUIRED, known=REQUIRED)


def _parse(number: int, fields: Fields, repairs: Repairs, *, images: Path, stem: str, split: Split) -> Row:
    question = required_text(fields, "question", repairs)
    answer = required_text(fields, "answer", repairs)
    image = fields["image"]
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise Unusable(MISSING, "no bytes in the column image")
    if not data:
        raise Unusable(EMPTY)
    name = store_image(data, images)
    return Row(
        id=f"{stem}/{number}",
        question=question,
        answer=answer,
        answer_type="closed" if is_yes_no(answer) else "open",
        options=(),
        images=(name,),
        cluster=name,
        split=split,
        groups={"answer_kind": "yes/no" if is_yes_no(answer) else "other"},
    )
