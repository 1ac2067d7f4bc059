"""Parquet with image bytes, as in the Hub copies of Path-VQA and VQA-RAD.

Run: pytest tests/data/sets/test_path_vqa.py
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.reading import index
from medvqa_rl.data.stored import StoredDataset

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def picture(grey: int, form: str = "JPEG") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (16, 8), grey).save(buffer, form)
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, rows: list[tuple[Any, Any, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[index] for row in rows] for index, name in enumerate(("image", "question", "answer"))}
    parquet.write_table(pyarrow.table(columns), path)


def load(root: Path, place: Any = "train", name: Any = "path_vqa", **settings: Any) -> StoredDataset:
    config = DataConfig(name=name, path=str(root), cache_dir=str(root / "cache"), **settings)
    dataset = load_dataset(config, place)
    assert isinstance(dataset, StoredDataset)
    return dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [
        (picture(10), "is this a liver?", "yes"),
        (picture(10), "what is shown?", "a cyst"),
        (picture(20, "PNG"), "what is shown?", "lung"),
    ]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", train)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [(picture(30), "is this a lung?", "No")])
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", [(picture(40), "where?", "left")])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [(picture(10), "how many?", "two"), (None, "q?", "x")])
    return tmp_path


def test_hub_copies_are_read(folder: Path, wrong_gold: Callable[[StoredDataset], list[str]]) -> None:
    train, val = load(folder), load(folder, "val")
    assert wrong_gold(train) == []
    assert [sample.id for sample in train.samples] == [
        "path_vqa/train-00000-of-00002/0",
        "path_vqa/train-00000-of-00002/1",
        "path_vqa/train-00000-of-00002/2",
        "path_vqa/train-00001-of-00002/0",
    ]
    assert [sample.answer_type for sample in train.samples] == ["closed", "open", "open", "closed"]
    first, second, third, _ = (sample.image_key for sample in train.samples)
    assert first == second != third and first.endswith(".jpg") and third.endswith(".png")
    assert train[0].images[0].load().size == (16, 8)
    assert (val.name, len(val)) == ("path_vqa/official/val", 1)
    with pytest.raises(ValueError, match=r"1 of 2 rows of Path-VQA .*missing image: rows 2 of test-00000-of-00001"):
        load(folder, "test")
    test = load(folder, "test", max_dropped=0.5)
    assert test[0].image_key == first  # the same picture in training and test shows by its name


def test_the_image_split_keeps_equal_images_together(tmp_path: Path) -> None:
    rows = [(picture(grey), f"question {i}?", "yes") for grey in range(0, 240, 6) for i in range(2)]
    write(tmp_path / "train.parquet", rows[::2])
    write(tmp_path / "test.parquet", rows[1::2])
    parts = [load(tmp_path, place, "vqa_rad_hub", split="image") for place in ("train", "val", "test")]
    assert sum(map(len, parts)) == 80
    images = [{sample.image_key for sample in part.samples} for part in parts]
    assert sum(map(len, images)) == len(set.union(*images)) == 40
    # No validation file: a tenth of the training images.
    assert len(load(tmp_path, "val", "vqa_rad_hub")) + len(load(tmp_path, "train", "vqa_rad_hub")) == 40


def test_the_second_load_reads_no_parquet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    first = load(folder)
    load(folder, "val")  # adds images to the same folder
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "ParquetFile", lambda path: pytest.fail("the table was read again"))
        second = load(folder)
    assert second.fingerprint == first.fingerprint and list(second.samples) == list(first.samples)
    next((folder / "cache" / "images" / "path_vqa").iterdir()).unlink()
    assert load(folder).fingerprint == first.fingerprint
    assert all(image.load().size == (16, 8) for sample in load(folder).samples for image in sample.images)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b"\x00" * 100])
def test_damaged_files_are_named(folder: Path, content: bytes) -> None:
    file = folder / "data" / "train-00001-of-00002.parquet"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is not parquet, or damaged"):
        load(folder)


def test_other_columns_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parquet file in .* whose name begins with train, val or test"):
        load(tmp_path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"has no column image, question, answer; it has text"):
        load(tmp_path)
