"""Data sets in the columns that TRL reads: prompt, images, solution. Imports no torch.

``prompt`` is a list with one user message whose content is the text alone (TRL puts the image placeholders before it),
``images`` are paths below the folder or, in parquet, the files themselves, ``solution`` is the gold answer as the
scorer wants it: the letter of choice questions, else the text. More columns say what the question was. As CSV it has
the columns that this package reads as one's own data instead.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial as partial_function
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from medvqa_rl.core.prompts import as_asked, render_prompt
from medvqa_rl.core.types import Dataset, ImageSource, Sample, Template
from medvqa_rl.data.images.files import FileImage, shrink

Format = Literal["jsonl", "parquet", "csv"]
COLUMNS = (
    "prompt",
    "images",
    "solution",
    "id",
    "answer_type",
    "question",
    "options",
    "reasoning",
    "description",
    "groups",
)
OWN_COLUMNS = (
    "id",
    "image",
    "question",
    "answer",
    "options",
    "answer_type",
    "reasoning",
    "description",
    "modality",
    "organ",
    "family",
)
"""Of a table that :mod:`medvqa_rl.data.sets.own` reads."""
BATCH = 64
"""Rows of parquet in memory at a time."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    rows: int
    images: int
    """Image files; in parquet each row holds its own."""
    copied: int
    """Image files that were copied as they are; the others were written anew."""


def export(
    dataset: Dataset,
    folder: Path,
    name: str,
    *,
    form: Format = "jsonl",
    template: Template = "think_answer",
    max_pixels: int | None = None,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write samples to ``name.jsonl`` or ``name.csv`` with image files beside it, or ``name.parquet`` with all inside.

    PNG and JPEG files that any reader shows alike (8 bits, grey or RGB, upright, one frame) keep their bytes; every
    other image is written as PNG, as it is decoded here.

    Args:
        dataset: the samples, read one after the other.
        folder: where to write; made if it is not there.
        name: of the file, such as train.
        form: jsonl, parquet, or csv for one's own data.
        template: form of the prompt.
        max_pixels: larger images are shrunk to this area.
        limit: samples to write at most.
        progress: is told how many samples are written.

    Raises:
        ValueError: the file is there already, the data set never ends and there is no limit, an image cannot be
            decoded, or pyarrow is not installed.
    """
    file = folder / f"{name}.{form}"
    if file.exists():
        raise ValueError(f"The file {file} exists already: choose another folder with --output, or move it away.")
    if dataset.is_endless and limit is None:
        raise ValueError(f"The data set {dataset.name} never ends: say how many samples to write with --limit.")
    total = min(len(dataset), limit or len(dataset))
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    images = _Images(folder, max_pixels)

    def rows(with_bytes: bool, row_of: Callable[[Sample, list[Any]], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for index in range(total):
            sample = dataset[index]
            try:
                put = images.inside if with_bytes else images.beside
                pictures = [put(source) for source in sample.images]
            except ValueError as error:
                raise ValueError(f"Sample {sample.id} cannot be written: {error}") from error
            yield row_of(sample, pictures)
            progress(index + 1, total)

    for_trl = partial_function(trl_row, template=template)
    if form == "jsonl":
        with partial.open("w", encoding="utf-8") as out:
            for row in rows(False, for_trl):
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif form == "csv":
        with partial.open("w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, OWN_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows(False, own_row))
    else:
        _write_parquet(partial, rows(True, for_trl))
    os.replace(partial, file)
    return Exported(file, total, images.written, images.copied)


def trl_row(sample: Sample, images: list[Any], template: Template) -> dict[str, Any]:
    """A sample in TRL's columns and ours; special-token strings are neutralised as in training."""
    sample = as_asked(sample, template)
    (message,) = render_prompt(sample, template).messages
    text = next(part["text"] for part in message["content"] if part["type"] == "text")
    return {
        "prompt": [{"role": "user", "content": text}],
        "images": images,
        "solution": sample.answer,
        "id": sample.id,
        "answer_type": sample.answer_type,
        "question": sample.question,
        "options": list(sample.options),
        "reasoning": sample.reasoning,
        "description": sample.description,
        "groups": json.dumps(dict(sample.groups), ensure_ascii=False),
    }


def own_row(sample: Sample, images: list[Any]) -> dict[str, Any]:
    """A sample in the columns of one's own data; image names are those in the folder ``images``."""
    names = [str(image).removeprefix("images/") for image in images]
    return {
        "id": sample.id,
        "image": names[0] if len(names) == 1 else json.dumps(names),
        "question": sample.question,
        "answer": sample.answer,
        "options": json.dumps(sample.options, ensure_ascii=False) if sample.options else "",
        "answer_type": sample.answer_type,
        "reasoning": sample.reasoning,
        "description": sample.description,
        **{name: sample.groups.get(name, "") for name in ("modality", "organ", "family")},
    }


class _Images:
    """Writes each distinct image once, or hands out its bytes."""

    def __init__(self, folder: Path, max_pixels: int | None) -> None:
        self.folder = folder
        self.max_pixels = max_pixels
        self.names: dict[str, str] = {}
        self.written = 0
        self.copied = 0

    def beside(self, source: ImageSource) -> Any:
        """The path of an image file below the folder, written if it is not there yet."""
        if source.key not in self.names:
            content, suffix = self._encode(source)
            name = f"images/{hashlib.sha256(source.key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}{suffix}"
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            self.names[source.key] = name
        return self.names[source.key]

    def inside(self, source: ImageSource) -> Any:
        """An image as the ``datasets`` library stores it."""
        return {"bytes": self._encode(source)[0], "path": None}

    def _encode(self, source: ImageSource) -> tuple[bytes, str]:
        """Content and suffix of an image file."""
        image = source.load()
        small = image if self.max_pixels is None else shrink(image, self.max_pixels)
        self.written += 1
        if small is image and isinstance(source, FileImage) and (suffix := _plain_suffix(source.file)):
            self.copied += 1
            return source.file.read_bytes(), suffix
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        return buffer.getvalue(), ".png"


def _plain_suffix(path: Path) -> str:
    """The suffix of a file that every reader shows as this package does, else nothing."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            is_upright = image.getexif().get(0x0112, 1) == 1
            is_plain = image.mode in ("L", "RGB") and not image.has_transparency_data and is_upright
            suffix = {"PNG": ".png", "JPEG": ".jpg"}.get(image.format or "", "") if is_plain else ""
            image.seek(1)  # a second frame: an animation
    except EOFError:
        return suffix
    except UnidentifiedImageError:
        pass
    return ""


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows in batches, with the note by which ``datasets`` decodes the images."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'medvqa-rl[hub]', or export as jsonl.") from error
    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            ("prompt", pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))),
            ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)]))),
            ("solution", text),
            ("id", text),
            ("answer_type", text),
            ("question", text),
            ("options", pyarrow.list_(text)),
            ("reasoning", text),
            ("description", text),
            ("groups", text),
        ]
    )
    value = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = dict.fromkeys(COLUMNS, value)
    features["prompt"] = {"feature": {"role": value, "content": value}, "_type": "List"}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    features["options"] = {"feature": value, "_type": "List"}
    note = json.dumps({"info": {"features": features}})
    with pyarrow.parquet.ParquetWriter(path, schema.with_metadata({"huggingface": note})) as writer:
        while batch := list(islice(rows, BATCH)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
