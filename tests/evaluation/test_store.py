"""Appending records costs the same however many there are, also behind the incomplete line of a killed process.

Run: pytest tests/evaluation/test_store.py
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medvqa_rl.evaluation.records import record_line
from medvqa_rl.evaluation.store import RecordFile
from tests.records import make_record

RECORD = make_record(output="<think>The angle is blunted.</think><answer>yes</answer>")


class Counting(io.FileIO):
    """Counts the bytes that are read."""

    read_bytes = 0

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        Counting.read_bytes += count or 0
        return count

    def readall(self) -> bytes:
        found = super().readall()
        Counting.read_bytes += len(found)
        return found


def test_appending_reads_the_end_of_the_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [replace(RECORD, sample_id=str(number)) for number in range(400)]
    file = RecordFile(tmp_path / "samples.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: io.BufferedRandom(Counting(path, mode.replace("b", ""))))
        for start in range(0, 400, 40):
            file.append(records[start : start + 40])
    assert (tmp_path / "samples.jsonl").read_bytes() == "".join(map(record_line, records)).encode()
    assert Counting.read_bytes <= 400 * len(record_line(RECORD)) / 10  # reading all each time: five times their size
