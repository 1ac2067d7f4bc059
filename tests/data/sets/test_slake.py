"""SLAKE: languages, bad rows, and splits.

Run: pytest tests/data/sets/test_slake.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import StoredDataset


def load(root: Path, place: Any = "train", name: Any = "slake_en", **settings: Any) -> StoredDataset:
    dataset = load_dataset(DataConfig(name=name, path=str(root), **settings), place)
    assert isinstance(dataset, StoredDataset)
    return dataset


def row(number: Any, image: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": f"Is number {number} in the lung?",
        "answer": "Yes",
        "q_lang": "en",
        "location": "Lung",
        "modality": "CT",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "triple": ["vhead", "_", "_"],
        "qid": number,
        "content_type": "Position",
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path, write_images: Callable[..., None]) -> Path:
    write_images(tmp_path / "imgs", *(f"xmlab{index}/source.jpg" for index in range(6)))
    chinese = {"q_lang": "zh", "question": "这是肺吗？", "answer": "是"}
    train = [row(0), row(1, answer="Liver", answer_type="OPEN"), row(2, 2, **chinese), row(3, 2, answer=2)]
    (tmp_path / "train.json").write_text(json.dumps(train), encoding="utf-8")
    (tmp_path / "validate.json").write_text(json.dumps([row(10, 3), row(11, 3, **chinese)]), encoding="utf-8")
    # Its image is in the English training split, so mixing the languages would leak it.
    test = [row(20, 4), row(21, 1, **chinese), row(22, 5, **chinese)]
    (tmp_path / "test.json").write_text(json.dumps(test, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_the_language_is_filtered_first(folder: Path, wrong_gold: Callable[[StoredDataset], list[str]]) -> None:
    train, val, test = (load(folder, split) for split in ("train", "val", "test"))
    assert [part.name for part in (train, val, test)] == [f"slake_en/official/{s}" for s in ("train", "val", "test")]
    assert [sample.id for sample in train.samples] == ["slake_en/0", "slake_en/1", "slake_en/3"]
    assert train.notes == {"repaired: number in place of text": 1, "left out: question in the other language": 1}
    images = [{sample.image_key for sample in part.samples} for part in (train, val, test)]
    assert sum(map(len, images)) == len(set.union(*images))
    chinese = load(folder, "test", "slake_zh")
    assert [sample.answer for sample in chinese.samples] == ["是", "是"]
    for part in (train, val, test, chinese):
        assert wrong_gold(part) == []
    assert train[0].groups == {"modality": "CT", "organ": "Lung", "family": "Position", "answer_kind": "yes/no"}
    assert [sample.answer_type for sample in train.samples] == ["closed", "open", "closed"]


def test_questions_in_the_other_language_do_not_count_as_dropped(folder: Path) -> None:
    assert len(load(folder, "test", max_dropped=0.0)) == 1


def test_bad_rows_are_reported(folder: Path, write_images: Callable[..., None]) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("missing image", {"img_name": "xmlab99/source.jpg"}),
        ("empty image file", {"img_name": "xmlab6/source.jpg"}),
        ("unknown q_lang", {"q_lang": "fr"}),
        ("no q_lang", {"q_lang": None}),
        ("unknown answer_type", {"answer_type": "MAYBE"}),
        ("empty answer", {"answer": ""}),
        ("question is not text", {"question": ["a"]}),
        ("repeated qid", {"qid": "0", "question": "Another?"}),
    ]
    (folder / "imgs" / "xmlab6").mkdir()
    (folder / "imgs" / "xmlab6" / "source.jpg").write_bytes(b"")
    rows: list[Any] = [row(0), *(row(50 + i, **changes) for i, (_, changes) in enumerate(bad)), 7]
    (folder / "train.json").write_text(json.dumps(rows))
    dataset = load(folder, max_dropped=1.0)
    assert [sample.id for sample in dataset.samples] == ["slake_en/0"]
    found = [(issue.row, issue.reason) for issue in sorted(dataset.issues)]
    assert found == [*((i, reason) for i, (reason, _) in enumerate(bad, start=1)), (9, "not a JSON object")]
    with pytest.raises(ValueError, match=r"9 of 10 rows of SLAKE \(en\)"):
        load(folder)


def test_the_image_split_and_the_other_name_of_the_validation_file(folder: Path) -> None:
    (folder / "validate.json").rename(folder / "validation.json")
    assert len(load(folder, "val")) == 1
    total = 0
    for split in ("train", "val", "test"):
        try:
            total += len(load(folder, split, split="image"))
        except ValueError as error:
            assert "No question is left" in str(error)
    assert total == 5


def test_families_are_content_types(folder: Path) -> None:
    assert len(load(folder, families=("position",))) == 3
    with pytest.raises(ValueError, match="it has Position"):
        load(folder, families=("Plane",))


@pytest.mark.parametrize(
    ("question", "answer", "answer_type", "kind"),
    [
        ("图中包含肝脏吗？", "包含", "CLOSED", "yes/no"),
        ("图中包含肝脏吗？", "不包含。", "CLOSED", "yes/no"),
        ("图像里是否有肿块？", "没有", "CLOSED", "yes/no"),
        ("肺正常吗？", "不正常", "CLOSED", "yes/no"),
        ("这是不是CT？", "是的", "CLOSED", "yes/no"),
        ("肺是正常的还是异常的？", "正常", "CLOSED", "other"),
        ("肺的状态是什么？", "正常", "OPEN", "other"),
        ("图像里有什么器官？", "肺", "OPEN", "other"),
        ("这是CT吗，还是MRI？", "CT", "CLOSED", "other"),
    ],
)
def test_chinese_answers_are_yes_or_no_by_their_words_and_the_question(
    folder: Path, question: str, answer: str, answer_type: str, kind: str
) -> None:
    changes = {"q_lang": "zh", "question": question, "answer": answer, "answer_type": answer_type}
    (folder / "test.json").write_text(json.dumps([row(20, 4, **changes)]), encoding="utf-8")
    assert load(folder, "test", "slake_zh")[0].groups["answer_kind"] == kind
