"""VQA-Med 2019 and OmniMedVQA in the forms that their owners publish.

Run: pytest tests/data/sets/test_vqa_med.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import StoredDataset


def load(name: Any, root: Path, place: Any = "test", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name=name, path=str(root), **settings), place)
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
        "synpic4|abnormality|what is wrong?|ependymoma#brain tumor\n"
        "synpic4|plane|which plane?|#\n"
    )
    return tmp_path


def test_vqa_med(vqa_med: Path, gold_scores_1: Callable[[StoredDataset], None]) -> None:
    train = load("vqa_med", vqa_med, "train", max_dropped=0.5)
    test = load("vqa_med", vqa_med, max_dropped=0.5)
    for dataset in (train, test):
        gold_scores_1(dataset)
        assert all(image.load().size == (8, 8) for sample in dataset.samples for image in sample.images)
    assert [(sample.id, sample.answer, sample.answer_type) for sample in train.samples] == [
        ("vqa_med/train/0", "cta - ct angiography", "open"),
        ("vqa_med/train/1", "no", "closed"),
        ("vqa_med/train/2", "Sjögren", "open"),
    ]
    assert [(issue.row, issue.reason, issue.action) for issue in train.issues] == [
        (2, "not UTF-8, read as Latin-1", "repaired"),
        (3, "missing image", "dropped"),
        (4, "wrong number of cells", "dropped"),
    ]
    assert [sample.answer for sample in test.samples] == ["us-d - doppler ultrasound", "ependymoma"]
    assert test[0].groups["family"] == "modality"
    assert test.notes == {
        "dropped: empty answer": 1,
        "repaired: several reference answers, the first counts": 1,
    }
    with pytest.raises(ValueError, match=r"has no val split \(train, test only\)"):
        load("vqa_med", vqa_med, "val")
    with pytest.raises(ValueError, match=r"2 of 5 rows of VQA-Med 2019"):
        load("vqa_med", vqa_med, "train")


def test_categories_of_training_questions_come_from_their_files(vqa_med: Path) -> None:
    below = vqa_med / "ImageClef-2019-VQA-Med-Training" / "QAPairsByCategory"
    below.mkdir()
    (below / "C1_Modality_train.txt").write_bytes(
        b"synpic1|what kind  of image is this?|cta - ct angiography\r\nsynpic2|what is \xe9?|Sj\xf6gren\nshort|line\n"
    )
    (below / "C4_Abnormality_train.txt").write_bytes(b"synpic2|what is \xe9?|Sj\xf6gren\n")
    (below / "C2_Plane_val.txt").write_text("synpic2|is this a t1 weighted image?|no\n")
    train = load("vqa_med", vqa_med, "train", max_dropped=0.5)
    assert [sample.groups.get("family") for sample in train.samples] == ["modality", None, None]
    unknown = [
        issue.row for issue in train.issues if issue.reason == "in no file by category, or in several: no family"
    ]
    assert unknown == [1, 2]
    chosen = load("vqa_med", vqa_med, "train", max_dropped=0.5, families=("modality",))
    assert [sample.id for sample in chosen.samples] == ["vqa_med/train/0"]


def test_vqa_med_that_is_not_there(tmp_path: Path, vqa_med: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="There is none of the files All_QA_Pairs_train"):
        load("vqa_med", empty)
    folder = vqa_med / "VQAMed2019Test" / "VQAMed2019_Test_Images"
    folder.rename(folder.with_name("other"))
    with pytest.raises(ValueError, match="There is no folder 'VQAMed2019_Test_Images'"):
        load("vqa_med", vqa_med)


def question(number: int, image: str = "Images/A/1.png", **changes: Any) -> dict[str, Any]:
    row = {
        "dataset": "A",
        "question_id": f"A_{number}",
        "question_type": "Modality Recognition",
        "question": f"What modality is used in {number}?",
        "gt_answer": "MRI",
        "image_path": image,
        "option_A": "CT",
        "option_B": "MRI",
        "modality_type": "MR",
    }
    return {key: value for key, value in (row | changes).items() if value != "absent"}


def test_omnimed_reads_every_file(
    tmp_path: Path, write_images: Callable[..., None], gold_scores_1: Callable[[StoredDataset], None]
) -> None:
    write_images(tmp_path, *(f"Images/A/{index}.png" for index in range(1, 31)))
    below = tmp_path / "QA_information"
    (below / "Open-access").mkdir(parents=True)
    (below / "Restricted-access").mkdir()
    for index in range(1, 31):  # a harness that is often used reads 14 of 30
        rows = [question(0, f"Images/A/{index}.png"), question(1, option_C="X-ray", option_D="MRI scan")]
        (below / "Open-access" / f"part{index}.json").write_text(json.dumps(rows))
    (below / "Restricted-access" / "other.json").write_text(json.dumps([question(0), question(1, gt_answer="A")]))
    test = load("omnimed", tmp_path)
    gold_scores_1(test)
    assert len(test) == 62 and test.issues == () and len({sample.id for sample in test.samples}) == 62
    assert {len(sample.options) for sample in test.samples} == {2, 4}
    assert test[0].groups == {"modality": "MR", "family": "Modality Recognition", "dataset": "A"}
    assert test[-1].answer == "A" and test[0].answer == "B"
    with pytest.raises(ValueError, match=r"has no train split \(test only\): set data\.split=image"):
        load("omnimed", tmp_path, "train")
    parts = [load("omnimed", tmp_path, place, split="image") for place in ("train", "val", "test")]
    images = [{sample.image_key for sample in part.samples} for part in parts]
    assert sum(map(len, parts)) == 62 and sum(map(len, images)) == len(set.union(*images))


def test_bad_rows_of_omnimed_are_named(tmp_path: Path, write_images: Callable[..., None]) -> None:
    write_images(tmp_path, "Images/A/1.png")
    bad: list[tuple[str, dict[str, Any]]] = [
        ("missing image", {"image_path": "Images/A/2.png"}),
        ("answer is none of the options", {"gt_answer": "PET"}),
        ("empty option", {"option_A": "absent", "option_C": "PET"}),
        ("wrong number of options", {"option_B": "absent"}),
        ("empty option", {"option_B": " "}),
        ("no gt_answer", {"gt_answer": None}),
        ("answer is more than one of the options", {"option_A": "MRI"}),
        ("repeated question_id", {"question_id": "A_0"}),
    ]
    rows = [question(0), *(question(10 + i, **changes) for i, (_, changes) in enumerate(bad))]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    dataset = load("omnimed", tmp_path, max_dropped=1.0)
    assert len(dataset) == 1
    assert [(issue.row, issue.reason) for issue in dataset.issues] == [
        (number, reason) for number, (reason, _) in enumerate(bad, start=1)
    ]
    (tmp_path / "questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"questions\.json is not a list of questions"):
        load("omnimed", tmp_path)
