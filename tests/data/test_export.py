"""Exports have TRL's columns and the original pixels, and other programs can read them.

Run: pytest tests/data/test_export.py
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import is_correct
from medvqa_rl.core.prompts import render_prompt
from medvqa_rl.core.types import Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.export import export
from medvqa_rl.data.images.files import FileImage, MemoryImage
from medvqa_rl.data.stored import StoredDataset

COLUMNS = [
    "prompt",
    "images",
    "solution",
    "answers",
    "id",
    "answer_type",
    "question",
    "options",
    "reasoning",
    "description",
    "groups",
]


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> StoredDataset:
    """Four questions about a JPEG, a turned JPEG, a palette PNG and an image in memory; one image twice."""
    folder = tmp_path / "source"
    folder.mkdir()
    Image.fromarray(pixels(0)).save(folder / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(1)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(pixels(2)).quantize(16).save(folder / "palette.png")
    plain, turned, palette = (FileImage(name, folder) for name in ("plain.jpg", "turned.jpg", "palette.png"))
    memory = MemoryImage("drawn", Image.fromarray(pixels(3)))
    samples = (
        Sample(
            "a",
            "Where <|image_pad|>?",
            "left lung",
            "open",
            (plain,),
            reasoning="Because.",
            groups={"organ": "chest"},
            description="A chest film.",
        ),
        Sample("b", "Which?", "B", "choice", (turned,), ("cyst", "Größe")),
        Sample("c", "Same?", "yes", "closed", (plain, palette)),
        Sample("d", "Drawn?", "no", "closed", (memory,), alternatives=("none",)),
    )
    return StoredDataset("toy", samples)


def check(rows: list[dict[str, Any]], dataset: StoredDataset, open_image: Any) -> None:
    assert len(rows) == len(dataset)
    for row, sample in zip(rows, dataset.samples):
        assert list(row) == COLUMNS
        text = render_prompt(sample).messages[0]["content"][-1]["text"]
        assert row["prompt"] == [{"role": "user", "content": text}]
        assert row["answers"] == list(sample.answers) and row["answers"][0] == row["solution"]
        assert all(is_correct(sample, answer) for answer in row["answers"])
        assert (row["id"], row["answer_type"], row["options"]) == (sample.id, sample.answer_type, list(sample.options))
        assert json.loads(row["groups"]) == dict(sample.groups) and row["reasoning"] == sample.reasoning
        assert row["description"] == sample.description
        assert len(row["images"]) == len(sample.images)
        for written, source in zip(row["images"], sample.images):
            np.testing.assert_array_equal(np.asarray(open_image(written).convert("RGB")), np.asarray(source.load()))


def test_json_lines_with_image_files(tmp_path: Path, dataset: StoredDataset) -> None:
    told: list[tuple[int, int]] = []
    done = export(dataset, tmp_path / "out", "train", keep_metadata=True, progress=lambda *step: told.append(step))
    rows = [json.loads(line) for line in done.file.read_text(encoding="utf-8").splitlines()]
    check(rows, dataset, lambda name: Image.open(tmp_path / "out" / name))
    assert "(|image_pad|)" in rows[0]["prompt"][0]["content"] and "Größe" in rows[1]["prompt"][0]["content"]
    assert (done.rows, done.images, done.copied) == (4, 4, 1) and told[-1] == (4, 4)
    assert rows[0]["images"][0] == rows[2]["images"][0]
    copied = tmp_path / "out" / rows[0]["images"][0]
    assert copied.read_bytes() == (tmp_path / "source" / "plain.jpg").read_bytes() and copied.suffix == ".jpg"
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4 and not list((tmp_path / "out").glob("*.partial"))


def test_parquet_with_embedded_images(tmp_path: Path, dataset: StoredDataset) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    done = export(dataset, tmp_path / "out", "train", form="parquet")
    rows = parquet.read_table(done.file).to_pylist()
    check(rows, dataset, lambda image: Image.open(io.BytesIO(image["bytes"])))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.parquet"]


def test_csv_is_read_back_as_own_data(tmp_path: Path, dataset: StoredDataset) -> None:
    export(dataset, tmp_path / "out", "train", form="csv")
    config = DataConfig(name="own", path=str(tmp_path / "out"), num_val=None, cache_dir=str(tmp_path / "cache"))
    read = load_dataset(config, "train")
    for index, sample in enumerate(dataset.samples):
        again = read[index]
        for name in ("answer", "answer_type", "options", "reasoning", "description", "groups"):
            assert getattr(again, name) == getattr(sample, name), name
        assert [np.asarray(image.load()).tolist() for image in again.images] == [
            np.asarray(image.load()).tolist() for image in sample.images
        ]


@pytest.mark.slow
def test_datasets_and_trl_read_exports(tmp_path: Path, dataset: StoredDataset) -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.data_utils")
    for form in ("parquet", "jsonl"):
        folder = tmp_path / form
        file = export(dataset, folder, "train", form=form).file  # type: ignore[arg-type]
        kind = "json" if form == "jsonl" else "parquet"
        read = datasets.load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        if form == "jsonl":
            read = read.map(lambda row, folder=folder: {"images": [str(folder / name) for name in row["images"]]})
            read = read.cast_column("images", datasets.List(datasets.Image()))
        check(list(read), dataset, lambda image: image)
        (message,) = trl.prepare_multimodal_messages(read[2]["prompt"], images=read[2]["images"])
        assert [part["type"] for part in message["content"]] == ["image", "image", "text"]


def test_images_shrink_to_a_limit(tmp_path: Path, dataset: StoredDataset) -> None:
    done = export(dataset, tmp_path / "out", "train", max_pixels=150, keep_metadata=True)
    rows = [json.loads(line) for line in done.file.read_text().splitlines()]
    with Image.open(tmp_path / "out" / rows[0]["images"][0]) as image:
        assert image.size == (15, 10) and image.format == "PNG"
    assert done.copied == 0


def test_endless_data_needs_a_limit_and_nothing_is_overwritten(tmp_path: Path, dataset: StoredDataset) -> None:
    phantom = load_dataset(DataConfig(), "train")
    with pytest.raises(ValueError, match="is endless"):
        export(phantom, tmp_path, "phantom")
    assert export(phantom, tmp_path, "phantom", limit=3).rows == 3
    with pytest.raises(ValueError, match=r"phantom\.jsonl already exists"):
        export(phantom, tmp_path, "phantom", limit=3)


def test_an_unreadable_image_is_reported_with_its_sample(tmp_path: Path) -> None:
    bad = StoredDataset("toy", [Sample("x/7", "Q?", "yes", "closed", (FileImage("gone.png", tmp_path),))])
    with pytest.raises(ValueError, match=r"Sample x/7 cannot be written: .*gone\.png"):
        export(bad, tmp_path / "out", "train")
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_animations_are_written_as_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels(seed)) for seed in (5, 6)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    sample = Sample("m", "Q?", "yes", "closed", (FileImage("moving.png", tmp_path),))
    done = export(StoredDataset("toy", [sample]), tmp_path / "out", "test", keep_metadata=True)
    (row,) = [json.loads(line) for line in done.file.read_text().splitlines()]
    assert done.copied == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / row["images"][0])), pixels(5))
