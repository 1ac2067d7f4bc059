"""The folder of an evaluation in progress. Records are appended batch by batch, so that an interrupted evaluation can
be resumed and several processes can share the questions. Imports no torch.

```text
evaluation.json                      what is evaluated, and how; must be unchanged to resume
samples.jsonl                        records, in the order of the questions once all are present
shards/samples-0-of-4.jsonl          records of the first of four processes
controls/blank.jsonl                 records of a control; controls/shards/ as above
.lock, .lock-0-of-4                  held by the process that answers
results.json                         written last: its presence means that the evaluation is complete
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medvqa_rl.core.files import read_json, write_json, writing
from medvqa_rl.core.machine import ProcessLock
from medvqa_rl.core.text import shown
from medvqa_rl.evaluation.records import EvalRecord, parse_record, record_line, write_records

_IDENTITY = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th question, starting at ``index``."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``0/4``.

        Raises:
            ValueError: the text has another format.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
            raise ValueError(f"The shard {shown(text)} is not of the format I/N with I from 0 to N - 1, such as 0/4.")
        return cls(int(index), int(count))


@contextmanager
def hold_shard(folder: Path, shard: Shard) -> Iterator[None]:
    """Let only this process answer a shard of the evaluation in ``folder``. If nothing is written in the block, a new
    folder is removed, with the folders above it that were made for it.

    Raises:
        ValueError: another process answers it; the message names the process.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = ProcessLock(folder / (".lock" if shard.count == 1 else f".lock-{shard.index}-of-{shard.count}"))
    what = "is evaluating" if shard.count == 1 else f"is answering shard {shard}"
    lock.acquire(f"{what} in {folder}: wait for it, stop it, or choose another folder with --output.")
    try:
        yield
    finally:
        lock.release()
        if new and list(folder.iterdir()) == [lock.path]:
            shutil.rmtree(folder)
            with suppress(OSError):  # not empty, such as that of a run that has started
                for above in new[1:]:
                    above.rmdir()


class RecordFile:
    """The records of one pass over the questions: the evaluation itself, or a control."""

    def __init__(self, path: Path, shard: Shard = Shard()) -> None:
        """
        Args:
            path: the final file with all records, such as ``samples.jsonl``.
            shard: the part of the questions that this process answers.
        """
        self.path = path
        self._shards = path.parent / "shards"
        name = f"{path.stem}-{shard.index}-of-{shard.count}.jsonl"
        self.own = path if shard.count == 1 else self._shards / name

    def exists(self) -> bool:
        """Whether an evaluation with this shard, or with any if this is the only one, has been started."""
        return self.own.exists() or (self.own == self.path and any(self._parts()))

    def _parts(self) -> list[Path]:
        return sorted(self._shards.glob(f"{self.path.stem}-*-of-*.jsonl"))

    def read(self) -> dict[str, EvalRecord]:
        """Read all records by sample id, including those of other processes. An incomplete last line, left by a killed
        process, is skipped.

        Raises:
            ValueError: another line is not a record.
        """
        records: dict[str, EvalRecord] = {}
        for path in [self.path, *self._parts()]:
            if path.is_file():
                *complete, _ = path.read_bytes().split(b"\n")
                for number, line in enumerate(complete, start=1):
                    record = parse_record(line, f"Line {number} of {path}")
                    records.setdefault(record.sample_id, record)
        return records

    def append(self, records: Sequence[EvalRecord]) -> None:
        """Append records and flush them to disk."""
        self.own.parent.mkdir(parents=True, exist_ok=True)
        with writing(self.own), self.own.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a killed process left an incomplete line
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.writelines(record_line(record).encode() for record in records)
            file.flush()
            os.fsync(file.fileno())

    def settle(self, ids: Sequence[str], own: Sequence[str] = ()) -> list[EvalRecord] | None:
        """Once every id has a record, write all records to ``path`` in the order of the ids.

        Args:
            own: ids that this process has answered.

        Returns:
            The records, or None while some are missing.

        Raises:
            ValueError: records of this process are no longer in the folder.
        """
        records = self.read()
        if lost := [id for id in own if id not in records]:
            raise ValueError(
                f"The records of {len(lost)} of {len(ids)} questions are no longer in {self.own}, which was removed "
                "or changed during the evaluation: run the command with --resume to answer them again."
            )
        if not records.keys() >= set(ids):
            return None
        ordered = [records[id] for id in ids]
        write_records(ordered, self.path)
        return ordered


def agree(folder: Path, identity: Mapping[str, Any], *, write: bool = True) -> None:
    """Check that an evaluation is the one that its folder was started with, and record what it is.

    Args:
        folder: of the evaluation.
        identity: everything that the answers depend on, by name.
        write: False only checks, so that an evaluation that fails to start does not claim the folder.

    Raises:
        ValueError: the folder holds a different evaluation; the message names the differences.
    """
    path = folder / "evaluation.json"
    given = json.loads(json.dumps(identity))
    before = read_identity(folder)
    different = sorted(key for key in before.keys() & given.keys() if before[key] != given[key])
    if different:
        changes = "; ".join(f"{key} was {shown(before[key])} and is {shown(given[key])}" for key in different)
        raise ValueError(
            f"The folder {folder} holds a different evaluation ({changes}): restore these, or choose another folder "
            "with --output."
        )
    if write and given.keys() - before.keys():
        write_json(path, before | given)


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what :func:`agree` wrote; empty if it wrote nothing yet.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "evaluation.json"
    if not path.is_file():
        return {}
    return read_json(_IDENTITY, path, "choose another folder with --output")
