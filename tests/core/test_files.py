"""Atomic writes, and the checkpoints of a run."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from medvqa_rl.core.files import (
    AppendedFile,
    cache_folder,
    checkpoint_folder,
    describe_os_error,
    find_checkpoint,
    json_lines,
    note_on_best,
    partial_path,
    read_json_lines,
    remove_partials,
    temporary_folder,
    write_json,
    write_text,
    write_whole,
    writing,
)


def test_a_file_appears_with_all_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with write_whole(path) as partial:
        partial.write_bytes(b"half")
        assert not path.exists() and partial.parent == path.parent
        partial.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt), write_whole(path) as partial:
        partial.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [".", "folder", "folder/.."])
def test_a_folder_is_not_replaced_by_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(IsADirectoryError), write_whole(Path(name)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_best_checkpoint_that_was_removed_is_missed(tmp_path: Path) -> None:
    for status in ("{}", '{"best_step": null}'):
        (tmp_path / "status.json").write_text(status)
        assert note_on_best(tmp_path) is None
    write_json(tmp_path / "status.json", {"best_step": 40})
    assert note_on_best(tmp_path) == (
        f"The best checkpoint of {tmp_path}, of step 40, was removed: the last checkpoint takes its place."
    )


def test_a_file_that_grows_survives_its_removal(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1\n")
    file = AppendedFile(tmp_path / "x")
    file.append(b"2\n")
    assert not file.restore() and file.length == 4
    (tmp_path / "x").unlink()
    file.append(b"3\n")
    assert file.restore() and (tmp_path / "x").read_bytes() == b"1\n2\n3\n"
    (tmp_path / "x").rename(tmp_path / "y")
    (tmp_path / "x").write_bytes(b"other\n")
    assert file.restore() and not file.restore()
    file.append(b"4\n")
    file.flush()
    file.close()
    assert (tmp_path / "x").read_bytes() == b"1\n2\n3\n4\n" and file.length == 8


@pytest.mark.parametrize("write", [lambda path: path.write_text("x" * 2000), lambda path: path.open("xb").write(b"")])
def test_a_failed_write_names_the_file_and_leaves_nothing(
    tmp_path: Path, file_limit: Any, write: Callable[[Path], object]
) -> None:
    path = tmp_path / "x"
    with pytest.raises(OSError) as caught, file_limit(1000), write_whole(path) as partial:
        partial.touch()
        write(partial)
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "number", "name"),
    [
        (Exception("File too large (os error 27)"), errno.EFBIG, "new"),  # tokenizers
        (RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"), errno.ENOSPC, "new"),
        (OSError(errno.EIO, "Input/output error"), errno.EIO, "new"),
        (OSError(errno.EACCES, "Permission denied", "other"), errno.EACCES, "other"),
        (OSError(errno.ENOSPC, "No space left on device", "other", None, "tmp/a"), errno.ENOSPC, "new"),  # a copy
        (OSError("image file is truncated"), None, None),  # read, not written
    ],
)
def test_errors_of_libraries_name_what_is_written(error: Exception, number: int | None, name: str | None) -> None:
    with pytest.raises(OSError) as caught, writing(Path("new"), Path("tmp")):
        raise error
    assert (caught.value.errno, caught.value.filename) == (number, name)


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match="no number"), writing(Path("new")):
        raise ValueError("no number")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"No space is left on the device \(runs/x\): free some"),
        (errno.EFBIG, r"A file would exceed the size limit .* \(runs/x\): raise the limit with `ulimit -f unlimited`"),
        (errno.EACCES, r"Permission denied \(runs/x\): check the path and its permissions\."),
    ],
)
def test_the_reason_of_the_system_is_a_sentence(number: int, message: str) -> None:
    assert re.match(message, describe_os_error(OSError(number, os.strerror(number), "runs/x")))


def test_a_temporary_folder_is_renamed_or_removed(tmp_path: Path, file_limit: Any) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = partial_path(tmp_path / "a")
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    (left / "inside").mkdir(parents=True)
    (tmp_path / left.name.replace(f"-{dead.pid}-", "-notes-")).mkdir()  # not ours
    with temporary_folder(tmp_path / "b") as folder:
        (folder / "x").touch()
        folder.rename(tmp_path / "b")
    with pytest.raises(OSError) as caught, file_limit(1000), temporary_folder(tmp_path / "c") as folder:
        (folder / "x").write_bytes(bytes(2000))
    assert caught.value.filename == str(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir() if "notes" not in path.name) == ["b"]
    assert len(list(tmp_path.iterdir())) == 2


def test_partial_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with write_whole(tmp_path / "shards" / "a.jsonl") as partial:
        partial.touch()
        left = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
        elsewhere = partial.with_name(f".a.jsonl.another-host-{dead.pid}-0a0a0a0a.partial")
        left.touch()
        elsewhere.touch()
        remove_partials(tmp_path)
        assert partial.exists() and elsewhere.exists() and not left.exists()


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_json(tmp_path / "x.json", {"ä": 1, "b": [math.nan, math.inf]})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert json.loads(path.read_text("utf-8")) == {"ä": 1, "b": [None, None]} and "ä" in path.read_text("utf-8")


def test_lone_surrogates_are_replaced_only_on_request(tmp_path: Path) -> None:
    assert write_text(tmp_path / "x", "a\ud800b", errors="replace").read_text() == "a?b"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "y", "a\ud800b")
    assert not (tmp_path / "y").exists()


def test_only_newlines_end_a_line_of_json_lines() -> None:
    texts = ["a\u2028b", "\u0085", "\x0b\x0c\x1c\u2029", ""]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    assert [json.loads(line) for line in json_lines(lines)] == texts
    assert json_lines("") == [] and json_lines("1\n\n2") == ["1", "", "2"]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "medvqa-rl"
    assert cache_folder("~/x") == Path.home() / "x"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "medvqa-rl"


def test_a_run_resolves_to_its_best_checkpoint_or_its_last(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        find_checkpoint(tmp_path)
    for step in (2, 10):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_000010"
    (tmp_path / "best").mkdir()
    assert find_checkpoint(tmp_path) == tmp_path / "best"
    assert find_checkpoint(tmp_path, prefer_best=False) == tmp_path / "checkpoints" / "step_000010"


@pytest.mark.parametrize(
    ("step", "best", "start", "note"),
    [
        (10, 0.5, 0.4, None),
        (10, 0.4, 0.4, r"No evaluation .* before it \(40\.0%\): the best checkpoint, of step 10, reaches 40\.0%"),
        (10, 0.3, 0.4, r"reaches 30\.0%"),
        (0, 0.4, 0.4, r"best checkpoint of .*run is the model before training"),
        (10, 0.4, None, None),
    ],
)
def test_a_best_checkpoint_that_is_no_better_is_noted(
    tmp_path: Path, step: int, best: float, start: float | None, note: str | None
) -> None:
    run = tmp_path / "run"
    assert note_on_best(run) is None
    write_json(run / "best" / "best.json", {"step": step, "accuracy": best})
    write_json(run / "eval" / "step_000000" / "results.json", {"accuracy": start})
    write_json(run / "status.json", {"best_step": step})
    found = note_on_best(run)
    assert found is None if note is None else found is not None and re.search(note, found)


def test_a_damaged_best_checkpoint_is_named_and_not_passed_over(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = write_json(run / "eval" / "step_000000" / "results.json", {"accuracy": 0.5})
    best = write_json(run / "best" / "best.json", {"step": "40", "accuracy": 0.5})
    with pytest.raises(ValueError, match=r"best\.json has '40' under step .*name a folder of checkpoints/"):
        note_on_best(run)
    write_json(best, {"step": 40})  # of an older version
    assert note_on_best(run) is None
    start.write_text('{"accuracy"')
    with pytest.raises(ValueError, match=r"step_000000/results\.json is not JSON"):
        note_on_best(run)


def test_lines_of_json_are_numbered_and_checked(tmp_path: Path) -> None:
    path, schema = tmp_path / "rows.jsonl", TypeAdapter(dict[str, int])
    for content, rows in ((b"", []), (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]), (b'{"a": 1}', [{"a": 1}])):
        path.write_bytes(content)
        assert read_json_lines(schema, path, "restore it") == rows
    path.write_bytes(b'{"a": 1}\n{"a": true}\n')
    with pytest.raises(ValueError, match=r"^Line 2 of .*rows\.jsonl has True under a .*: restore it\.$"):
        read_json_lines(schema, path, "restore it")
