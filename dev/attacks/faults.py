"""Accidents around a run: signals, full disks, damaged files, small limits, odd environments.

Each must be borne, or end in a sentence and exit code 1, 2, 129, 130 or 143; and a run that is resumed afterwards must
end like the undisturbed one. Disks are mounted, so those need root and are skipped without it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import children
from .children import Ended
from .runs import arguments, contents, difference, run_whole

CODES = (0, 1, 2, 129, 130, 143)
Result = tuple[str, bool, str]
"""What was done, whether it held, and what was said."""


class _Scene:
    """The undisturbed run, a killed copy of it, and ways to run it again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.expected, _ = run_whole("grpo", out / "whole")
        self.killed = out / "killed"
        self._kill_at(6)

    def _kill_at(self, step: int) -> None:
        """Make ``self.killed``: a run with checkpoints of steps 4 and 6, killed."""
        pid, log = self.start(self.killed)
        self.wait_for(self.killed / "checkpoints" / f"step_{step:06d}")
        os.kill(pid, signal.SIGKILL)
        children.wait(pid, log)

    def start(self, run: Path, *more: str, **options: Any) -> tuple[int, Path]:
        shutil.rmtree(run, ignore_errors=True)
        log = run.with_name(f"{run.name}.log")
        log.unlink(missing_ok=True)
        return children.start([*arguments("grpo", run), *more], log, **options), log

    def wait_for(self, path: Path, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.002)

    def run(self, run: Path, *more: str, **options: Any) -> Ended:
        return children.run([*arguments("grpo", run), *more], run.with_name(f"{run.name}.log"), limit=240, **options)

    def copy(self) -> Path:
        run = self.out / "copy"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.killed, run)
        return run

    def resume(self, run: Path) -> tuple[bool, str]:
        """Resume; whether it ended like the undisturbed run."""
        ended = self.run(run, "--resume")
        if ended.code != 0:
            return False, f"the resume failed: {ended.last_words}"
        differing = difference(self.expected, contents(run))
        return not differing, differing and f"the resumed run differs in {differing}"


def _is_sentence(ended: Ended) -> bool:
    return ended.is_clean and ended.code in CODES and (ended.code == 0 or bool(ended.output.strip()))


def signals(scene: _Scene) -> Iterator[Result]:
    """A signal at a random step: exit code, status and an exact resume."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        run = scene.out / "signalled"
        pid, log = scene.start(run)
        scene.wait_for(run / "checkpoints" / "step_000002")
        os.kill(pid, number)
        ended = children.wait(pid, log, limit=120)
        held = ended.is_clean and ended.code == 128 + number
        same, why = scene.resume(run)
        yield f"{number.name} during the run", held and same, why or ended.last_words


def full_disks(scene: _Scene) -> Iterator[Result]:
    """A device that fills up, at several sizes, then grows: a sentence, and a sound resume."""
    if os.geteuid() != 0:
        return
    disk = scene.out / "disk"
    disk.mkdir(exist_ok=True)
    for mib in (1, 7, 16, 25, 33):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(disk)], check=False, capture_output=True
        ).returncode:
            return  # no right to mount
        try:
            run = disk / "run"
            log = scene.out / "disk.log"
            ended = children.run(arguments("grpo", run), log, limit=240)
            held, why = _is_sentence(ended), ended.last_words
            subprocess.run(["mount", "-o", "remount,size=300m", str(disk)], check=True)
            if ended.code != 0:
                again = [*arguments("grpo", run), *(["--resume"] if (run / "status.json").exists() else [])]
                ended = children.run(again, log, limit=240)
                differing = difference(scene.expected, contents(run)) if ended.code == 0 else ended.last_words
                held, why = held and not differing, differing or why
            yield f"a device of {mib} MiB", held, why
        finally:
            subprocess.run(["umount", str(disk)], check=False)


def deletions(scene: _Scene) -> Iterator[Result]:
    """Something of the run's folder disappears while it runs."""
    for name in ("checkpoints", "samples", "eval", "best", "metrics.jsonl", "status.json", "."):
        run = scene.out / "deleted"
        pid, log = scene.start(run)
        scene.wait_for(run / "eval" / "step_000004")
        path = run / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        ended = children.wait(pid, log, limit=120)
        held, why = _is_sentence(ended), ended.last_words
        if name in ("best", "metrics.jsonl", "status.json"):  # written again
            why = difference(scene.expected, contents(run)) if ended.code == 0 else why
            held = ended.code == 0 and not why
        yield f"{name} deleted during the run", held, why


