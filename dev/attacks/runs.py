"""Short runs whose ends can be compared: the same run, undisturbed and disturbed, must leave the same files."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import children
from .children import Ended
from .seeds import CONFIG, SETTINGS, STUDY

_STEPS = [
    "train.steps=8",
    "train.save_steps=2",
    "train.eval_steps=4",
    "train.log_completions_steps=3",
    "train.save_total_limit=2",
]
KINDS = {
    "grpo": ["train", *_STEPS],
    "lora": [
        "train", *_STEPS, "model.lora.rank=4", "model.train_vision=false", "loss.num_iterations=2", "loss.beta=0.04",
        "rollout.max_resample_times=2",
    ],
    "sft": ["sft", *_STEPS, "sft.batch_size=4", "model.path=phantom:base"],
    "eval": ["eval", "data.num_test=40", "eval.num_samples=2", "--controls"],
    "study": ["study", "run", str(STUDY)],
}  # fmt: skip
"""Verb and settings of each kind of run."""
TIMES = (
    "time",
    "seconds",
    "memory",
    "tokens_per",
    "per_second",
    "started",
    "created",
    "metrics_bytes",
    "path",
    "updated",
    "pid",
)
CHANGING = ("env", "status.json", "train.log", "config", "resume", ".lock", "evaluation.json")
"""Top-level names (their beginnings) that may differ after a resume."""


def arguments(kind: str, folder: Path) -> list[str]:
    verb, *rest = KINDS[kind]
    if verb == "study":
        return [verb, *rest, "--output", str(folder)]
    settings = [str(CONFIG), *SETTINGS, *rest]
    return [verb, *settings, "--output", str(folder)] if verb == "eval" else [verb, *settings, f"output_dir={folder}"]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not any(word in key for word in TIMES)}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(run: Path) -> dict[str, str]:
    """Hash of every file of a run that must not depend on its interruptions, by relative name; folders end in /.

    Of a study: those of its cells and tables.
    """
    if not (run / "tables").is_dir():
        return _contents(run)
    cells = sorted({path.parent for path in run.glob("*/*/eval")})
    found = {f"{cell.relative_to(run)}/{name}": value for cell in cells for name, value in _contents(cell).items()}
    tables = {path.name: path.read_bytes() for path in (run / "tables").iterdir() if path.suffix in (".csv", ".tex")}
    return found | {f"tables/{name}": hashlib.sha256(data).hexdigest()[:16] for name, data in tables.items()}


def _contents(run: Path) -> dict[str, str]:
    found = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if name.startswith(CHANGING) or path.name == "manifest.json":
            continue  # a manifest has the checksum of the state, which has times
        if path.is_dir():
            found[f"{name}/"] = ""
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = json.dumps(without_times(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".jsonl" and b"\0" not in data:
            with suppress(ValueError):  # a file that an attack put there
                rows = [without_times(json.loads(line)) for line in data.split(b"\n") if line]
                data = json.dumps(rows, sort_keys=True).encode()
        elif path.suffix == ".md":  # a card is headed by the name of the run
            data = data.replace(f"# {run.name}, ".replace("_", r"\_").encode(), b"# RUN, ")
        data = data.replace(str(run).encode(), b"RUN")
        found[name] = hashlib.sha256(data).hexdigest()[:16]
    return found


def difference(first: dict[str, str], second: dict[str, str]) -> str:
    """Names of the files that differ, or "" if none."""
    names = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    return ", ".join(name if name in first and name in second else f"{name} (only in one)" for name in names[:8])


def run_whole(kind: str, folder: Path) -> tuple[dict[str, str], Ended]:
    """Run undisturbed.

    Raises:
        SystemExit: the run failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ended = children.run(arguments(kind, folder), folder.with_suffix(".log"), limit=600)
    if ended.code != 0:
        raise SystemExit(f"The undisturbed run {kind} failed: {ended.last_words}")
    return contents(folder), ended
