"""VQA-Med 2019 in the organisers' format.

Run: pytest tests/data/sets/test_vqa_med.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.core.answers import is_correct
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import StoredDataset


def load(root: Path, part: Any = "test", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name="vqa_med", path=str(root), **settings), part)
    assert isinstance(dataset, StoredDataset)
    return dataset


@pytest.fixture
def vqa_med(tmp_path: Path, write_images: Callable[..., None]) -> Path:
    train, test = tmp_path / "ImageClef-2019-VQA-Med-Training", tmp_path / "VQAMed2019Test"
    write_images(train / "Train_images", "synpic1.jpg", "synpic2.jpg")
    write_images(test / "VQAMed2019_Test_Images", "synpic3.jpg", "synpic4.jpg")
    (train / "All_QA_Pairs_train.txt").write_bytes(
        b"synpic1|what kind of image is this?|cta - ct angiography\r\n"
        b"synpic2|is this a t1 weighted image?|no\r\n"
        b"synpic2|what is \xe9?|Sj\xf6gren\r\n"
        b"synpic9|which plane?|axial\n"
        b"synpic1|too|many|cells\n"
    )
    test.mkdir(exist_ok=True)
    (test / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text(
        "synpic3|modality|what imaging method was used?|us-d - doppler ultrasound\n"
        "synpic4|abnormality|what is wrong?|ependymoma#brain tumor# Ependymoma #glioma\n"
        "synpic4|plane|which plane?|#\n"
    )
    return tmp_path


def test_vqa_med(vqa_med: Path, wrong_gold: Callable[[StoredDataset], list[str]]) -> None:
    train = load(vqa_med, "train", max_dropped=0.5)
    test = load(vqa_med, max_dropped=0.5)
    for dataset in (train, test):
        assert wrong_gold(dataset) == []
        assert all(image.load().size == (8, 8) for sample in dataset.samples for image in sample.images)
    assert [(sample.id, sample.answer, sample.answer_type) for sample in train.samples] == [
        ("vqa_med/train/0", "cta - ct angiography", "open"),
        ("vqa_med/train/1", "no", "closed"),
        ("vqa_med/train/2", "Sjögren", "open"),
    ]
    assert [(issue.row, issue.reason, issue.action) for issue in train.issues] == [
        (2, "not UTF-8, read as Windows-1252", "repaired"),
        (3, "missing image", "dropped"),
        (4, "wrong number of cells", "dropped"),
    ]
    assert [sample.answer for sample in test.samples] == ["us-d - doppler ultrasound", "ependymoma"]
    assert test[0].groups["family"] == "modality"
    assert [sample.alternatives for sample in test.samples] == [(), ("brain tumor", "glioma")]
    assert is_correct(test[1], "Glioma.") and is_correct(test[1], "ependymoma") and not is_correct(test[1], "tumor")
    assert test.notes == {"dropped: empty answer": 1}
    with pytest.raises(ValueError, match=r"has no val split \(train, test only\)"):
        load(vqa_med, "val")
    with pytest.raises(ValueError, match=r"2 of 5 rows of VQA-Med 2019"):
        load(vqa_med, "train")


def test_categories_of_training_questions_come_from_their_files(vqa_med: Path) -> None:
    below = vqa_med / "ImageClef-2019-VQA-Med-Training" / "QAPairsByCategory"
    below.mkdir()
    (below / "C1_Modality_train.txt").write_bytes(
        b"synpic1|what kind  of image is this?|cta - ct angiography\r\nsynpic2|what is \xe9?|Sj\xf6gren\nshort|line\n"
    )
    (below / "C4_Abnormality_train.txt").write_bytes(b"synpic2|what is \xe9?|Sj\xf6gren\n")
    (below / "C2_Plane_val.txt").write_text("synpic2|is this a t1 weighted image?|no\n")
    train = load(vqa_med, "train", max_dropped=0.5)
    assert [sample.groups.get("family") for sample in train.samples] == ["modality", None, None]
    unknown = [
        issue.row for issue in train.issues if issue.reason == "in no file by category, or in several: no family"
    ]
    assert unknown == [1, 2]
    chosen = load(vqa_med, "train", max_dropped=0.5, families=("modality",))
    assert [sample.id for sample in chosen.samples] == ["vqa_med/train/0"]


def test_missing_files_are_refused(tmp_path: Path, vqa_med: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="There is none of the files All_QA_Pairs_train"):
        load(empty)
    folder = vqa_med / "VQAMed2019Test" / "VQAMed2019_Test_Images"
    folder.rename(folder.with_name("other"))
    with pytest.raises(ValueError, match="There is no folder 'VQAMed2019_Test_Images'"):
        load(vqa_med)
