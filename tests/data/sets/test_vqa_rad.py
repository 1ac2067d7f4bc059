"""VQA-RAD: counts and fingerprints of the real files, and bad rows.

Run: pytest tests/data/sets/test_vqa_rad.py
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.sets.vqa_rad import FILE, load_vqa_rad
from medvqa_rl.data.splits import SPLITS, Split
from medvqa_rl.data.stored import StoredDataset


def load(root: Path, part: Split, **settings: Any) -> StoredDataset:
    return load_vqa_rad(DataConfig(name="vqa_rad", path=str(root), **{"num_val": None, **settings}), part)


# --- the real files ------------------------------------------------------------------------------------------------


@pytest.fixture
def real(shared_data: Path) -> Path:
    return shared_data / "vqa_rad"


def counts(*datasets: StoredDataset) -> dict[str, int]:
    samples = [sample for dataset in datasets for sample in dataset.samples]
    groups = Counter(value for sample in samples for value in sample.groups.values())
    types = Counter(sample.answer_type for sample in samples)
    return {
        "qa": len(samples),
        "images": len({sample.image_key for sample in samples}),
        "closed": types["closed"],
        "open": types["open"],
        **{name: groups[name] for name in ("yes/no", "chest", "abdomen", "head")},
    }


def test_the_official_split_has_its_known_counts(real: Path) -> None:
    train, val, test = (load(real, split) for split in SPLITS)
    assert counts(train, val) == {
        "qa": 1797,
        "images": 313,
        "closed": 1027,
        "open": 770,
        "yes/no": 942,
        "chest": 620,
        "abdomen": 581,
        "head": 596,
    }
    assert counts(test) == {
        "qa": 451,
        "images": 203,
        "closed": 272,
        "open": 179,
        "yes/no": 251,
        "chest": 174,
        "abdomen": 158,
        "head": 119,
    }
    assert test.notes["test images that also occur in train"] == 202
    # Validation images are taken from training whole.
    assert not {sample.image_key for sample in train.samples} & {sample.image_key for sample in val.samples}
    assert 20 <= counts(val)["images"] <= 45


def test_irregular_rows_are_repaired_and_counted(real: Path) -> None:
    dataset = load(real, "test")
    assert {key: value for key, value in dataset.notes.items() if key.startswith(("dropped", "repaired"))} == {
        "repaired: answer that is a number": 5,
        "repaired: blanks in answer_type": 2,
        "repaired: misspelt question_type": 2,
    }
    samples = [sample for split in SPLITS for sample in load(real, split).samples]
    assert len({sample.id for sample in samples}) == len(samples) == 2248
    assert {sample.id: sample.answer for sample in samples if sample.id in ("vqa_rad/0", "vqa_rad/1511")} == {
        "vqa_rad/0": "Yes",
        "vqa_rad/1511": "4",
    }
    tags = Counter(tag for sample in samples for tag in sample.groups["family"].split("+"))
    known = "ABN ATTRIB COLOR COUNT MODALITY ORGAN OTHER PLANE POS PRES SIZE"
    assert " ".join(sorted(tags)) == known
    closed = Counter(
        sample.answer.lower() if sample.groups["answer_kind"] == "yes/no" else "other"
        for sample in samples
        if sample.answer_type == "closed"
    )
    assert closed == {"no": 606, "yes": 587, "other": 106}


def test_every_gold_answer_scores_1(real: Path, wrong_gold: Callable[[StoredDataset], list[str]]) -> None:
    for split in SPLITS:
        assert wrong_gold(load(real, split)) == []


@pytest.mark.parametrize(
    ("kind", "fingerprints"),
    [
        ("official", ["3f7020a9af6568db", "cd2a236766a001dc", "047a3b30661526e5"]),
        ("image", ["89e2b30868379f83", "f742ca36ecb1ef73", "9aa2c12485b2d4ca"]),
    ],
)
def test_fingerprints_are_stable(real: Path, kind: str, fingerprints: list[str]) -> None:
    assert [load(real, split, split=kind).fingerprint for split in SPLITS] == fingerprints


def test_the_image_split_keeps_images_and_cases_together(real: Path) -> None:
    parts = [load(real, split, split="image") for split in SPLITS]
    ids = [sample.id for part in parts for sample in part.samples]
    assert len(ids) == len(set(ids)) == 2248
    images = [{sample.image_key for sample in part.samples} for part in parts]
    assert sum(map(len, images)) == len(set.union(*images)) == 314
    assert len(images[1]) > 20 and len(images[2]) > 20
    # Two images of one case on MedPix.
    assert any({"synpic55286.jpg", "synpic55245.jpg"} <= part for part in images)
    assert [part.fingerprint for part in parts] != [
        load(real, split, split="image", seed=1).fingerprint for split in SPLITS
    ]


def test_a_real_image_is_decoded(real: Path) -> None:
    image = load(real, "test")[0].images[0]
    assert image.key.startswith("synpic")
    assert image.load().mode == "RGB"


def test_limits_and_filters_of_the_real_data(real: Path) -> None:
    few = load(real, "train", num_train=50)
    assert len(few) == 50
    assert {sample.id for sample in few.samples} <= {s.id for s in load(real, "train", num_train=60).samples}
    closed = load(real, "test", answer_types=("closed",))
    assert len(closed) == 272
    planes = load(real, "test", families=("PLANE", "modality"))
    assert {tag for sample in planes.samples for tag in sample.groups["family"].split("+")} <= {"PLANE", "MODALITY"}
    with pytest.raises(ValueError, match=r"No question is left .* it has closed and open"):
        load(real, "test", answer_types=("choice",))
    with pytest.raises(ValueError, match=r"and it has ABN, ATTRIB"):
        load(real, "test", families=("LOCATION",))


# --- bad rows ------------------------------------------------------------------------------------------------------


def row(number: object, **changes: Any) -> dict[str, Any]:
    return {
        "qid": number,
        "image_name": "a.jpg",
        "image_organ": "CHEST",
        "question": "Is there a mass?",
        "answer": "Yes",
        "answer_type": "CLOSED",
        "question_type": "PRES",
        "phrase_type": "test_freeform",
        **changes,
    }


def write(root: Path, rows: list[dict[str, Any]], images: tuple[str, ...] = ("a.jpg", "b.jpg")) -> Path:
    (root / "images").mkdir(exist_ok=True)
    for name in images:
        Image.new("L", (8, 8), 90).save(root / "images" / name)
    (root / FILE).write_text(json.dumps(rows))
    return root


def test_limits_and_filters(tmp_path: Path) -> None:
    kinds = ("CLOSED", "PRES"), ("OPEN", "PLANE"), ("OPEN", "PLANE, MODALITY"), ("CLOSED", "ABN")
    rows = []
    for number in range(80):
        answer_type, question_type = kinds[number % 4]
        question = row(number, answer_type=answer_type, question_type=question_type, image_name=f"{number // 2}.jpg")
        rows += [question, question | {"qid": f"train {number}", "phrase_type": "freeform"}]
    write(tmp_path, rows, tuple(f"{number}.jpg" for number in range(40)))
    few = load(tmp_path, "train", num_train=30)
    assert len(few) == 30
    assert {sample.id for sample in few.samples} <= {s.id for s in load(tmp_path, "train", num_train=40).samples}
    assert len(load(tmp_path, "test", answer_types=("closed",))) == 40
    planes = load(tmp_path, "test", families=("PLANE", "modality"))
    assert len(planes) == 40
    assert {sample.groups["family"] for sample in planes.samples} == {"PLANE", "MODALITY+PLANE"}
    with pytest.raises(ValueError, match=r"No question is left .* it has closed and open"):
        load(tmp_path, "test", answer_types=("choice",))
    with pytest.raises(ValueError, match=r"and it has ABN, MODALITY, PLANE, PRES"):
        load(tmp_path, "test", families=("LOCATION",))


BAD: dict[str, dict[str, Any]] = {
    "missing image": {"image_name": "none.jpg"},
    "unreadable image": {"image_name": "broken.jpg"},
    "empty question": {"question": "  "},
    "empty answer": {"answer": ""},
    "no answer": {"answer": None},
    "unknown answer_type": {"answer_type": "MAYBE"},
    "unknown phrase_type": {"phrase_type": "dev"},
    "repeated qid": {"qid": 0},
    "image path leaves the folder": {"image_name": "../a.jpg"},
    "empty image file": {"image_name": "empty.jpg"},
    "question is not text": {"question": ["Is there a mass?"]},
    "NUL character in answer": {"answer": "y\0es"},
    "half a character in question": {"question": "\ud800?"},
}


def test_unusable_rows_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(0), *(row(index, **changes) for index, changes in enumerate(BAD.values(), start=1)), row("x")]
    write(tmp_path, rows)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"<html>")
    (tmp_path / "images" / "empty.jpg").touch()
    (tmp_path / "a.jpg").write_bytes((tmp_path / "images" / "a.jpg").read_bytes())
    dataset = load(tmp_path, "test", max_dropped=0.9)
    assert [sample.id for sample in dataset.samples] == ["vqa_rad/0", "vqa_rad/x"]
    assert {key: value for key, value in dataset.notes.items() if key.startswith("dropped")} == {
        f"dropped: {reason}": 1 for reason in BAD
    }
    for number, reason in enumerate(BAD, start=1):
        assert re.search(f"{re.escape(reason)}: rows? {number + 1}", caplog.text)
        assert (number, FILE, reason, "dropped") in {issue[:4] for issue in dataset.issues}
    assert len(dataset.issues) == len(BAD)
    load(tmp_path, "test", max_dropped=0.9)
    assert caplog.text.count("dropped, empty answer") == 1  # the same rows are not named again


def test_too_many_unusable_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [row(index, image_name="b.jpg" if index else "none.jpg") for index in range(10)])
    assert len(load(tmp_path, "test", max_dropped=0.1)) == 9
    with pytest.raises(
        ValueError,
        match=r"1 of 10 rows .*missing image: rows 1 .*data\.max_dropped = 0\.05 .*set data\.max_dropped=0\.1",
    ):
        load(tmp_path, "test")


def test_values_are_cleaned(tmp_path: Path) -> None:
    changes = {"answer": 4, "answer_type": "OPEN ", "question_type": "PRSE, ATRIB", "question": " How  many? "}
    write(tmp_path, [row(7, image_organ="NECK", **changes)])
    dataset = load(tmp_path, "test")
    (sample,) = dataset.samples
    assert [(issue.row, issue.reason, issue.action, issue.detail) for issue in dataset.issues] == [
        (0, "blanks in answer_type", "repaired", "'OPEN '"),
        (0, "answer that is a number", "repaired", "4"),
        (0, "misspelt question_type", "repaired", "PRSE, ATRIB"),
    ]
    assert (sample.id, sample.question, sample.answer, sample.answer_type) == ("vqa_rad/7", "How many?", "4", "open")
    assert sample.groups == {"organ": "neck", "family": "ATTRIB+PRES", "answer_kind": "other"}


def test_special_strings_in_questions_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [row(1, question="Is <|image_pad|> here?"), row(2, question="Is </think> here?"), row(3)])
    assert load(tmp_path, "test").notes["neutralised: questions with special-token strings"] == 2


def test_the_folder_name_of_the_archive_is_known(tmp_path: Path) -> None:
    write(tmp_path, [row(1), row(2, phrase_type="para", image_name="b.jpg")])
    before = load(tmp_path, "test")
    (tmp_path / "images").rename(tmp_path / "VQA_RAD Image Folder")
    after = load(tmp_path, "test")
    assert after.fingerprint == before.fingerprint
    assert after[0].images[0].load().size == (8, 8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / FILE).unlink(), "There is no file"),
        (lambda root: (root / FILE).write_text("[{"), "is not JSON"),
        (lambda root: (root / FILE).write_bytes(b"\xff\xfe\x00"), "is UTF-16"),
        (lambda root: (root / FILE).write_text("[" * 100_000), "nested too deeply"),
        (lambda root: (root / FILE).write_text("{}"), "is not a list of questions"),
        (lambda root: (root / FILE).write_text("[]"), "is not a list of questions"),
        (lambda root: [path.unlink() for path in (root / "images").iterdir()], "No question is left"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, spoil: Any, message: str) -> None:
    write(tmp_path, [row(1), row(2)])
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, "test", max_dropped=1.0)
    assert str(tmp_path) in str(caught.value)


def test_missing_folders_and_empty_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        load_dataset(DataConfig(name="vqa_rad"), "train")
    with pytest.raises(ValueError, match="does not exist"):
        load_dataset(DataConfig(name="vqa_rad", path=str(tmp_path / "none")), "train")
    write(tmp_path, [row(1)])
    with pytest.raises(ValueError, match=r"No question is left in the train split .* too few images or patients"):
        load(tmp_path, "train")
