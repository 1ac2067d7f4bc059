"""Export a data set with the columns that TRL reads, or as a table for ``data.name: own``. Imports no torch.

For TRL, ``prompt`` is one user message with the text only (TRL inserts the image placeholders), ``images`` are paths
relative to the folder or, in parquet, the image files themselves, and ``solution`` is the gold answer that the scorer
expects: the letter of choice questions, else the text. ``answers`` has every correct answer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from medvqa_rl.core.files import write_whole
from medvqa_rl.core.prompts import as_asked, render_prompt
from medvqa_rl.core.types import DEFAULT_WORDING, Dataset, ImageSource, Sample, Template, Wording
from medvqa_rl.data.images.files import FileImage, shrink
from medvqa_rl.data.reading.tables import import_pyarrow, write_table

Format = Literal["jsonl", "parquet", "csv"]
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
"""Columns of a table that :mod:`medvqa_rl.data.sets.own` reads."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    file: Path
    rows: int
    images: int
    """Number of images written. Parquet stores an image once per row that uses it."""
    copied: int
    """Number of images whose bytes were copied; the others were re-encoded."""


def export(
    dataset: Dataset,
    folder: Path,
    name: str,
    *,
    form: Format = "jsonl",
    template: Template = "think_answer",
    wording: Wording = DEFAULT_WORDING,
    max_pixels: int | None = None,
    limit: int | None = None,
    keep_metadata: bool = False,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write samples to ``name.jsonl`` or ``name.csv`` with image files, or to ``name.parquet`` with embedded images.

    Images are written as PNG, as decoded by this package, and hold pixels only.

    Args:
        dataset: the samples.
        folder: output folder, created if needed.
        name: stem of the file name, such as train.
        form: jsonl or parquet for TRL, csv for ``data.name: own``.
        template: prompt template.
        wording: the user's own words and tags in it.
        max_pixels: shrink larger images to this area.
        limit: maximum number of samples to write.
        keep_metadata: copy the bytes of PNG and JPEG files that every reader decodes alike (8 bits, grey or RGB,
            upright, one frame), with all the metadata in them.
        progress: called with the number of samples written and their total.

    Raises:
        ValueError: the file already exists, the data set is endless and has no limit, an image cannot be decoded, or
            pyarrow is not installed.
    """
    if dataset.is_endless and limit is None:
        raise ValueError(f"The data set {dataset.name} is endless: set the number of samples to write with --limit.")
    file = folder / f"{name}.{form}"
    total = min(len(dataset), limit or len(dataset))
    images = _ImageWriter(folder, max_pixels, keep_metadata=keep_metadata)
    write_image = images.embed if form == "parquet" else images.write
    row_of = own_row if form == "csv" else partial(trl_row, template=template, wording=wording)

    def rows() -> Iterator[dict[str, Any]]:
        for index in range(total):
            sample = dataset[index]
            try:
                written = [write_image(source) for source in sample.images]
            except ValueError as error:
                raise ValueError(f"Sample {sample.id} cannot be written: {error}") from error
            yield row_of(sample, written)
            progress(index + 1, total)

    write_table(file, rows(), OWN_COLUMNS, _trl_schema(file) if form == "parquet" else None)
    return Exported(file, total, images.written, images.copied)


def trl_row(
    sample: Sample, images: list[Any], template: Template, wording: Wording = DEFAULT_WORDING
) -> dict[str, Any]:
    """A sample in TRL's columns, with special-token strings neutralised as in training; further columns describe the
    question."""
    sample = as_asked(sample, template)
    *system, message = render_prompt(sample, template, wording).messages
    text = next(part["text"] for part in message["content"] if part["type"] == "text")
    return {
        "prompt": [*system, {"role": "user", "content": text}],
        "images": images,
        "solution": sample.answer,
        "answers": list(sample.answers),
        "id": sample.id,
        "answer_type": sample.answer_type,
        "question": sample.question,
        "options": list(sample.options),
        "reasoning": sample.reasoning,
        "description": sample.description,
        "groups": json.dumps(dict(sample.groups), ensure_ascii=False),
    }


def own_row(sample: Sample, images: list[Any]) -> dict[str, Any]:
    """A sample in ``OWN_COLUMNS``; image names are relative to the folder ``images``."""
    names = [str(image).removeprefix("images/") for image in images]
    return {
        "id": sample.id,
        "image": names[0] if len(names) == 1 else names,
        "question": sample.question,
        "answer": list(sample.answers) if sample.alternatives else sample.answer,
        "options": list(sample.options) if sample.options else "",
        "answer_type": sample.answer_type,
        "reasoning": sample.reasoning,
        "description": sample.description,
        **{name: sample.groups.get(name, "") for name in ("modality", "organ", "family")},
    }


class _ImageWriter:
    """Writes each distinct image once, or returns its encoded bytes."""

    def __init__(self, folder: Path, max_pixels: int | None, *, keep_metadata: bool) -> None:
        self.folder = folder
        self.max_pixels = max_pixels
        self.keep_metadata = keep_metadata
        self.names: dict[str, str] = {}
        self.written = 0
        self.copied = 0

    def write(self, source: ImageSource) -> Any:
        """Write an image file unless it is written already, and return its path relative to the folder."""
        if source.key not in self.names:
            content, suffix = self._encode(source)
            name = f"images/{hashlib.sha256(source.key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}{suffix}"
            with write_whole(self.folder / name, durable=False) as file:
                file.write_bytes(content)
            self.names[source.key] = name
        return self.names[source.key]

    def embed(self, source: ImageSource) -> Any:
        """Return an image in the format of the ``datasets`` library."""
        return {"bytes": self._encode(source)[0], "path": None}

    def _encode(self, source: ImageSource) -> tuple[bytes, str]:
        """Content and suffix of an image file."""
        image = source.load()
        small = image if self.max_pixels is None else shrink(image, self.max_pixels)
        self.written += 1
        keeps_bytes = self.keep_metadata and small is image
        if keeps_bytes and isinstance(source, FileImage) and (suffix := _plain_suffix(source.file)):
            self.copied += 1
            return source.file.read_bytes(), suffix
        buffer = io.BytesIO()
        small.save(buffer, "PNG")
        return buffer.getvalue(), ".png"


def _plain_suffix(path: Path) -> str:
    """The suffix of a PNG or JPEG file that every reader decodes alike, or ""."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            is_upright = image.getexif().get(0x0112, 1) == 1
            is_plain = image.mode in ("L", "RGB") and not image.has_transparency_data and is_upright
            suffix = {"PNG": ".png", "JPEG": ".jpg"}.get(image.format or "", "") if is_plain else ""
            image.seek(1)  # raises EOFError unless the image is animated
    except EOFError:
        return suffix
    except UnidentifiedImageError:
        pass
    return ""


def _trl_schema(path: Path) -> Any:
    """The pyarrow schema of :func:`trl_row`, with the metadata that makes ``datasets`` decode the images."""
    pyarrow = import_pyarrow(path)
    text = pyarrow.string()
    types = {
        "prompt": pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])),
        "images": pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])),
        "solution": text,
        "answers": pyarrow.list_(text),
        "id": text,
        "answer_type": text,
        "question": text,
        "options": pyarrow.list_(text),
        "reasoning": text,
        "description": text,
        "groups": text,
    }
    value = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = dict.fromkeys(types, value) | {
        "prompt": {"feature": {"role": value, "content": value}, "_type": "List"},
        "images": {"feature": {"_type": "Image"}, "_type": "List"},
        "answers": {"feature": value, "_type": "List"},
        "options": {"feature": value, "_type": "List"},
    }
    metadata = json.dumps({"info": {"features": features}})
    return pyarrow.schema(list(types.items())).with_metadata({"huggingface": metadata})
