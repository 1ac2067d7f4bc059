"""SIGKILL at random moments: runs, evaluations and studies that are killed and resumed must end like undisturbed ones,
and leave no process behind."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil

from . import children
from .children import Ended
from .command import Fault
from .runs import KINDS, arguments, contents, difference, run_whole

MOST = 6
"""Kills of one run."""
LONGEST = 600.0
"""Seconds that a run may take."""
ALONE = 4.0
"""CPU seconds that a process may use after the kill of the one that started it, to save and end."""


_PARTS = ("checkpoints", "eval", "*/*", "*/*/checkpoints", "*/*/eval", "*/*/eval/*")


def _names(run: Path) -> set[str]:
    """What stands in a run, or in the runs of a study."""
    folders = [run, *(folder for part in _PARTS for folder in run.glob(part))]
    return {f"{folder}/{name}" for folder in folders if folder.is_dir() for name in os.listdir(folder)}


def _kill_once(command: list[str], run: Path, log: Path, whole: float, rng: random.Random) -> int | None:
    """Start a run and kill it; returns None, or the exit code if it ended before.

    The moment is a random time, or up to 60 ms after a file or folder appears, which is while one is being written.

    Raises:
        Fault: a process that the run started outlives it.
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
        if (seen is not None and now - seen >= left) or now - began > LONGEST:
            started = psutil.Process(pid).children(recursive=True)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if now - began > LONGEST:
                return -1
            if rng.random() < 0.5:  # else the next one starts beside those that are still ending
                _wait_for_orphans(started)
            return None
        time.sleep(0.001)


def _wait_for_orphans(processes: list[psutil.Process]) -> None:
    """Wait until processes whose parent was killed have ended.

    Raises:
        Fault: one of them goes on.
    """
    used = {process: _cpu_seconds(process) for process in processes}
    while alive := [process for process in processes if _is_running(process)]:
        for process in alive:
            if _cpu_seconds(process) - used[process] > ALONE:
                raise Fault(f"process {process.pid} goes on after the kill of the one that started it")
        time.sleep(0.05)


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _live(kind: str, run: Path, whole: float, most: int, rng: random.Random) -> tuple[int, str]:
    """Kill a run up to ``most`` times and resume it until it ends; returns the number of kills and what went wrong."""
    log, kills = run.with_suffix(".log"), 0
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    while True:
        has_begun = (run / "status.json").exists() or (run / "evaluation.json").exists()
        command = [*arguments(kind, run), *(["--resume"] if has_begun else [])]
        try:
            if kills < most:
                code = _kill_once(command, run, log, whole, rng)
            else:
                code = children.run(command, log, limit=LONGEST).code
        except Fault as fault:
            return kills + 1, str(fault)
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
    whole: dict[str, tuple[dict[str, str], Ended]] = {}
    rng, counts, number, wrong = random.Random(options.seed), Counter[str](), 0, 0
    possible = options.only or [
        kind for kind in KINDS if not (options.short and kind == "study")
    ]  # which takes a minute
    kinds = sorted(set(possible) & set(KINDS), key=lambda kind: rng.random())
    while (left := options.kills - counts.total()) > 0:
        kind = kinds[number % len(kinds)]
        run = out / f"{kind}_{number:03d}"
        if kind not in whole:
            whole[kind] = run_whole(kind, out / kind)
        expected, ended = whole[kind]
        kills, problem = _live(kind, run, ended.seconds, min(left, MOST), rng)
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