def two_processes(scene: _Scene) -> Iterator[Result]:
    run = scene.out / "twice"
    pid, log = scene.start(run)
    scene.wait_for(run / "metrics.jsonl")
    for more in ([], ["--resume"]):
        second = children.run([*arguments("grpo", run), *more], scene.out / "second.log")
        yield f"a second process {' '.join(more)}", second.is_clean and second.code == 2, second.last_words
    first = children.wait(pid, log)
    yield "the first process", first.code == 0 and not difference(scene.expected, contents(run)), first.last_words


def damaged_checkpoints(scene: _Scene) -> Iterator[Result]:
    """A bit, half, all or none of each file of the newest checkpoint: an equal end, or a sentence that names it."""
    newest = max((scene.killed / "checkpoints").glob("step_*"))
    rng = random.Random(0)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        name = path.relative_to(scene.killed)
        for how in ("one bit", "half of it", "nothing", "missing"):
            run = scene.copy()
            data = bytearray(path.read_bytes())
            if how == "one bit":
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            elif how == "half of it":
                del data[len(data) // 2 :]
            elif how == "nothing":
                data.clear()
            (run / name).unlink() if how == "missing" else (run / name).write_bytes(data)
            ended = scene.run(run, "--resume")
            if ended.code == 0:
                differing = difference(scene.expected, contents(run))
                held, why = not differing, f"went on silently: {differing}"
            else:
                held, why = _is_sentence(ended) and newest.name in ended.output, ended.last_words
            yield f"{name}: {how}", held, why


def _changed(name: str, data: bytes | None) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True) if data is None else path.write_bytes(data)

    return change


def _state(**changes: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = max((run / "checkpoints").glob("step_*")) / "trainer" / "state.json"
        value = {**json.loads(path.read_bytes()), **changes}
        path.write_text(json.dumps({key: item for key, item in value.items() if item != "absent"}))

    return change


def _cut_metrics(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:700])


def damaged_runs(scene: _Scene) -> Iterator[Result]:
    """Other files of a killed run are damaged before it is resumed."""
    damages: dict[str, Callable[[Path], None]] = {
        "metrics.jsonl cut off": _cut_metrics,
        "status.json empty": _changed("status.json", b""),
        "status.json half": _changed("status.json", b'{"state": "runn'),
        "status.json of no keys": _changed("status.json", b"{}"),
        "status.json a list": _changed("status.json", b"[]"),
        "config.resolved.json missing": _changed("config.resolved.json", None),
        "config.resolved.json empty": _changed("config.resolved.json", b""),
        "config.resolved.json with other settings": _changed("config.resolved.json", b'{"model": {"new": 1}}'),
        "config.yaml missing": _changed("config.yaml", None),
        "env.json damaged": _changed("env.json", b"{"),
        "data.json damaged": _changed("data.json", b"{"),
        "data.json of numbers": _changed("data.json", b'{"train": 3}'),
        "train.log missing": _changed("train.log", None),
        "a copy of a checkpoint": lambda run: (
            shutil.copytree(max((run / "checkpoints").glob("step_*")), run / "checkpoints" / "step_final") and None
        ),
        "a file among the checkpoints": _changed("checkpoints/step_notes.txt", b"x"),
        "a file among the samples": _changed("samples/step_note.jsonl", b"x"),
        "a folder among the evaluations": _changed("eval/step_last/x", b"x"),
        "an empty newest checkpoint": lambda run: (run / "checkpoints" / "step_000007").mkdir(),
        "best missing": lambda run: shutil.rmtree(run / "best"),
        "a lock file": _changed(".lock", b"other"),
        "state.json with another step": _state(step=5),
        "state.json with text for a number": _state(step="6"),
        "state.json without its step": _state(step="absent"),
    }
    for name, damage in damages.items():
        run = scene.copy()
        damage(run)
        ended = scene.run(run, "--resume")
        held, why = _is_sentence(ended), ended.last_words
        if ended.code == 0:
            differing = difference(scene.expected, contents(run))
            ours = [
                part
                for part in differing.split(", ")
                if part and not any(x in part for x in ("step_final", "step_note", "step_last"))
            ]
            if ours == ["metrics.jsonl"] and "metrics.jsonl has" in ended.output:
                ours = []  # what was cut off cannot come back, but is not missing silently
            held, why = not ours, differing
            if b"\0" in (run / "metrics.jsonl").read_bytes():
                held, why = False, "metrics.jsonl holds NUL bytes"
        yield name, held, why


