"""PMC-VQA: real malformed rows, both versions of the files, subsets, and bad rows.

Run: pytest tests/data/sets/test_pmc_vqa.py
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import StoredDataset

PREFIXES = 'option prefixes "A:" removed'


def load(root: Path, place: Any = "test", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name="pmc_vqa", path=str(root), **settings), place)
    assert isinstance(dataset, StoredDataset)
    return dataset


def v1(figure: str = "PMC1_F1.jpg", **changes: str) -> dict[str, str]:
    return {
        "Figure_path": figure,
        "Question": " What is shown? ",
        "Answer": "Brain",
        "Choice A": " A:Lung ",
        "Choice B": " B:Brain ",
        "Choice C": " C: Liver",
        "Choice D": " D:Kidney ",
        "Answer_label": "B",
        **changes,
    }


def v2(number: int, figure: str = "PMC1_F1_2.jpg", split: str = "train", **changes: str) -> dict[str, str]:
    row = v1(figure, Answer="B", Question=f"What is shown in {number}?", **changes)
    del row["Answer_label"]
    return {"index": str(number), "Caption": 'A "caption",\nof two lines', **row, "split": split}


def write(root: Path, file: str, rows: list[dict[str, str]], write_csv: Any, write_images: Any, folder: str) -> None:
    write_csv(root / file, rows)
    write_images(root / folder, *{row["Figure_path"] for row in rows if row["Figure_path"].startswith("PMC")})


# --- the real malformed rows --------------------------------------------------------------------------------------

REAL: dict[str, tuple[str, set[str]]] = {
    "PMC1064097_F1.jpg": ("Focal uptake pattern", set()),
    "PMC8253797_Fig4_11.jpg": ("Red", set()),
    "PMC8415802_FIG1.jpg": ("Magnetic resonance imaging", set()),
    "PMC1421418_F5.jpg": ("One patient", {"stray quotes removed", "label taken from the answer's text"}),
    "PMC1976316_F1.jpg": ("N/A", set()),
    "PMC2660287_F5.jpg": ("Solitary level expression of signal S", {"stray quotes removed"}),
    "PMC3844328_F3.jpg": ("Non-enhanced area", {"option letters out of order, places count"}),
    "PMC3350287_fig3.jpg": (
        "The photomicrograph does not provide enough information to determine the type of tumor.",
        set(),
    ),
    "PMC4475708_fig4.jpg": (
        "Focal pattern DFO retinopathy",
        {"quotes around the question removed", "stray quotes removed", "label taken from the answer's text"},
    ),
    "PMC5133774_ijms-17-01746-f005.jpg": (
        "Nucleus of Myocardium",
        {"option letters out of order, places count"},
    ),
    "PMC7337579_F1.jpg": (
        "T: thyroid gland, A: common carotid artery, V: internal jugular vein.",
        {"letters missing from the answer's text"},
    ),
}
"""Figure -> the text of the gold option, verified by hand, and the expected repairs."""


def test_the_real_malformed_rows_are_repaired(
    shared_data: Path,
    tmp_path: Path,
    write_csv: Callable[..., Path],
    write_images: Callable[..., None],
    wrong_gold: Callable[[StoredDataset], list[str]],
) -> None:
    rows = json.loads((shared_data / "pmc_vqa" / "malformed_rows.json").read_text())
    newer = [row for row in rows if "Answer_label" not in row]
    older = [row for row in rows if "Answer_label" in row]
    assert (len(older), len(newer)) == (10, 1)
    write(tmp_path, "test_clean.csv", older, write_csv, write_images, "images")
    write(tmp_path, "test_2.csv", newer, write_csv, write_images, "figures")
    found = {}
    for variant, file in (("v1_clean", "test_clean.csv"), ("v2", "test_2.csv")):
        dataset = load(tmp_path, variant=variant)
        assert wrong_gold(dataset) == []
        assert not [issue for issue in dataset.issues if issue.action == "dropped"]
        for sample in dataset.samples:
            number = int(sample.id.rpartition("/")[2])
            reasons = {issue.reason for issue in dataset.issues if issue.row == number and issue.file == file}
            found[sample.image_key] = (sample.answer_text, reasons - {PREFIXES})
            for text in sample.options:
                assert text.strip(" \"'") == text and (text[1:2] != ":" or text.startswith("T: "))
    assert found == REAL


# --- both versions ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, write_csv: Callable[..., Path], write_images: Callable[..., None]) -> Path:
    rows = [v1(f"PMC{i // 2}_F{i % 2}.jpg", Question=f"Which organ, {i}?") for i in range(60)]
    write(tmp_path, "train.csv", rows, write_csv, write_images, "images")
    write(tmp_path, "test.csv", rows[:3], write_csv, write_images, "images")
    write(tmp_path, "test_clean.csv", rows[:1], write_csv, write_images, "images")
    write(tmp_path, "train_2.csv", [v2(i, f"PMC{i}_F1_1.jpg") for i in range(20)], write_csv, write_images, "figures")
    write(tmp_path, "test_2.csv", [v2(i, split="test") for i in range(2)], write_csv, write_images, "figures")
    return tmp_path


@pytest.mark.parametrize(
    ("variant", "name", "count"), [("v1", "test", 3), ("v1_clean", "test_clean", 1), ("v2", "test_2", 2)]
)
def test_each_test_file_has_its_own_name(
    folder: Path, variant: str, name: str, count: int, wrong_gold: Callable[[StoredDataset], list[str]]
) -> None:
    dataset = load(folder, variant=variant)
    assert (dataset.name, len(dataset)) == (f"pmc_vqa/{name}/test", count)
    assert dataset[0].options == ("Lung", "Brain", "Liver", "Kidney")
    assert dataset[0].id == f"pmc_vqa/{name}/0"
    assert dataset.notes[f"repaired: {PREFIXES}"] == count
    assert dataset[0].images[0].load().size == (8, 8)
    assert wrong_gold(dataset) == []


def test_validation_takes_whole_articles_from_training(folder: Path) -> None:
    train, val = load(folder, "train"), load(folder, "val")
    assert len(train) + len(val) == 60 and len(val) > 0
    articles = [{sample.image_key.split("_")[0] for sample in part.samples} for part in (train, val)]
    assert articles[0].isdisjoint(articles[1])
    assert train.name == "pmc_vqa/train/train" and val.name == "pmc_vqa/train/val"


def test_a_split_by_image_uses_every_row_of_both_files(folder: Path) -> None:
    parts = [load(folder, split, split="image", variant="v2") for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 22
    assert parts[2].name == "pmc_vqa/image/test"
    articles = [{sample.image_key.split("_")[0] for sample in part.samples} for part in parts]
    assert sum(map(len, articles)) == len(set.union(*articles))


def test_a_subset_is_seeded_and_named_by_the_hash_of_its_ids(folder: Path) -> None:
    few = load(folder, "train", num_train=10)
    assert len(few) == 10 and load(folder, "train", num_train=10).fingerprint == few.fingerprint
    lines = "\n".join(sorted(sample.id for sample in few.samples))
    expected = hashlib.sha256(lines.encode()).hexdigest()[:16]
    (note,) = [key for key in few.notes if key.startswith("chosen")]
    assert note.endswith(f"by seed 0, ids {expected}") and few.notes[note] == 10
    other = load(folder, "train", num_train=10, seed=1)
    assert {sample.id for sample in other.samples} != {sample.id for sample in few.samples}
    assert not [key for key in load(folder, "train").notes if key.startswith("chosen")]


def test_samples_are_a_sequence(folder: Path) -> None:
    samples = load(folder, "train").samples
    assert len(samples[2:5]) == 3 and samples[2:5][1] == samples[3] == list(samples)[3] and samples[-1] in samples
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_options_keep_their_published_order(folder: Path) -> None:
    assert {sample.answer for sample in load(folder, "train").samples} == {"B"}


# --- bad rows -----------------------------------------------------------------------------------------------------

BAD: dict[str, dict[str, str]] = {
    "missing image": {"Figure_path": "none.jpg"},
    "image path leaves the folder": {"Figure_path": "../images/PMC1_F1.jpg"},
    "empty Question": {"Question": "  "},
    "empty Figure_path": {"Figure_path": ""},
    "empty Answer": {"Answer": " "},
    "empty option": {"Choice C": " C: "},
    "label outside the options": {"Answer_label": "E"},
    "answer is none of the options": {"Answer": "Spleen"},
    "label and answer name different options": {"Answer_label": "D"},
    "gold option given twice": {"Choice D": " D:the brain "},
    "answer is more than one of the options": {"Choice C": "C: Brain", "Answer_label": "?"},
    "NUL character in Question": {"Question": "What\0?"},
    "Question is too long": {"Question": "x" * 30_000},
}


def test_bad_rows_are_reported(
    tmp_path: Path, write_csv: Callable[..., Path], write_images: Callable[..., None]
) -> None:
    rows = [v1(), *(v1(**changes) for changes in BAD.values()), v1()]
    write(tmp_path, "test.csv", rows, write_csv, write_images, "images")
    dataset = load(tmp_path, max_dropped=1.0)
    assert len(dataset) == 1
    dropped = {issue.reason: issue for issue in dataset.issues if issue.action == "dropped"}
    for number, reason in enumerate([*BAD, "repeated row"], start=1):
        assert (dropped[reason].row, dropped[reason].file) == (number, "test.csv"), reason
        assert dataset.notes[f"dropped: {reason}"] == 1
    assert dropped["repeated row"].detail == "the same as row 2"
    assert dropped["label and answer name different options"].detail == "D; Brain"
    with pytest.raises(ValueError, match=r"14 of 15 rows of PMC-VQA at .*missing image: rows 3 of test\.csv"):
        load(tmp_path)


def test_an_ambiguous_letter_in_version_2_drops_the_row(
    tmp_path: Path, write_csv: Callable[..., Path], write_images: Callable[..., None]
) -> None:
    swapped = {"Choice B": " C:Brain ", "Choice C": " B: Liver"}
    rows = [v2(0), v2(1, **swapped), {**v2(2, **swapped), "Answer": "D"}, {**v2(3), "Answer": "F"}]
    write(tmp_path, "test_2.csv", rows, write_csv, write_images, "figures")
    dataset = load(tmp_path, variant="v2", max_dropped=1.0)
    assert [(sample.id[-1], sample.answer) for sample in dataset.samples] == [("0", "B"), ("2", "D")]
    reasons = {issue.row: issue.reason for issue in dataset.issues if issue.action == "dropped"}
    assert reasons == {1: "answer is more than one of the options", 3: "label outside the options"}


def test_missing_files_and_columns_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "test.csv").unlink()
    with pytest.raises(ValueError, match=r"There is no file 'test\.csv' in .*PMC-VQA"):
        load(folder)
    (folder / "test.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"test\.csv has no column Figure_path, Question.*it has a, b"):
        load(folder)
    with pytest.raises(ValueError, match="There is no folder 'pictures' in"):
        load(folder, image_folder="pictures")
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"it has choice"):
        load(folder, variant="v2", answer_types=("open",))
