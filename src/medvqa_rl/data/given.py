"""Samples and records that a program holds in memory, stored as the user's own data (:mod:`medvqa_rl.data.sets.own`).

A run then explains itself: its folder has every question and image, the checks of own data apply, and the command line
can resume and evaluate it. Imports no torch.

```text
data.jsonl    the records as given, with a column ``split``; images are names of files
images/       images by the hash of their file, so that equal ones are one; Pillow images become PNG files
```
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.files import write_text, write_whole
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import Sample
from medvqa_rl.data.images.files import FileImage, to_rgb
from medvqa_rl.data.images.windowing import medical_kind, split_fragment
from medvqa_rl.data.reading.cells import image_cells
from medvqa_rl.data.reading.columns import AmbiguousColumns, folded, standard_names
from medvqa_rl.data.reading.rows import Unusable
from medvqa_rl.data.reading.unpack import name_of
from medvqa_rl.data.splits import Split

TABLE = "data.jsonl"
ARGUMENTS: Mapping[Split, str] = {"train": "train_dataset", "val": "eval_dataset", "test": "dataset"}
"""The argument of the Python interface that holds the records of a split."""
Record = dict[str, Any]


def store(given: Mapping[Split, Iterable[object]], folder: Path, config: DataConfig, *, resume: bool = False) -> None:
    """Store the records of one or several splits in a folder.

    Args:
        given: by split, samples, or dicts with the columns of own data (docs/data.md) or those of another tool that is
            recognised. An image is a Pillow image, the path or the bytes of a file, or what ``datasets`` makes of one.
        folder: a new folder, or that of the run which is resumed.
        config: ``columns`` and ``answers_as`` say how the records are read.
        resume: the folder must hold the same records.

    Raises:
        ValueError: an argument holds no records, an image cannot be decoded, or resumed records differ.
    """
    images = _Images(folder / "images")
    rows: list[Record] = []
    for split, records in given.items():
        for index, record in enumerate(_each(records, ARGUMENTS[split])):
            try:
                rows.append(_row(record, images, config) | {"split": split})
            except ValueError as error:
                raise ValueError(f"{ARGUMENTS[split]}[{index}] cannot be used. {error}") from error
    table = "".join(json.dumps(row) + "\n" for row in _with_own_ids(rows))
    path = folder / TABLE
    if not (resume and path.is_file()):
        write_text(path, table)
    elif path.read_text(encoding="utf-8") != table:
        raise ValueError(
            f"The data given is not that of the run, which is stored in {path}: give the same samples in the same "
            "order, or none to take those that are stored."
        )


def stored(folder: Path, config: DataConfig) -> DataConfig:
    """The settings that read what :func:`store` wrote, without those of other data sets. All of it is used, unless
    ``num_val`` and so on are set."""
    defaults = DataConfig()
    all_of_it = {name: None for name in ("num_train", "num_val", "num_test") if name not in config.model_fields_set}
    of_others = ["hub", "revision", "variant", "split", "scanner", "home_share", "modalities"]
    of_others += ["letter_skew", "reasoning"]
    return config.model_copy(
        update={
            **{name: getattr(defaults, name) for name in of_others},
            **{"name": "own", "path": str(folder), "image_folder": "images"},
            **all_of_it,
        }
    )


def is_stored(folder: Path) -> bool:
    """Whether a folder holds records that :func:`store` wrote."""
    return (folder / TABLE).is_file()


def shared_images(first: Path, first_split: str, second: Path, second_split: str) -> str:
    """A sentence if images of a split in a folder are those of another, by content; empty if there are none."""
    if not (is_stored(first) and is_stored(second)):
        return ""
    others = _images_of(second, second_split)
    shared = _images_of(first, first_split) & others
    if not shared:
        return ""
    return (
        f"{len(shared)} of {number_of(len(others), 'image')} of the evaluation are also trained on: its accuracy says "
        "little about new images."
    )


def _images_of(folder: Path, split: str) -> set[str]:
    """The names of a split's images."""
    names = {path.name for path in (folder / "images").iterdir()}
    lines = (folder / TABLE).read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines if (row := json.loads(line))["split"] == split]
    return {name for row in rows for text in _texts(row) if (name := split_fragment(text)[0]) in names}


def digest(folder: Path) -> str:
    """Identify stored records by their content, images included: 12 hexadecimal digits of SHA-256."""
    return hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()[:12]


