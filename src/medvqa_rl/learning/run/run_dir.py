"""The folder of a run: settings, environment, data, status and logs. Every table and plot is made from it.

config.yaml (as given) config.resolved.json env.json data.json judge.json rewards.json status.json metrics.jsonl
train.log  data/ (samples that a program gave)
resumes.jsonl config.resume_1.yaml env.resumed_000100.json  (what changed since the first start, resume.py)
samples/step_000025.jsonl  eval/step_000100/  checkpoints/step_000100/  best/
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, TypeAdapter

from medvqa_rl.config import Config, leaves
from medvqa_rl.config.yaml import write_yaml
from medvqa_rl.core.files import read_json, run_config, step_of, write_json, write_text
from medvqa_rl.core.machine import ProcessLock
from medvqa_rl.core.packages import installed
from medvqa_rl.learning.distributed.launch import read_launch
from medvqa_rl.learning.run.errors import RunFolderLost
from medvqa_rl.learning.run.resume import Change, Resume, changed_settings, promise, read_resumes, still_counts
from medvqa_rl.learning.run.unchanged import RESTORE

PACKAGES = (
    *("medvqa-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow"),
    *("bitsandbytes", "vllm"),
)
"""Those that affect results; recorded if installed."""


class _Status(BaseModel):
    """What is read again of status.json; it has more."""

    kind: str
    state: str
    step: int
    steps: int


_STATUS, _ENVIRONMENT = TypeAdapter(_Status), TypeAdapter(dict[str, Any])
_CONFIG = TypeAdapter(Config)

GIT_TIMEOUT = 5.0
"""Seconds to wait for an answer of git."""


class RunDir:
    """Paths and small files of a run. One process at a time holds its lock."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.status = self.path / "status.json"
        self.best = self.path / "best"
        self.log = self.path / "train.log"
        self.resumes = self.path / "resumes.jsonl"
        self.changed: Mapping[str, Change] = {}
        """Settings of a resumed run that differ from those of its first start."""
        self._lock = ProcessLock(self.path / ".lock")
        self._folder: os.stat_result | None = None
        """The folder itself, set by :meth:`open`."""
        self._is_new = False
        """Whether this process created the folder, but for the samples that a program gave."""

    def samples(self, step: int) -> Path:
        """The file with the completions of a step."""
        return self.path / "samples" / f"step_{step:06d}.jsonl"

    def evaluation(self, step: int) -> Path:
        """The folder of the evaluation after a step."""
        return self.path / "eval" / f"step_{step:06d}"

    def open(self, config: Config, given: Mapping[str, Any] | None, *, kind: str, resume: bool) -> None:
        """Lock the folder, and write the settings of a new run or compare those of a resumed one.

        Args:
            config: all settings.
            given: the settings as the user wrote them; None writes the settings that differ from the defaults.
            kind: the command that runs, ``train`` or ``sft``.
            resume: continue the existing run.

        Raises:
            ValueError: the folder contains a run and ``resume`` is false, or no run and ``resume`` is true; another
                process is using it; a setting was changed that must not change on resume.
        """
        if not resume:
            self.refuse_a_run()
        status = self._read_status()
        if resume and status is None:
            raise ValueError(
                f"There is no run to resume in {self.path}: set output_dir to the folder of the run, or start a new "
                "one without --resume."
            )
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir is {str(self.path)!r}, which is a file: name a folder instead.")
        self._is_new = not self.path.exists() or {child.name for child in self.path.iterdir()} == {"data"}
        self._lock.acquire(f"is using {self.path}: wait for it, stop it, or set output_dir to another folder.")
        self._folder = self.path.stat()
        try:
            self._write_settings(status, config, given, kind=kind, resume=resume)
        except BaseException:
            self.close()
            raise

    def refuse_a_run(self) -> None:
        """
        Raises:
            ValueError: the folder contains a run.
        """
        if (status := self._read_status()) is not None:
            raise ValueError(
                f"The output folder {self.path} already contains a run ({status.state} at step {status.step} of "
                f"{status.steps}): continue it with --resume, or set output_dir to another folder."
            )

    def _read_status(self) -> _Status | None:
        return read_json(_STATUS, self.status, RESTORE) if self.status.exists() else None

    def _write_settings(
        self, status: _Status | None, config: Config, given: Mapping[str, Any] | None, *, kind: str, resume: bool
    ) -> None:
        """Write the settings of a new run or compare those of a resumed one."""
        path = self.path / "config.resolved.json"
        if resume:
            assert status is not None
            if status.kind != kind:
                raise ValueError(
                    f"The run in {self.path} was started by `{status.kind}`, so it cannot be resumed by `{kind}`: "
                    "resume it with the command that started it, or set output_dir to another folder."
                )
            self.changed = changed_settings(read_json(_CONFIG, path, RESTORE), config)
        else:
            write_text(self.path / "config.yaml", write_yaml(_as_given(config, given)))
            write_json(path, config.model_dump(mode="json"))

    def record_resume(
        self,
        config: Config,
        given: Mapping[str, Any] | None,
        *,
        step: int,
        checkpoint: Path | None,
        environment: Sequence[str],
        functions: Mapping[str, Change] = MappingProxyType({}),
        is_gpu: bool,
    ) -> Resume:
        """Add a line to resumes.jsonl, and the settings as given if they differ from those of the last start.

        Args:
            config: all settings, and ``given`` as the user wrote them, as for :meth:`open`.
            step: the completed step that the run continues from.
            checkpoint: its folder.
            environment: what differs from the environment of the first start.
            functions: the reward functions whose source differs from that of the first start.
            is_gpu: whether the policy is on a GPU.
        """
        before = read_resumes(self.resumes)
        resume = Resume(
            step=step,
            checkpoint=None if checkpoint is None else checkpoint.relative_to(self.path).as_posix(),
            settings=dict(self.changed),
            environment=list(environment),
            functions=dict(functions),
        )
        text = promise([*still_counts(before, step), resume], config, is_gpu=is_gpu)
        resume = resume.model_copy(update={"promise": text})
        if resume.settings != (before[-1].settings if before else {}):
            path = self.path / f"config.resume_{len(before) + 1}.yaml"
            write_text(path, write_yaml(_as_given(config, given)))
        write_text(self.resumes, "".join(line.model_dump_json() + "\n" for line in [*before, resume]))
        return resume

    def resume_command(self, kind: str) -> str:
        """The command that continues this run with its current settings, however it was launched.

        Args:
            kind: the command that runs, ``train`` or ``sft``.
        """
        command = f"medvqa-rl {kind} {shlex.quote(str(run_config(self.path)))} --resume"
        launch = read_launch(os.environ)
        if launch.num_ranks == 1:
            return command
        is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
        return f"{command} --gpus {launch.num_ranks if is_one_machine else 'N'} train.engine={launch.engine}"

    def next_commands(self, kind: str, steps: int) -> list[str]:
        """What to do with a finished run: lines with a command each.

        Args:
            kind: see :meth:`resume_command`.
            steps: of the run.
        """
        run = shlex.quote(str(self.path))
        return [
            f"  Evaluate on the test split:  medvqa-rl eval {run}",
            f"  Write the report:            medvqa-rl report {run}",
            f"  Train longer:                {self.resume_command(kind)} train.steps={2 * steps}",
        ]

    def discard(self) -> None:
        """Remove the folder of a run that failed before it started, if this process created it."""
        if not self._is_new:
            return
        settings, facts = ("config.yaml", "config.resolved.json"), ("env", "data", "judge", "rewards", "status")
        files = (*settings, *(f"{name}.json" for name in facts))
        locks = (self._lock.path, self._lock.holder)
        for path in (*(self.path / file for file in files), *locks, self.log, self.metrics):
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def check_folder(self) -> None:
        """
        Raises:
            RunFolderLost: the folder was removed, moved or replaced: another run may use its place, unlocked.
        """
        now = self.path.stat() if self.path.exists() else None
        is_here = self._folder is None or (now is not None and os.path.samestat(self._folder, now))
        if not is_here and not self._lock.is_ours():  # some file systems renumber their folders
            raise RunFolderLost(
                f"The folder {self.path} was removed, moved or replaced during the run, so the run ends: its steps "
                "since the last checkpoint are lost. If you moved it, continue with --resume where it is now."
            )

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def write_status(self, state: str, step: int, steps: int, **details: Any) -> None:
        """Write status.json: state (``running``, ``finished``, ``stopped`` or ``failed``), step, process and time."""
        self.check_folder()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        status = {"state": state, "step": step, "steps": steps, "pid": os.getpid(), "updated": now, **details}
        write_json(self.status, status, durable=False)  # every step

    def record_environment(self, seed: int, step: int, *, resume: bool) -> list[str]:
        """Write env.json: the environment in which the run started. When resuming, write env.resumed_STEP.json and
        return the changes that can affect results, as ``name (old -> new)``."""
        now = environment() | {"seed": seed}
        if not resume:
            write_json(self.path / "env.json", now)
            return []
        write_json(self.path / f"env.resumed_{step:06d}.json", now)
        path = self.path / "env.json"
        before = read_json(_ENVIRONMENT, path, RESTORE) if path.exists() else now
        old, new = leaves(before), leaves(now)
        packages = (f"packages.{name}" for name in PACKAGES)
        names = ("source", "threads", "python", "machine", "gpu", *packages)
        changed = [name for name in names if old.get(name) != new.get(name)]
        changed += [name for name in read_launch(os.environ).record() if old.get(name, new[name]) != new[name]]
        return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in changed]

    def cut_back(self, step: int, metrics_bytes: int) -> str:
        """Remove metrics, samples and evaluations that were written after a checkpoint.

        Returns:
            A warning if metrics from before it are missing, else an empty text.
        """
        length = 0
        if self.metrics.exists():
            with self.metrics.open("r+b") as file:
                kept = file.read(metrics_bytes)
                length = kept.rfind(b"\n") + 1
                file.truncate(length)  # it may be shorter than it was, but only whole lines stay
        for path in [*self.path.glob("samples/step_*.jsonl"), *self.path.glob("eval/step_*")]:
            own = step_of(path)
            if own is not None and own > step:
                path.unlink() if path.is_file() else shutil.rmtree(path)
        if length < metrics_bytes:
            return (
                f"{self.metrics} has {length:,} of the {metrics_bytes:,} bytes that it had at step {step}: its curves "
                "lack steps, while training and its weights are not affected. Restore the file if you have a copy."
            )
        return ""


