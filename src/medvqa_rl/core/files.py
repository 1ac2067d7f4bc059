"""Atomic writes, the cache folder, and the checkpoints of a run. Imports no torch."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from medvqa_rl.core.text import printable, shown

T = TypeVar("T")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a device, a quota or a file-size limit that is reached."""


@contextmanager
def writing(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Name ``path`` in the errors of what writes to it.

    A failed write does not say which file it was for, and libraries in Rust (safetensors, tokenizers, the Hub's
    downloads) raise error types of their own, with the system's error number in the message.

    Args:
        partial: the temporary path that stands for ``path`` in the block.

    Raises:
        OSError: the block cannot write.
    """
    try:
        yield
    except OSError as error:
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        is_partial = partial is not None and any(name.startswith(str(partial)) for name in named)
        if is_partial or (error.errno is not None and not named):
            error.filename = str(path)
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def describe_os_error(error: OSError) -> str:
    """Say in a sentence what the system refused, for which file, and what to do."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space is left on the device{where}: free some, or choose another output folder."
    if error.errno == errno.EFBIG:
        return (
            f"A file would exceed the size limit of this process or file system{where}: raise the limit with "
            "`ulimit -f unlimited`, or choose an output folder whose file system takes larger files."
        )
    return f"{error.strerror or error}{where}: check the path and its permissions."


@contextmanager
def write_whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, and rename it when the block ends.

    Readers see the old file or the new one, never a part. If the block raises, the temporary file is removed and
    ``path`` stays as it was. Several processes may write the same path; the last one wins.

    Args:
        path: the file; its folder is created.
        durable: flush the content to disk before renaming, so that it survives a power failure. Turn it off for many
            small files that can be made again.

    Raises:
        OSError: the file cannot be written; names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with writing(path, partial):
            yield partial
            if durable:
                flush(partial)
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """A path beside ``path`` for what this process writes, which :func:`remove_partials` knows."""
    path = Path(os.path.abspath(path))  # "." has no name
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside ``path``, which the block fills and renames; what is not renamed is removed.

    Folders that killed processes left are removed first.

    Raises:
        OSError: something in it cannot be written; names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent, below=False)
    temporary = partial_path(path)
    try:
        with writing(path, temporary):
            temporary.mkdir()  # with the modes of the umask, unlike mkdtemp: others may share it
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^\w.]", "_", platform.node())


def remove_partials(folder: Path, *, below: bool = True) -> None:
    """Remove the partial files and folders that killed processes of this machine left; see :func:`write_whole`.

    Args:
        below: look into the folders below too.
    """
    pattern = f".*.{_host()}-*.partial"
    for partial in list(folder.rglob(pattern) if below else folder.glob(pattern)):
        found = re.search(r"-(\d{1,9})-[0-9a-f]{8}\.partial$", partial.name)
        if found is None:
            continue  # not ours
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
        except PermissionError:
            pass  # of another user, and alive


class AppendedFile:
    """A file that only grows. If it is removed or replaced meanwhile, it is written again with what was in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+b", buffering=0)
        self.length = self._file.seek(0, os.SEEK_END)
        """Bytes that were there or were appended completely."""

    def append(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            OSError: they cannot be written; names the file.
        """
        with writing(self.path):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self.length += len(data)

    def restore(self) -> bool:
        """Write the file again if it was removed or replaced; return whether it was."""
        own = os.fstat(self._file.fileno())
        if self.path.exists() and os.path.samestat(own, self.path.stat()):
            return False
        self._file.seek(0)
        content = self._file.readall()
        with write_whole(self.path) as partial:
            partial.write_bytes(content)
        self._file.close()
        self._file = self.path.open("a+b", buffering=0)
        return True

    def flush(self) -> None:
        """Force the content to disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_text(path: Path, text: str, *, errors: str = "strict", durable: bool = True) -> Path:
    """Write a text file in UTF-8, whole or not at all.

    Args:
        errors: ``replace`` writes ``?`` for lone surrogates, which some data sets contain.
        durable: see :func:`write_whole`.
    """
    with write_whole(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)
    return path


def write_json(path: Path, value: Any, *, durable: bool = True) -> Path:
    """Write a value as indented JSON, whole or not at all, with NaN and infinity as null."""
    text = json.dumps(without_nan(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_text(path, text, durable=durable)


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth: standard JSON has neither. Tuples become lists."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_lines(text: str) -> list[str]:
    """The lines of JSON Lines. Only a newline ends one: ``str.splitlines`` would also split at characters that JSON
    texts contain as they are, such as U+2028 and U+0085."""
    return text.removesuffix("\n").split("\n") if text else []


def parse_json(schema: TypeAdapter[T], text: str | bytes, where: str, remedy: str = "") -> T:
    """Parse JSON of a schema: no value is converted, so that 7 is neither a text nor true.

    Args:
        where: names the file, and the line; begins the message.
        remedy: ends the message; if empty, it is a part of a longer one.

    Raises:
        ValueError: the text is not JSON, or a field is missing or has another type; the message names the first.
    """
    try:
        if isinstance(text, str):
            text = text.encode("utf-8", "replace")
        return schema.validate_json(text, strict=True)
    except ValidationError as errors:
        error = errors.errors(include_url=False, include_context=False)[0]
    name = printable(".".join(map(str, error["loc"])))
    if error["type"] == "json_invalid":
        found = f"is not JSON ({printable(error['msg'].removeprefix('Invalid JSON: '))})"
    elif error["type"] == "missing":
        found = f"has no field {name}"
    elif error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        found = f"has the unknown field {name}"
    else:
        under = f" under {name}" if name else ""
        found = f"has {shown(error['input'])}{under} ({printable(error['msg'].removeprefix('Input '))})"
    raise ValueError(f"{where} {found}: {remedy}." if remedy else f"{where} {found}")


def read_json(schema: TypeAdapter[T], path: Path, remedy: str) -> T:
    """Read a JSON file of a schema, as :func:`parse_json`.

    Raises:
        ValueError: the file is damaged; the message names it, and the field.
        OSError: it cannot be read.
    """
    return parse_json(schema, path.read_bytes(), f"The file {path}", remedy)


def read_json_lines(schema: TypeAdapter[T], path: Path, remedy: str) -> list[T]:
    """Read a JSON Lines file, each line as :func:`parse_json`.

    Raises:
        ValueError: a line is damaged; the message names it, and the field.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    return [parse_json(schema, line, f"Line {number} of {path}", remedy) for number, line in enumerate(lines, start=1)]