def _texts(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _each(records: Any, argument: str) -> Iterator[object]:
    """The records of an argument.

    Raises:
        ValueError: it is not a list of records, endless or empty.
    """
    wanted = "a list of Samples or of dicts with image, question and answer, or one split of a Hugging Face dataset"
    if getattr(records, "is_endless", False):
        raise ValueError(f"{argument} is endless: give a part of it, or set data.name in the config instead.")
    if type(records).__name__ == "DataFrame" and hasattr(records, "to_dict"):
        records = records.to_dict("records")
    has_rows = isinstance(records, Iterable) or hasattr(records, "__getitem__")
    if not has_rows or isinstance(records, str | bytes | PathLike | Mapping):
        raise ValueError(f"{argument} is a {type(records).__name__}, but must be {wanted}.")
    is_empty = True
    for record in records:
        is_empty = False
        yield record
    if is_empty:
        raise ValueError(f"{argument} is empty, but must be {wanted}.")


def _row(record: object, images: _Images, config: DataConfig) -> Record:
    """A sample or record as JSON values, with the names of stored images."""
    if isinstance(record, Sample):
        if record.answers_as != config.answers_as and record.answer_type != "choice":
            raise ValueError(
                f"Its answer is to be compared as a {record.answers_as}, but data.answers_as is {config.answers_as}: "
                f"set data.answers_as to {record.answers_as}."
            )
        found = {
            **_plain({**record.columns, **record.groups}, None),
            "id": record.id,
            "images": [images.keep(image) for image in record.images],
            "question": record.question,
            "answer": list(record.answers) if record.alternatives else record.answer,
            "answer_type": record.answer_type,
        }
        further = {"options": list(record.options), "reasoning": record.reasoning, "description": record.description}
        return found | {name: value for name, value in further.items() if value}
    if not isinstance(record, Mapping):
        raise ValueError(f"It is a {type(record).__name__}, but must be a Sample or a dict.")
    try:
        names = standard_names(tuple(map(str, record)), tuple(config.columns.given.items()))
    except AmbiguousColumns:  # reported when the table is read
        names = {}
    row: Record = {}
    for column, value in ((str(column), value) for column, value in record.items()):
        is_image = names.get(column) == "image" or re.fullmatch(r"images|image_\d{1,2}", column) is not None
        if folded(column) != "split":
            row[column] = _names(value, images) if is_image else _plain(value, images)
    return row


def _names(value: object, images: _Images) -> Any:
    """The names under which the images in a cell are stored. A value that is no image stays: whoever reads the table
    reports it with its row."""
    try:
        cells = image_cells({"images": _encoded(value)}, {})
    except Unusable:
        return _plain(value, None)
    return [images.keep(cell) for cell in cells]


def _encoded(value: object) -> Any:
    """Pillow images as bytes and paths as text: alone, in a list or in an object."""
    if isinstance(value, Image.Image):
        return _png(value)
    if isinstance(value, Mapping):
        return {key: {"bytes": _png(item)} if isinstance(item, Image.Image) else item for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(item) for item in value]
    return fspath(value) if isinstance(value, PathLike) else value


def _plain(value: Any, images: _Images | None) -> Any:
    """A value as JSON has it.

    Args:
        images: where to store the images inside, as messages have them; None if there are none.
    """
    if images is not None and (isinstance(value, Image.Image) or _is_image(value)):
        names = _names(value, images)
        return {"type": "image", "image": names[0]} if isinstance(names, list) and names else names
    if isinstance(value, Mapping):
        return {str(key): _plain(item, images) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, images) for item in value]
    if hasattr(value, "tolist"):  # of NumPy, pandas and torch
        return _plain(value.tolist(), images)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _is_image(value: object) -> bool:
    """Whether a value is the part of a message that holds an image, or an undecoded one of ``datasets``."""
    return isinstance(value, Mapping) and (
        value.get("type") in ("image", "image_url", "input_image") or value.keys() == {"bytes", "path"}
    )


def _with_own_ids(rows: Sequence[Record]) -> Iterator[Record]:
    """The rows; if two splits have an id in common, every id begins with its split."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        if row.get("id") is not None:
            splits.setdefault(str(row["id"]), set()).add(row["split"])
    is_shared = any(len(names) > 1 for names in splits.values())
    for row in rows:
        yield row | {"id": f"{row['split']}/{row['id']}"} if is_shared and row.get("id") is not None else row


def _png(image: Image.Image) -> bytes:
    """An image as a PNG file, as it is decoded for a model, without metadata."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class _Images:
    """A folder of images, each under the hash of its content."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path, str] = {}
        """File as given -> name in the folder."""
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, image: object) -> str:
        """Store an image and return its name. The path of a file that does not exist is returned as it is: whoever
        reads the table reports it with its row.

        Raises:
            ValueError: it is not an image, or cannot be decoded.
        """
        if isinstance(image, FileImage):
            return self._copy(str(image.root / image.path))
        if isinstance(image, str | PathLike):
            return self._copy(fspath(image))
        if isinstance(image, bytes):
            return self._write(image)
        if isinstance(image, Image.Image):
            return self._write(_png(image))
        if callable(load := getattr(image, "load", None)):
            return self._write(_png(load()))
        raise ValueError(f"An image is a {type(image).__name__}, but must be a Pillow image, a path or bytes.")

    def _copy(self, name: str) -> str:
        path, fragment = split_fragment(name)
        file = Path(path).expanduser()
        if file not in self._names:
            if not file.is_file() or not file.stat().st_size:
                return name
            FileImage(file.name if fragment is None else f"{file.name}#{fragment}", file.parent).load()
            suffix = "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix
            self._names[file] = self._write(file.read_bytes(), suffix if medical_kind(path) else "")
        return self._names[file] if fragment is None else f"{self._names[file]}#{fragment}"

    def _write(self, data: bytes, suffix: str = "") -> str:
        name = name_of(data) if not suffix else Path(name_of(data)).stem + suffix.lower()
        file = self._folder / name
        if not file.is_file():
            with write_whole(file, durable=False) as partial:
                partial.write_bytes(data)
            try:
                FileImage(name, self._folder).load()
            except ValueError as error:
                file.unlink()
                raise ValueError(
                    "An image cannot be decoded: give a Pillow image, or the bytes of a PNG, JPEG, TIFF or DICOM file."
                ) from error
        return name
