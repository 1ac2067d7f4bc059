"""The index returns the rows of the table, and never outdated ones.

Run: pytest tests/data/reading/test_index.py
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.reading import index
from medvqa_rl.data.reading.folder import ImageFolder
from medvqa_rl.data.reading.rows import Reading
from medvqa_rl.data.sets import own, pmc_vqa
from medvqa_rl.data.stored import StoredDataset

COLUMNS = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label"]


def row(number: int, **changes: str) -> dict[str, str]:
    cells = [f"PMC{number}_F1.jpg", f" Wörter {number}? ", "B\u2028x", " A:a", " B:b x", "C:c\td", "D:'d '", "B"]
    return dict(zip(COLUMNS, cells)) | {"Answer": "b x"} | changes


@pytest.fixture
def folder(
    tmp_path: Path, write_csv: Callable[..., Path], write_images: Callable[..., None], monkeypatch: Any
) -> Path:
    monkeypatch.setattr(index, "MIN_BYTES", 0)
    rows = [row(number) for number in range(30)]
    rows[3] |= {"Answer_label": "?"}
    rows[7] |= {"Answer": "nothing"}
    write_csv(tmp_path / "train.csv", rows)
    write_images(tmp_path / "images", *(f"PMC{number}_F1.jpg" for number in range(30)))
    return tmp_path


def load(root: Path, **settings: Any) -> StoredDataset:
    config = DataConfig(name="pmc_vqa", path=str(root), cache_dir=str(root / "cache"), max_dropped=0.1, **settings)
    dataset = load_dataset(config, "train")
    assert isinstance(dataset, StoredDataset)
    return dataset


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tables that were read and not taken from an index."""
    found: list[str] = []
    original = pmc_vqa.read_pmc_vqa

    def counted(path: Path, folder: Any) -> Reading:
        found.append(path.name)
        return original(path, folder)

    monkeypatch.setattr(pmc_vqa, "read_pmc_vqa", counted)
    return found


def test_the_second_load_uses_the_index(folder: Path, reads: list[str]) -> None:
    first, second = load(folder), load(folder)
    assert reads == ["train.csv"]
    assert list(second.samples) == list(first.samples) and second.fingerprint == first.fingerprint
    assert sorted(second.issues) == sorted(first.issues) and second.notes == first.notes
    assert first.notes["dropped: answer is none of the options"] == 1
    assert first[0].options == ("a", "b x", "c d", "'d '") and first[0].question == "Wörter 1?"
    assert len(load(folder, num_train=5)) == 5 and reads == ["train.csv"]


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


CHANGES: dict[str, Callable[[Path], object]] = {
    "the table's rows": lambda root: rewrite(root / "train.csv", lambda data: data.replace(b"rter 9?", b"rter X?")),
    "the table's time": lambda root: os.utime(root / "train.csv", ns=(1, 1)),
    "an image is gone": lambda root: (root / "images" / "PMC1_F1.jpg").unlink(),
    "the index is cut": lambda root: rewrite(next((root / "cache" / "index").iterdir()), lambda data: data[:-300]),
    "the index is empty": lambda root: rewrite(next((root / "cache" / "index").iterdir()), lambda data: b""),
    "the index is noise": lambda root: rewrite(next((root / "cache" / "index").iterdir()), lambda data: b"\xff" * 99),
    "a letter of the index": lambda root: rewrite(
        next((root / "cache" / "index").iterdir()), lambda data: data.replace(b"rter 9?", b"rter X?")
    ),
    "the index is other JSON": lambda root: rewrite(next((root / "cache" / "index").iterdir()), lambda data: b"[]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_index_is_invalid_after_a_change(folder: Path, reads: list[str], name: str) -> None:
    before = load(folder)
    CHANGES[name](folder)
    after = load(folder)
    assert reads == ["train.csv"] * 2
    assert (after.fingerprint == before.fingerprint) == (name not in ("the table's rows", "an image is gone"))
    assert load(folder).fingerprint == after.fingerprint and len(reads) == 2


def test_the_index_is_invalid_for_other_code(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr(index, "_code_hash", lambda: "other")
    load(folder)
    assert len(reads) == 2


def test_the_code_hash_covers_all_code_that_parses_rows(folder: Path) -> None:
    images = ImageFolder(folder / "images")
    package = Path(index.__file__).parents[2]
    called: set[Path] = set()

    def record(frame: FrameType, event: str, argument: Any) -> None:
        called.add(Path(frame.f_code.co_filename))

    write_own(folder / "data.csv")
    sys.setprofile(record)
    try:
        pmc_vqa.read_pmc_vqa(folder / "train.csv", images)
        own.read_own(folder / "data.csv", images, split="train", needs_split=False)
    finally:
        sys.setprofile(None)
    modules = {path for path in called if path.is_relative_to(package)}
    assert {path.name for path in modules} >= {"text.py", "options.py", "windowing.py", "folder.py", "own.py"}
    assert modules <= set(index.code_files())


def write_own(path: Path) -> None:
    path.write_text("image,question,answer,options\nPMC1_F1.jpg,Q?,yes,\nPMC2_F1.jpg#frame=1,Q?,A,a|b\n")


def test_small_tables_have_no_index(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MIN_BYTES", 10**6)
    load(folder)
    load(folder)
    assert len(reads) == 2 and not (folder / "cache").exists()


def test_an_unwritable_cache_logs_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cache").write_text("a file, not a folder")
    assert len(load(folder)) == len(load(folder))
    assert "cannot be written" in caplog.text