def flush(path: Path) -> None:
    """Force the content of a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(given: str | None) -> Path:
    """``data.cache_dir``, or ``medvqa-rl`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medvqa-rl"


def run_config(run: Path) -> Path:
    """The YAML file with a run's current settings: those of the last resume that changed any, else config.yaml."""
    numbers = [path.stem.removeprefix("config.resume_") for path in run.glob("config.resume_*.yaml")]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=0)
    return run / (f"config.resume_{newest}.yaml" if newest else "config.yaml")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of a run's checkpoint after ``step`` steps, whether or not it exists."""
    return run / "checkpoints" / f"step_{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint, an evaluation or a file of samples; None for what a user put beside them,
    such as ``step_final``."""
    number = path.name.partition(".")[0].removeprefix("step_")
    is_ours = path.name in (f"step_{number}", f"step_{number}.jsonl") and number.isdecimal() and number.isascii()
    return int(number) if is_ours else None


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {step: path for path in (run / "checkpoints").glob("step_*") if (step := step_of(path)) is not None}
    return [found[step] for step in sorted(found)]


class Best(BaseModel):
    """The content of ``best.json``: the checkpoint that the evaluations during training chose."""

    step: int
    accuracy: float | None = None


class _Start(BaseModel):
    accuracy: float | None


class _Progress(BaseModel):
    best_step: int | None = None


_BEST, _START, _PROGRESS = TypeAdapter(Best), TypeAdapter(_Start), TypeAdapter(_Progress)


def read_best(path: Path) -> Best:
    """Read a best.json.

    Raises:
        ValueError: it is damaged; the message names it, and the field.
    """
    return read_json(_BEST, path, "restore the file, or name a folder of checkpoints/ instead")


def note_on_best(run: Path) -> str | None:
    """A sentence if the best checkpoint was removed, or if no evaluation during training was more accurate than the
    one before it; else None.

    Raises:
        ValueError: the status, the file that names the best checkpoint, or the results before training, are damaged.
    """
    chosen, results = run / "best" / "best.json", run / "eval" / "step_000000" / "results.json"
    status = run / "status.json"
    if not (run / "best").is_dir():
        step = read_json(_PROGRESS, status, "restore the file").best_step if status.is_file() else None
        removed = f"The best checkpoint of {run}, of step {step}, was removed: the last checkpoint takes its place."
        return removed if step else None
    if not (chosen.is_file() and results.is_file()):
        return None
    best = read_best(chosen)
    step, accuracy = best.step, best.accuracy
    start = read_json(_START, results, "restore the file, or remove the folder of this evaluation").accuracy
    if accuracy is None:  # of an older version
        return None
    if step == 0:  # of an older version
        return (
            f"The best checkpoint of {run} is the model before training: comparing it with that model shows no "
            "difference. Name a later one with --checkpoint."
        )
    if start is None or accuracy > start:
        return None
    return (
        f"No evaluation during training was more accurate on the validation questions than the model before it "
        f"({start:.1%}): the best checkpoint, of step {step}, reaches {accuracy:.1%}."
    )


def find_checkpoint(run: Path, *, prefer_best: bool = True) -> Path:
    """The checkpoint that stands for a run: the best one, if evaluation during training chose one, else the last.

    Args:
        run: folder of the run.
        prefer_best: False always takes the last one, whose choice no evaluation influenced.

    Raises:
        ValueError: the folder holds no checkpoint.
    """
    best = run / "best"
    if prefer_best and best.is_dir():
        return best
    if checkpoints := list_checkpoints(run):
        return checkpoints[-1]
    raise ValueError(
        f"There is no checkpoint in {run}: name the folder of a run that has saved one, which happens every "
        "train.save_steps steps and when training ends."
    )
