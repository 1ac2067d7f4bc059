"""Atomic writes, the cache folder, and the checkpoints of a run. Imports no torch."""

from __future__ import annotations

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
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        if durable:
            flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_path(path: Path) -> Path:
    """A path beside ``path`` for what this process writes, which :func:`remove_partials` knows."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


def _host() -> str:
    return re.sub(r"[^\w.]", "_", platform.node())


def remove_partials(folder: Path, *, below: bool = True) -> None:
    """Remove the partial files and folders that killed processes of this machine left; see :func:`write_whole`.

    Args:
        below: look into the folders below too.
    """
    pattern = f".*.{_host()}-*.partial"
    for partial in list(folder.rglob(pattern) if below else folder.glob(pattern)):
        pid = int(partial.name.rsplit("-", 2)[1])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
        except PermissionError:
            pass  # of another user, and alive


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


_BEST, _START = TypeAdapter(Best), TypeAdapter(_Start)


def read_best(path: Path) -> Best:
    """Read a best.json.

    Raises:
        ValueError: it is damaged; the message names it, and the field.
    """
    return read_json(_BEST, path, "restore the file, or name a folder of checkpoints/ instead")


def note_on_best(run: Path) -> str | None:
    """A sentence if no evaluation during training was more accurate than the one before it; else None.

    Raises:
        ValueError: the file that names the best checkpoint, or the results before training, are damaged.
    """
    chosen, results = run / "best" / "best.json", run / "eval" / "step_000000" / "results.json"
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
