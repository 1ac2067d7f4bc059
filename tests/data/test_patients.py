"""Columns of patients are recognised however they are written, and patients in two splits are found.

Run: pytest tests/data/test_patients.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.data import load_splits
from medvqa_rl.data.check import check_data
from medvqa_rl.data.division import choose_column
from medvqa_rl.data.patients import (
    PATIENT_COLUMNS,
    POSSIBLE_COLUMNS,
    as_patient,
    patient_column,
    patient_columns,
    unused_columns,
)
from medvqa_rl.models.dimensions import ResizedImages

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.parametrize(
    "name",
    [
        *("patient", "patient_id", "Patient ID", "PatientID", "PATIENT-ID", " patient.id ", "patientId", "Ｐatient"),
        *("MRN", "mrn", "M.R.N.", "subject_id", "SubjectID", "study_uid", "StudyInstanceUID", "Accession #", "患者ID"),
    ],
)
def test_names_of_patients(name: str) -> None:
    assert patient_columns(("image", name, "question")) == (name,)


@pytest.mark.parametrize("name", ["", "image", "inpatient", "patient age", "subject", "case", "id", "outpatient_id"])
def test_other_names(name: str) -> None:
    assert patient_columns((name,)) == ()


def test_documentation_lists_the_names() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert ", ".join(f"`{name}`" for name in PATIENT_COLUMNS) in text
    assert ", ".join(POSSIBLE_COLUMNS[:-1]) + " or " + POSSIBLE_COLUMNS[-1] in text


def test_the_best_column_with_values_is_used() -> None:
    rows: list[dict[str, Any]] = [{"study_uid": "s", "MRN": "", "Patient ID": None}, {"study_uid": "t", "MRN": 7}]
    assert patient_column(rows) == "MRN"
    assert patient_column(rows[:1]) == "study_uid"
    assert patient_column([{"patient": float("nan"), "mrn": " "}]) is None
    assert choose_column(rows) == ("MRN", "")
    by, warning = choose_column([{"Case": "a", "subject": ""}])
    assert by == "image" and warning.startswith("Warning: Case may identify patients") and "--by Case`" in warning
    assert unused_columns([{"exam": 1, "Case No": 3, "visit": None}]) == ["exam"]


def test_the_same_patient_in_other_words() -> None:
    same = [as_patient(value) for value in (17, 17.0, "17", " 17 ", "17.0")]
    assert set(same) == {"17"}
    assert [as_patient(value) for value in (None, float("nan"), "  ")] == ["", "", ""]
    assert as_patient("p 1.0") == "p 1.0"


def own(folder: Path, column: str, patients: dict[str, list[Any]]) -> DataConfig:
    """A table per split with one question per patient given, each about an image of its own."""
    number = 0
    for split, values in patients.items():
        rows = []
        for value in values:
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
            rows.append({"image": f"{number}.png", "question": f"Is it {number}?", "answer": "yes", column: value})
            number += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(name="own", path=str(folder), cache_dir=str(folder / "cache"), num_val=None)


def test_a_patient_in_two_splits_is_wrong(tmp_path: Path) -> None:
    patients = {"train": ["secret-1", 2, 2, "secret-3", None], "val": [4, 4], "test": [2.0, "secret-3", 5, ""]}
    config = own(tmp_path, "Patient ID", patients)
    report = check_data(load_splits(config), cost=ResizedImages())
    (finding,) = [finding for finding in report.findings if "patients" in finding.what]
    assert (finding.level, finding.what, finding.count) == ("wrong", "patients in train and test", 2)
    assert finding.text.startswith("2 of the 3 patients of test are also in train")
    assert finding.examples == (
        "own/test/0 is of the patient of own/train/1",
        "own/test/1 is of the patient of own/train/3",
    )
    assert not re.search("secret", str(report.findings))


@pytest.mark.parametrize("column", ["MRN", "Patient ID", "study_uid"])
def test_a_split_by_image_keeps_patients_together(tmp_path: Path, column: str) -> None:
    config = own(tmp_path, column, {"train": [number % 40 for number in range(120)]})
    datasets = load_splits(config.model_copy(update={"split": "image"}))
    patients = {split: set(dataset.patients) for split, dataset in datasets.items()}  # type: ignore[attr-defined]
    assert sorted(patient for found in patients.values() for patient in found) == sorted(map(str, range(40)))
    assert list(patients) == ["train", "val", "test"]