def environments(scene: _Scene) -> Iterator[Result]:
    """Small limits and odd environments."""

    def limit(what: int, value: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(what, (value, value))

    def close(*numbers: int) -> Callable[[], None]:
        def closing() -> None:
            for number in numbers:
                os.close(number)

        return closing

    def leave_folder() -> None:
        gone = scene.out / "gone"
        gone.mkdir(exist_ok=True)
        os.chdir(gone)
        gone.rmdir()

    nameless: dict[str, str | None] = {"HOME": None, "XDG_CACHE_HOME": None, "USER": None, "LOGNAME": None}
    cases: dict[str, dict[str, Any]] = {
        "64 open files": {"prepare": limit(resource.RLIMIT_NOFILE, 64)},
        "24 open files": {"prepare": limit(resource.RLIMIT_NOFILE, 24)},
        "files of 4 MiB": {"prepare": limit(resource.RLIMIT_FSIZE, 4 * 2**20)},
        "no HOME": {"environment": nameless},
        "a missing HOME": {"environment": {"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": None}},
        "a missing TMPDIR": {"environment": {"TMPDIR": "/nowhere"}},
        "umask 077": {"prepare": lambda: os.umask(0o077)},
        "a deleted working folder": {"prepare": leave_folder},
        "standard input closed": {"prepare": close(0)},
        "standard output closed": {"prepare": close(1)},
        "standard error closed": {"prepare": close(2)},
        "ASCII output": {"environment": {"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}},
        "a terminal of one column": {"environment": {"COLUMNS": "1", "LINES": "1"}},
        "a strange time zone": {"environment": {"TZ": "Nowhere/At_All"}},
        "no PATH": {"environment": {"PATH": ""}},
        "RANK alone": {"environment": {"RANK": "1"}},
        "WORLD_SIZE=x": {"environment": {"WORLD_SIZE": "x"}},
        "WORLD_SIZE=2": {"environment": {"WORLD_SIZE": "2"}},
    }
    for name, options in cases.items():
        run = scene.out / "environment"
        shutil.rmtree(run, ignore_errors=True)
        ended = scene.run(run, **options)
        held, why = _is_sentence(ended), ended.last_words
        if ended.code == 0:
            why = difference(scene.expected, contents(run))
            held = not why
        yield name, held, why


SCENES = (signals, full_disks, deletions, two_processes, damaged_checkpoints, damaged_runs, environments)


def main(options: argparse.Namespace) -> bool:
    """Go through all accidents; returns whether all held."""
    out = options.out / "faults"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    scene, total, failed = _Scene(out), 0, 0
    for play in SCENES:
        if options.only and play.__name__ not in options.only:
            continue
        for name, held, why in play(scene):
            total, failed = total + 1, failed + (not held)
            if not held:
                print(f"{play.__name__}: {name}: {why}", flush=True)
    print(f"{total} accidents, {total - failed} borne")
    return not failed
