"""Path-VQA (He et al. 2020) and other data sets in the form of the Hub copies: parquet files with the columns image,
question and answer, the image as bytes. Imports no torch.

Each distinct image is put into the cache folder once, named by the hash of its bytes, so that questions about the
same image share its name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import cache_folder
from medvqa_rl.core.text import normalise
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.index import read_indexed
from medvqa_rl.data.reading.rows import Reading, Repairs, Row, Unusable, read_rows, text_of
from medvqa_rl.data.reading.tables import Fields
from medvqa_rl.data.reading.unpack import store_image
from medvqa_rl.data.splits import Split, StoredDataset
from medvqa_rl.data.stored import SPLITS, Source, data_folder, load_split

TITLES = {"path_vqa": "Path-VQA", "vqa_rad_hub": "VQA-RAD (Hub copy)"}
REQUIRED = ("image", "question", "answer")


def load_image_parquet(config: DataConfig, split: Split) -> StoredDataset:
    """Load one split of ``path_vqa`` or ``vqa_rad_hub``.

    Files are found by their names (``train-00000-of-00003.parquet``), in the folder or in its ``data/``. The answer
    type is ``closed`` where the gold answer is yes or no and ``open`` otherwise: these copies have no annotation of
    it. It groups results and never changes a prompt.

    Raises:
        ValueError: see :func:`medvqa_rl.data.stored.load_split`.
    """
    root = data_folder(config, TITLES[config.name], ["data/*.parquet", "*.parquet"])
    found = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    files: dict[Split, list[Path]] = {name: [] for name in SPLITS}
    for path in found:
        for name in SPLITS:
            if path.name.startswith(name):
                files[name].append(path)
    if not any(files.values()):
        raise ValueError(
            f"There is no parquet file in {root} or {root / 'data'} whose name begins with train, val or test: set "
            f"data.path to the folder of {TITLES[config.name]}."
        )
    cache_dir = cache_folder(config.cache_dir)
    images = cache_dir / "images" / config.name
    try:
        images.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder {images} for unpacked images cannot be made ({error}): set data.cache_dir to one that can."
        ) from error
    places = {path: name for name, paths in files.items() for path in paths}

    def read(path: Path) -> Reading:
        reader = partial(read_image_parquet, path, images, dataset=config.name, place=places[path])
        return read_indexed(path, ImageFolder(images), config.name, reader, cache_dir, is_shared=True)

    source = Source(
        title=TITLES[config.name],
        files=files,
        read=read,
        images=images,
        names={name: f"{config.name}/official/{name}" for name in SPLITS},
        val_from_train=not files["val"],
    )
    return load_split(source, config, split, root)


def read_image_parquet(path: Path, images: Path, *, dataset: str, place: str) -> Reading:
    """Read one file and unpack its images.

    Raises:
        ValueError: the file is not parquet with these columns, or pyarrow is missing.
    """
    parse = partial(_parse, images=images, stem=f"{dataset}/{path.stem}", place=place)
    return read_rows(path, parse, required=REQUIRED)


def _parse(number: int, fields: Fields, repairs: Repairs, *, images: Path, stem: str, place: str) -> Row:
    question = text_of(fields, "question", repairs)
    answer = text_of(fields, "answer", repairs)
    image = fields["image"]
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
        raise Unusable("missing image", "no bytes in the column image")
    if not data:
        raise Unusable("empty image file")
    name = store_image(data, images)
    is_binary = normalise(answer) in ("yes", "no")
    return Row(
        id=f"{stem}/{number}",
        question=question,
        answer=answer,
        answer_type="closed" if is_binary else "open",
        options=(),
        images=(name,),
        together=name,
        place=place,
        groups={"answer_kind": "yes/no" if is_binary else "other"},
    )
