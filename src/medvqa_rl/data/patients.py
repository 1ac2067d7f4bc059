"""Recognise the column of a table that identifies patients. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from medvqa_rl.data.reading.columns import folded
from medvqa_rl.data.reading.rows import is_missing, without_point_zero

PATIENT_COLUMNS = (
    *("patient", "patients", "patient_id", "id_patient", "patient_uid", "patient_identifier", "patient_key"),
    *("patient_number", "patient_no", "patient_nr", "patient_code", "patient_name", "patient_hash", "pat_id"),
    *("pid", "pt_id", "mrn", "medical_record_number", "medical_record_no", "medical_record_id", "hospital_number"),
    *("subject_id", "subject_uid", "subject_number", "subject_no", "subject_key", "subject_code"),
    *("participant_id", "participant_number", "person_id", "person_uid"),
    *("patienten_id", "patientennummer", "id_paciente", "paciente_id", "nhc", "numero_patient"),
    *("患者", "患者id", "病人", "病人id", "病历号", "住院号"),
    # Coarser than an image, finer than a patient.
    *("study_uid", "study_id", "study_instance_uid", "accession", "accession_number", "accession_no"),
    *("case_id", "case_uid", "case_number", "case_no", "exam_id", "exam_uid", "examination_id"),
    *("encounter_id", "admission_id", "hadm_id", "visit_id"),
)
"""Recognised names, the best first; case, blanks and punctuation do not count, so "Patient ID" is patient_id."""

POSSIBLE_COLUMNS = ("subject", "case", "study", "exam", "examination", "person", "participant", "session", "visit")
"""Names that may identify patients, or mean something else: they are not used without ``--by``."""


_RANK = {folded(name): rank for rank, name in reversed(list(enumerate(PATIENT_COLUMNS)))}
_POSSIBLE = {folded(name) for name in POSSIBLE_COLUMNS}


@cache
def patient_columns(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The columns that identify patients, the best first (:data:`PATIENT_COLUMNS`)."""
    return tuple(sorted((name for name in columns if folded(name) in _RANK), key=lambda name: _RANK[folded(name)]))


def as_patient(value: Any) -> str:
    """A patient as text: "17" for 17 and for 17.0, which spreadsheets and pandas make of it; "" for an empty cell."""
    return "" if is_missing(value) else without_point_zero(" ".join(str(value).split()))


def patient_of(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The first patient column of a row that has a value, and the patient; empty texts if there is none."""
    for column in patient_columns(tuple(fields)):
        if patient := as_patient(fields[column]):
            return column, patient
    return "", ""


def patient_column(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The best patient column in which any row of a table has a value."""
    filled = dict.fromkeys(column for row in rows if (column := patient_of(row)[0]))
    return next(iter(patient_columns(tuple(filled))), None)


def unused_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns with values whose names may identify patients (:data:`POSSIBLE_COLUMNS`)."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if folded(name) in _POSSIBLE and any(row.get(name) for row in rows)]
