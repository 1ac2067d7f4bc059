"""The folder of a run: what it is told, what it ran on, how far it is. Every table and plot is made from it.

config.yaml (as given) config.resolved.json env.json data.json judge.json status.json metrics.jsonl train.log
samples/step_000025.jsonl  eval/step_000100/  checkpoints/step_000100/  best/
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from medvqa_rl.config import Config, differences, leaves
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.types import Dataset
from medvqa_rl.rewards.judges import JudgeIdentity

PACKAGES = ("medvqa-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")

OPTIONAL_PACKAGES = ("bitsandbytes", "vllm")
"""Named where they are installed."""

MAY_CHANGE = (
    "network",
    "output_dir",
    "prefetch.workers",
    "prefetch.max_mib",
    "train.steps",
    "train.engine",
    "train.rank_timeout",
    "train.save_steps",
    "train.save_total_limit",
    "train.logging_steps",
    "train.log_completions_steps",
    "train.trackers",
    "train.tracker_samples",
    "train.tracker_online",
    *(f"vllm.{name}" for name in ("server_url", "weights_dir", "timeout", "gpu_memory_utilization", "sleep")),
    *(
        f"{judge}.{name}"
        for judge in ("judge", "eval_judge")
        for name in ("api_key_env", "timeout", "max_retries", "concurrency", "cache_dir")
    ),
)
"""Settings that a resumed run may change. Another number of steps changes the learning-rate schedule from there on."""


class RunDir:
    """Paths and small files of one run; held by one process at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "status.json"
        self.best = self.path / "best"
        self.log = self.path / "train.log"
        self._lock = FileLock(self.path / ".lock")
        self._is_new = False
        """Whether this process made the folder."""

    def samples(self, step: int) -> Path:
        """File of the completions sampled in a step."""
        return self.path / "samples" / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """Folder of the evaluation after a step."""
        return self.path / "eval" / f"step_{step:06d}"

    def open(self, config: Config, given: Mapping[str, Any] | None, *, kind: str, resume: bool) -> None:
        """Take the folder for this process: a new one, or the same run again.

        Args:
            config: all settings.
            given: the settings as the user wrote them; None takes those that differ from the defaults.
            kind: the command that runs, ``train`` or ``sft``.
            resume: continue the run that is there.

        Raises:
            ValueError: the folder holds a run and resume is off, or none and resume is on; another process has it;
                settings that must not change were changed.
        """
        status = json.loads(self.status.read_text(encoding="utf-8")) if self.status.exists() else None
        if not resume and status is not None:
            raise ValueError(
                f"The output folder {self.path} already holds a run ({status['state']} at step {status['step']} of "
                f"{status['steps']}): continue it with --resume, or set output_dir to another folder."
            )
        if resume and status is None:
            raise ValueError(
                f"There is no run to resume in {self.path}: set output_dir to the folder of the run, or start a new "
                "one without --resume."
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir is {str(self.path)!r}, which is a file: give a folder, or a new name.")
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another process is working in {self.path} now: wait for it, stop it, or set output_dir to another "
                "folder."
            ) from error
        path = self.path / "config.resolved.json"
        if resume:
            assert status is not None
            if status["kind"] != kind:
                raise ValueError(
                    f"The run in {self.path} was started by `{status['kind']}`, so it cannot be resumed by `{kind}`: "
                    "resume it with the command that started it, or set output_dir to another folder."
                )
            check_same_settings(Config.model_validate_json(path.read_text(encoding="utf-8")), config)
        as_given = config.model_dump(mode="json", exclude_defaults=True) if given is None else given
        (self.path / "config.yaml").write_text(write_yaml(dict(as_given)), encoding="utf-8")
        write_json(path, config.model_dump(mode="json"))

    def discard(self) -> None:
        """Take back a folder that this process made for a run that never began: nothing of it is worth keeping."""
        if not self._is_new:
            return
        names = ("config.yaml", "config.resolved.json", "env.json", "data.json", "status.json", ".lock")
        for path in (*(self.path / name for name in names), self.log, self.metrics):
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def close(self) -> None:
        """Let other processes take the folder."""
        self._lock.release()

    def write_status(self, state: str, step: int, steps: int, **details: Any) -> None:
        """State (``running``, ``finished``, ``stopped`` or ``failed``), step, process and time."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(
            self.status,
            {"state": state, "step": step, "steps": steps, "pid": os.getpid(), "updated": now, **details},
        )

    def write_environment(self, seed: int) -> None:
        """env.json: what the run was started on."""
        write_json(self.path / "env.json", environment() | {"seed": seed})

    def compare_environment(self, seed: int, step: int) -> list[str]:
        """Write env.resumed_STEP.json, and name what of the environment the bits of a result depend on differs."""
        now = environment() | {"seed": seed}
        write_json(self.path / f"env.resumed_{step:06d}.json", now)
        path = self.path / "env.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
        old, new = leaves(before), leaves(now)
        packages = (f"packages.{name}" for name in (*PACKAGES, *OPTIONAL_PACKAGES))
        names = ("source", "threads", "python", "machine", "gpu", *packages)
        return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in names if old.get(name) != new.get(name)]

    def check_data(self, datasets: Mapping[str, Dataset], *, resume: bool) -> None:
        """Write data.json, or compare with the one of the run that is resumed.

        Raises:
            ValueError: the data is not that of the run that is resumed.
        """
        path = self.path / "data.json"
        described = {
            split: {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "samples": None if data.is_endless else len(data),
                "notes": dict(data.notes),
            }
            for split, data in datasets.items()
        }
        if resume and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [s for s in described if before.get(s, {}).get("fingerprint") != described[s]["fingerprint"]]
            if changed:
                raise ValueError(
                    f"The {' and '.join(changed)} data is not what this run was started with (its fingerprint in "
                    f"{path} differs): restore the data, or start a new run in another output_dir."
                )
        else:
            write_json(path, described)

    def check_judges(self, judges: Mapping[str, JudgeIdentity], *, resume: bool) -> None:
        """Write judge.json where a judge rewards, or compare with the one of the run that is resumed.

        Raises:
            ValueError: the judge is not that of the run that is resumed, though it may have its name.
        """
        path = self.path / "judge.json"
        described = {role: identity.to_json() for role, identity in judges.items()}
        if resume and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before != described:
                raise ValueError(
                    f"The judge is not the one that this run was started with ({path} names its weights and prompt): "
                    "restore it, or start a new run in another output_dir."
                )
        elif described:
            write_json(path, described)

    def cut_back(self, step: int, metrics_bytes: int) -> None:
        """Remove what was written after a checkpoint: lines of metrics.jsonl, samples and evaluations."""
        if self.metrics.exists():
            with self.metrics.open("r+b") as file:
                file.truncate(metrics_bytes)
        for path in [*self.path.glob("samples/step_*.jsonl"), *self.path.glob("eval/step_*")]:
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink() if path.is_file() else shutil.rmtree(path)


def check_same_settings(before: Config, now: Config) -> None:
    """Refuse to resume with other settings than those in :data:`MAY_CHANGE`.

    Raises:
        ValueError: lists what was changed.
    """
    old, new = (leaves(config.model_dump(mode="json")) for config in (before, now))
    changed = [
        f"{path} ({json.dumps(old.get(path))} -> {json.dumps(new.get(path))})"
        for path in differences(before, now)
        if path not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"A resumed run keeps its settings, but these were changed: {', '.join(changed)}. Set them back (the "
            "run's config.yaml holds what was given), or start a new run in another output_dir. Only the number of "
            "steps, saving and logging may change."
        )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is never seen half written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """Versions, machine, threads and commit: what someone needs to run this again."""
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "source": source_digest(Path(__file__).parents[2]),
        "git": _git_commit(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    """Versions of what a run is computed with."""
    found = {name: version(name) for name in PACKAGES}
    for name in OPTIONAL_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def source_digest(package: Path) -> str:
    """Names and contents of a package's Python files in one hash: a commit says nothing of an installed copy, nor of
    what was edited since."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _git_commit() -> dict[str, Any] | None:
    """Commit of the working directory and whether files differ from it; None outside of a repository."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, *arguments], capture_output=True, text=True, timeout=20, check=False)

    commit = ask("rev-parse", "HEAD")
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "is_dirty": bool(ask("status", "--porcelain").stdout.strip())}
