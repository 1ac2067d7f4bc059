"""MedXpertQA MM, the medical subjects of MMMU and Med-R1's splits, with rows of our own in their published formats.

Run: pytest tests/data/sets/test_benchmarks.py
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_dataset
from medvqa_rl.data.sets.mmmu import SUBJECTS
from medvqa_rl.data.stored import NoSuchSplit, StoredDataset


def load(name: Any, root: Path, split: Any = "test", **settings: Any) -> StoredDataset:
    config = DataConfig(name=name, path=str(root), cache_dir=str(root / "cache"), num_val=None, **settings)
    dataset = load_dataset(config, split)
    assert isinstance(dataset, StoredDataset)
    return dataset


OPTIONS = dict(zip("ABCDE", ["Cyst", "Abscess (chronic)", "Lipoma", "Nevus", "None of these"]))


def expert(number: int, **changes: Any) -> dict[str, Any]:
    """A row as MedXpertQA publishes it."""
    choices = " ".join(f"({letter}) {text}" for letter, text in OPTIONS.items())
    return {
        "id": f"MM-{number}",
        "question": f"A 40-year-old has a lump in region {number}. What is it?\nAnswer Choices: {choices}",
        "options": OPTIONS,
        "label": "B",
        "images": [f"MM-{number}-a.jpeg", f"MM-{number}-b.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Integumentary",
        "question_type": "Reasoning",
    } | changes


def test_medxpertqa(
    tmp_path: Path, write_images: Callable[..., None], wrong_gold: Callable[[StoredDataset], list[str]]
) -> None:
    write_images(tmp_path / "images", *(f"MM-{n}-{side}.jpeg" for n in range(4) for side in "ab"))
    (tmp_path / "MM").mkdir()
    other = expert(2, question="Which of these is it?", label="E")
    bad = expert(3, label="F")
    lines = [json.dumps(row) for row in (expert(0), expert(1), other, bad)]
    (tmp_path / "MM" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    test = load("medxpertqa", tmp_path, max_dropped=0.3)
    assert wrong_gold(test) == [] and len(test) == 3
    first = test[0]
    assert first.question == "A 40-year-old has a lump in region 0. What is it?"
    assert (first.options, first.answer, first.id) == (tuple(OPTIONS.values()), "B", "medxpertqa/MM-0")
    assert [image.key for image in first.images] == ["MM-0-a.jpeg", "MM-0-b.jpeg"]
    assert first.groups == {"family": "Diagnosis", "organ": "Integumentary", "question_type": "Reasoning"}
    assert (test[2].question, test[2].answer) == ("Which of these is it?", "E")
    assert [(issue.number, issue.reason) for issue in test.issues] == [(4, "label outside the options")]
    with pytest.raises(NoSuchSplit, match=r"MedXpertQA MM .* has no train split"):
        load("medxpertqa", tmp_path, "train")


def picture(grey: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{grey}.png"}


def exam(subject: str, number: int, **changes: Any) -> dict[str, Any]:
    """A row as MMMU publishes it."""
    return {
        "id": f"validation_{subject}_{number}",
        "question": f"<image 1> Which structure is marked in case {number}?",
        "options": "['Aorta', \"Bochdalek's triangle\", 'Vena cava', '<image 2>']",
        "explanation": "",
        "image_1": picture(number),
        **{f"image_{n}": None for n in range(2, 8)},
        "img_type": "['Body Scans: MRI, CT scans, and X-rays']",
        "answer": "B",
        "topic_difficulty": "Medium",
        "question_type": "multiple-choice",
        "subfield": "Radiology",
    } | changes


def test_mmmu(tmp_path: Path, wrong_gold: Callable[[StoredDataset], list[str]]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for subject in (*SUBJECTS, "Accounting"):
        rows = [
            exam(subject, 1),
            exam(subject, 2, question="Is <image 2> larger than <image 1>?", image_2=picture(200), answer="D"),
            exam(subject, 3, question_type="open", options="[]", answer="['5', 'five cm']"),
            exam(subject, 4, question_type="open", options="[]", answer="yes"),
            exam(subject, 5, answer="?"),
        ]
        (tmp_path / subject).mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / subject / "validation-00000-of-00001.parquet")
        (tmp_path / subject / "test-00000-of-00001.parquet").write_bytes(b"not read")
    test = load("mmmu_medical", tmp_path, max_dropped=0.3)
    assert wrong_gold(test) == [] and len(test) == 4 * len(SUBJECTS)
    assert {sample.groups["family"] for sample in test.samples} == set(SUBJECTS)
    first, second, third, fourth = test.samples[:4]
    assert first.question == "Which structure is marked in case 1?"
    assert first.options == ("Aorta", "Bochdalek's triangle", "Vena cava", "image 2") and first.answer == "B"
    assert first.groups == {"family": SUBJECTS[0], "subfield": "Radiology", "difficulty": "Medium"}
    assert second.question == "Is image 2 larger than image 1?" and second.answer == "D"
    assert [image.load().getpixel((0, 0)) for image in second.images] == [(2, 2, 2), (200, 200, 200)]
    assert (third.answer_type, third.answers) == ("open", ("5", "five cm")) and fourth.answer_type == "closed"
    assert {issue.reason for issue in test.issues} == {"label outside the options"}
    with pytest.raises(ValueError, match="There are no files of MMMU in"):
        load("mmmu_medical", tmp_path / "Accounting")


def record(number: int, image: str, letter: str, **changes: Any) -> dict[str, str]:
    """A row as Med-R1 publishes it."""
    return {
        "image": f"Images/Chest CT/{image}",
        "problem": f"What imaging technique is used in {number}? A)Mammogram, B)PET, C)CT, D)Fluoroscopy",
        "solution": f"<answer> {letter} </answer>",
    } | changes


def test_med_r1(
    tmp_path: Path, write_images: Callable[..., None], wrong_gold: Callable[[StoredDataset], list[str]]
) -> None:
    write_images(tmp_path / "Images" / "Chest CT", *(f"{n} (9).png" for n in range(40)))
    root = tmp_path / "Splits" / "modality"
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        for name, start in (("CT(Computed Tomography)", 0), ("MRI", 20)):
            rows = [record(n, f"{n} (9).png", "ABCD"[n % 4]) for n in range(start, start + 20)]
            (root / split / f"{name}_{split}.json").write_text(json.dumps(rows))
    odd = [record(0, "0 (9).png", "CT"), record(1, "1 (9).png", "C", problem="What is it?")]
    (root / "test" / "odd_test.json").write_text(json.dumps(odd))
    test = load("med_r1", root)
    assert wrong_gold(test) == [] and len(test) == 41
    first = test[0]
    assert first.question == "What imaging technique is used in 0?"
    assert (first.options, first.answer) == (("Mammogram", "PET", "CT", "Fluoroscopy"), "A")
    assert first.groups == {"family": "CT(Computed Tomography)"} and first.images[0].load().size == (8, 8)
    assert [sample.answer for sample in test.samples if sample.groups["family"] == "odd"] == ["C"]
    assert [(issue.file, issue.number, issue.reason) for issue in test.issues] == [
        ("test/odd_test.json", 2, "no options in the problem")
    ]
    assert len(load("med_r1", root, families=["MRI"])) == 20
    train, val = load("med_r1", root, "train"), load("med_r1", root, "val")
    assert len(train) + len(val) == 40 and len(val) > 0
    (tmp_path / "Images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"no folder '\.\./\.\./Images' in .*set data\.image_folder"):
        load("med_r1", root)
