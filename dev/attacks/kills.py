"""SIGKILL at random moments: runs and evaluations that are killed and resumed must end like the one that was not."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from . import children
from .runs import KINDS, arguments, contents, difference, run_whole

MOST = 6
"""Kills of one run."""


def _names(run: Path) -> set[str]:
    """What stands in the folders that a checkpoint or an evaluation is written to."""
    return {
        f"{part}/{name}"
        for part in ("", "checkpoints", "eval")
        if (run / part).is_dir()
        for name in os.listdir(run / part)
    }


def _kill_once(command: list[str], run: Path, log: Path, whole: float, rng: random.Random) -> int | None:
    """Start a run and kill it; returns None, or the exit code if it ended before.

    The moment is a random time, or up to 60 ms after a file or folder appears, which is while one is being written.
    """
    pid, began, before = children.start(command, log), time.monotonic(), _names(run)
    by_time = rng.random() < 0.5
    left, seen = (rng.uniform(0, whole), began) if by_time else (rng.uniform(0, 0.06), None)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if seen is None and _names(run) - before:
            seen = now
        if seen is not None and now - seen >= left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        if now - began > 600:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -1
        time.sleep(0.001)


def _live(kind: str, run: Path, whole: float, rng: random.Random) -> tuple[int, str]:
    """Kill and resume a run until it ends; returns the number of kills and what went wrong."""
    log, kills = run.with_suffix(".log"), 0
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    while True:
        has_begun = (run / "status.json").exists() or (run / "evaluation.json").exists()
        command = [*arguments(kind, run), *(["--resume"] if has_begun else [])]
        if kills < MOST:
            code = _kill_once(command, run, log, whole, rng)
        else:
            code = children.run(command, log, limit=600).code
        if code is None:
            kills += 1
        elif code == 0:
            return kills, ""
        else:
            return kills, f"exit code {code} after {kills} kills: {log.read_text(errors='replace')[-400:]}"


def main(options: argparse.Namespace) -> bool:
    """Kill ``options.kills`` times; returns whether every run ended like the undisturbed one."""
    out = options.out / "kills"
    out.mkdir(parents=True, exist_ok=True)
    whole = {kind: run_whole(kind, out / kind) for kind in KINDS}
    rng, counts, number, wrong = random.Random(options.seed), Counter[str](), 0, 0
    while counts.total() < options.kills:
        kind = list(KINDS)[number % len(KINDS)]
        run = out / f"{kind}_{number:03d}"
        expected, ended = whole[kind]
        kills, problem = _live(kind, run, ended.seconds, rng)
        counts[kind] += kills
        problem = problem or difference(expected, contents(run))
        if problem:
            wrong += 1
            print(f"{run}: {problem}", flush=True)
        else:
            shutil.rmtree(run)
        number += 1
    print(f"{counts.total()} kills ({dict(counts)}) in {number} runs: {number - wrong} ended like the undisturbed one")
    return not wrong
