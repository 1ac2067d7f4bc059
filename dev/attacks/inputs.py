"""Damaged inputs: tables, images, settings, recipes, records, ratings, runs and completions.

Each case damages a valid input by a seeded generator and gives it to the command. It must end with a result or with a
sentence, within 10 s and 1 GiB, and no row may disappear without being counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from . import children
from .cases import CASES, Case
from .command import outcome
from .seeds import read_lines

MEMORY = 2**30


def _run_one(case: Case, seed: int, number: int, work: Path) -> tuple[str, str]:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    os.chdir(work)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = outcome(lambda: case(random.Random(f"{seed}/{case.__name__}/{number}")))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return ("out of memory", f"{grown / 2**30:.1f} GiB more") if grown > MEMORY else ended


def _run_many(case: Case, seed: int, numbers: range, work: Path, log: Path) -> None:
    """Run cases and write each outcome as a line."""
    for number in numbers:
        with log.open("a") as file:
            file.write(json.dumps([number, "began", ""]) + "\n")
        line = json.dumps([number, *_run_one(case, seed, number, work)])
        with log.open("a") as file:
            file.write(line + "\n")


def _find_seed(work: Path) -> None:
    """Link what :func:`~.seeds.make_run` made beside the working folder of a case."""
    link = work.with_name("seed")
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(work.parents[2] / "seed")


def attack(case: Case, seed: int, count: int, out: Path) -> list[tuple[int, str, str]]:
    """Run ``count`` cases in forked children of a hundred; returns number, class and detail of each."""
    log, first = out / f"{case.__name__}.jsonl", 0
    log.unlink(missing_ok=True)
    while first < count:
        numbers = range(first, min(count, first + 100))
        work = out / case.__name__ / "work"
        _find_seed(work)
        ended = children.run(
            partial(_run_many, case, seed, numbers, work, log),
            out / "child.log",
            limit=100 + 3 * len(numbers),
            prepare=children.more_memory(3),
        )
        first = numbers.stop
        if ended.code != 0:  # the process itself died: go on behind the input that killed it
            reached = read_lines(log)[-1][0] if log.exists() else numbers.start
            with log.open("a") as file:
                file.write(json.dumps([reached, "crash", f"exit code {ended.code}: {ended.last_words}"]) + "\n")
            first = reached + 1
    return [(number, kind, detail) for number, kind, detail in read_lines(log) if kind != "began"]


def main(arguments: argparse.Namespace) -> bool:
    """Attack with ``arguments.inputs`` inputs, print the faults by kind, a summary last; returns whether all held."""
    out = arguments.out / "inputs"
    out.mkdir(parents=True, exist_ok=True)
    totals: Counter[str] = Counter()
    faults: dict[tuple[str, str, str], list[int]] = {}
    for case, share in CASES.items():
        if arguments.only and case.__name__ not in arguments.only:
            continue
        found = attack(case, arguments.seed, max(1, round(arguments.inputs * share / sum(CASES.values()))), out)
        here = Counter(kind for _, kind, _ in found)
        totals += here
        print(f"{case.__name__:12} {dict(here)}", flush=True)
        for number, kind, detail in found:
            if kind not in ("fine", "sentence"):
                faults.setdefault((case.__name__, kind, detail.partition(" at ")[2] or detail), []).append(number)
    for (name, kind, detail), numbers in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"{kind}, {len(numbers)} times: {detail}   [--case {name}:{numbers[0]}]")
    failed = totals.total() - totals["fine"] - totals["sentence"]
    ended = f"{totals['fine']} read, {totals['sentence']} refused in a sentence, {failed} faults"
    print(f"{totals.total()} damaged inputs: {ended}")
    return not faults


def show(arguments: argparse.Namespace) -> None:
    """Run one case, as printed behind a fault, and show its error."""
    name, _, number = arguments.case.partition(":")
    case = next(case for case in CASES if case.__name__ == name)
    out = arguments.out / "inputs"
    work = out / name / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _find_seed(work)
    os.chdir(work)
    case(random.Random(f"{arguments.seed}/{name}/{number}"))
