"""OmniMedVQA in the authors' format.

Run: pytest tests/data/sets/test_omnimed.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import StoredDataset


def load(root: Path, part: Any = "test", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name="omnimed", path=str(root), **settings), part)
    assert isinstance(dataset, StoredDataset)
    return dataset


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


def test_every_file_is_read(
    tmp_path: Path, write_images: Callable[..., None], wrong_gold: Callable[[StoredDataset], list[str]]
) -> None:
    write_images(tmp_path, *(f"Images/A/{index}.png" for index in range(1, 31)))
    below = tmp_path / "QA_information"
    (below / "Open-access").mkdir(parents=True)
    (below / "Restricted-access").mkdir()
    for index in range(1, 31):  # a harness that is often used reads 14 of 30
        rows = [question(0, f"Images/A/{index}.png"), question(1, option_C="X-ray", option_D="MRI scan")]
        (below / "Open-access" / f"part{index}.json").write_text(json.dumps(rows))
    (below / "Restricted-access" / "other.json").write_text(json.dumps([question(0), question(1, gt_answer="A")]))
    test = load(tmp_path)
    assert wrong_gold(test) == []
    assert len(test) == 62 and test.issues == () and len({sample.id for sample in test.samples}) == 62
    assert {len(sample.options) for sample in test.samples} == {2, 4}
    assert test[0].groups == {"modality": "MR", "family": "Modality Recognition", "dataset": "A"}
    assert test[-1].answer == "A" and test[0].answer == "B"
    with pytest.raises(ValueError, match=r"has no train split \(test only\): set data\.split=image"):
        load(tmp_path, "train")
    parts = [load(tmp_path, place, split="image") for place in ("train", "val", "test")]
    images = [{sample.image_key for sample in part.samples} for part in parts]
    assert sum(map(len, parts)) == 62 and sum(map(len, images)) == len(set.union(*images))


def test_bad_rows_are_reported(tmp_path: Path, write_images: Callable[..., None]) -> None:
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
    dataset = load(tmp_path, max_dropped=1.0)
    assert len(dataset) == 1
    assert [(issue.row, issue.reason) for issue in dataset.issues] == [
        (number, reason) for number, (reason, _) in enumerate(bad, start=1)
    ]
    (tmp_path / "questions.json").write_text("{}")
    with pytest.raises(ValueError, match=r"questions\.json is not a list of questions"):
        load(tmp_path)