def _as_given(config: Config, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings as the user wrote them, else those that differ from the defaults."""
    return config.model_dump(mode="json", exclude_defaults=True) if given is None else dict(given)


def environment() -> dict[str, Any]:
    """Versions, machine, threads and commit: what is needed to reproduce a run."""
    return {
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **read_launch(os.environ).record(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "source": source_digest(Path(__file__).parents[2]),
        "git": _git_commit(),
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def source_digest(package: Path) -> str:
    """Hash of the names and contents of a package's Python files. Unlike the commit, it covers installed copies and
    uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _git_commit() -> dict[str, Any] | None:
    """Commit of the working directory and whether it is dirty; None outside a repository.

    ``is_dirty`` is None, and ``problem`` says why, if git cannot tell: ``git status`` takes minutes in a large
    repository on a network disk, and a run does not wait for it.
    """
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        # Without optional locks, git status writes nothing into the repository.
        command = [git, "--no-optional-locks", *arguments]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_TIMEOUT, check=False)
        return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None

    commit = None
    try:
        commit = ask("rev-parse", "HEAD")
        if commit is None:
            return None
        status = ask("status", "--porcelain")
        if status is not None:
            return {"commit": commit, "is_dirty": bool(status)}
        problem = "git status failed"
    except subprocess.TimeoutExpired:
        problem = f"git did not answer within {GIT_TIMEOUT:g} seconds"
    except OSError as error:
        problem = f"git could not be started: {error.strerror or error}"
    return {"commit": commit, "is_dirty": None, "problem": problem}
