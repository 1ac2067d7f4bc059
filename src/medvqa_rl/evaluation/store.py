"""The folder of an evaluation while it runs: records are appended as they come, so that a killed evaluation goes on
where it stopped, and several processes can share the questions. Imports no torch.

```text
evaluation.json                      what is evaluated how; a continued evaluation must agree
samples.jsonl                        records, in the order of the questions once all are there
shards/samples-0-of-4.jsonl          records of the first of four processes
controls/blank.jsonl                 records of a control; controls/shards/ as above
results.json                         written last: with it the evaluation is complete
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medvqa_rl.core.files import write_json
from medvqa_rl.evaluation.records import EvalRecord, parse_record, record_line, write_records


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th question, beginning with number ``index``."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``0/4``.

        Raises:
            ValueError: it is no such text.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
            raise ValueError(f"The shard {text!r} is not of the form I/N with I from 0 to N - 1, such as 0/4.")
        return cls(int(index), int(count))


class RecordFile:
    """The records of one pass over the questions: of the evaluation itself, or of a control."""

    def __init__(self, path: Path, shard: Shard = Shard()) -> None:
        """
        Args:
            path: where all records will be, such as ``samples.jsonl``.
            shard: which part of the questions this process answers.
        """
        self.path = path
        self._shards = path.parent / "shards"
        name = f"{path.stem}-{shard.index}-of-{shard.count}.jsonl"
        self.own = path if shard.count == 1 else self._shards / name

    def exists(self) -> bool:
        """Whether a process with this shard has begun before; with all questions, whether any has."""
        return self.own.exists() or (self.own == self.path and any(self._parts()))

    def _parts(self) -> list[Path]:
        return sorted(self._shards.glob(f"{self.path.stem}-*-of-*.jsonl"))

    def read(self) -> dict[str, EvalRecord]:
        """All records by sample id, those of other processes included. A last line that a killed process did not
        finish is left out.

        Raises:
            ValueError: another line is no record.
        """
        records: dict[str, EvalRecord] = {}
        for path in [self.path, *self._parts()]:
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                whole = text[: text.rfind("\n") + 1]
                for number, line in enumerate(whole.splitlines(), start=1):
                    record = parse_record(line, f"Line {number} of {path}")
                    records.setdefault(record.sample_id, record)
        return records

    def append(self, records: Sequence[EvalRecord]) -> None:
        """Write records behind those that are there, and see that they reach the disk."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with self.own.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                if whole != size:
                    file.truncate(whole)  # the half line of a killed process
            file.writelines(record_line(record).encode() for record in records)
            file.flush()
            os.fsync(file.fileno())

    def settle(self, ids: Sequence[str]) -> list[EvalRecord] | None:
        """Once there is a record for every id, write all of them to ``path`` in this order.

        Returns:
            The records, or None while some are missing.
        """
        records = self.read()
        if not records.keys() >= set(ids):
            return None
        ordered = [records[id] for id in ids]
        write_records(ordered, self.path)
        return ordered


def agree(folder: Path, identity: Mapping[str, Any], *, write: bool = True) -> None:
    """Compare what is evaluated how with what was written before, and write it down.

    Args:
        write: False compares only; what was never begun must not claim the folder.

    Raises:
        ValueError: an evaluation of something else has begun in the folder; the message names what differs.
    """
    path = folder / "evaluation.json"
    given = json.loads(json.dumps(identity))
    before = read_identity(folder)
    different = sorted(key for key in before.keys() & given.keys() if before[key] != given[key])
    if different:
        told = "; ".join(f"{key} was {before[key]!r} and is {given[key]!r}" for key in different)
        raise ValueError(
            f"The folder {folder} holds an evaluation of something else ({told}): restore what differs, or choose "
            "another folder with --output."
        )
    if write and given.keys() - before.keys():
        write_json(path, before | given)


def read_identity(folder: Path) -> dict[str, Any]:
    """What :func:`agree` wrote; empty before that.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {path} is damaged ({error}): choose another folder with --output.") from error
    if not isinstance(identity, dict):
        raise ValueError(f"The file {path} is damaged (it holds no mapping): choose another folder with --output.")
    return identity
