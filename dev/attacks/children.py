"""Run the command in forked children of a process that has imported what the command imports. Linux only."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ[name] = value

Work = Callable[[], object] | Sequence[str]
"""A function, or the arguments of the command."""


def import_all() -> None:
    """Import what every verb imports, so that a fork starts at once. Loads no model: threads do not survive a fork."""
    from medvqa_rl.cli.common import prepare_process

    prepare_process()
    import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401

    import medvqa_rl.cli.app
    import medvqa_rl.evaluation.evaluate
    import medvqa_rl.evaluation.statistics.compare
    import medvqa_rl.learning.grpo
    import medvqa_rl.learning.sft
    import medvqa_rl.report.card
    import medvqa_rl.report.pages.report
    import medvqa_rl.study.running  # noqa: F401


@dataclass(frozen=True)
class Ended:
    """How a child ended."""

    code: int | None
    """Exit code, negative for a signal; None if it was killed at the time limit."""
    seconds: float
    peak_bytes: int
    """Peak resident memory."""
    output: str

    @property
    def is_clean(self) -> bool:
        """The child ended by itself and printed no traceback."""
        return self.code is not None and self.code >= 0 and "Traceback (most recent call last)" not in self.output

    @property
    def last_words(self) -> str:
        return " / ".join(self.output.strip().splitlines()[-3:])[-300:]


def start(
    work: Work,
    log: Path,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    prepare: Callable[[], object] | None = None,
) -> int:
    """Fork a child, whose output goes to a file, and return its process id.

    Args:
        work: what the child does.
        log: file that the output is appended to.
        folder: working folder.
        environment: variables to set, or to remove if None.
        prepare: called in the child before the work.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _renew_threads()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, errors="backslashreplace", closefd=False) for n in (1, 2))
        for name, value in (environment or {}).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if folder is not None:
            os.chdir(folder)
        if prepare is not None:
            prepare()
        if callable(work):
            work()
        else:
            from medvqa_rl.cli import main

            sys.argv = ["medvqa-rl", *work]
            main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code)
    except BaseException:  # noqa: BLE001  (printed as Python would)
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _renew_threads() -> None:
    """Replace torch's pool of threads, which a fork leaves without threads.

    Torch does so when a thread first needs the pool. Threads that need it at once, such as those that load weights,
    race for it, and one gets no pool ("Invalid thread pool!").
    """
    import torch

    torch.set_num_threads(1)


def wait(pid: int, log: Path, *, limit: float = 300.0) -> Ended:
    """Wait for a child, and kill it after ``limit`` seconds."""
    began = time.monotonic()
    while (ended := _poll(pid, log, began, limit)) is None:
        time.sleep(0.005)
    return ended


def _poll(pid: int, log: Path, began: float, limit: float) -> Ended | None:
    """How a child ended, which is killed at the limit; None if it runs."""
    done, status, usage = os.wait4(pid, os.WNOHANG)
    code: int | None = os.waitstatus_to_exitcode(status)
    if not done:
        if time.monotonic() - began <= limit:
            return None
        os.kill(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
        code = None
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(code, time.monotonic() - began, usage.ru_maxrss * 1024, output)


def run_beside(works: Mapping[str, Work], folder: Path, *, jobs: int, limit: float) -> Iterator[tuple[str, Ended]]:
    """Run children, up to ``jobs`` at once, each with a log of its name in a folder; yields them as they end."""
    left, running = list(works), dict[int, tuple[str, Path, float]]()
    while left or running:
        while left and len(running) < jobs:
            name = left.pop(0)
            log = folder / f"{name}.log"
            log.unlink(missing_ok=True)
            running[start(works[name], log)] = name, log, time.monotonic()
        for pid, (name, log, began) in list(running.items()):
            if (ended := _poll(pid, log, began, limit)) is not None:
                del running[pid]
                yield name, ended
        time.sleep(0.005)


def run(work: Work, log: Path, *, limit: float = 300.0, **options: object) -> Ended:
    """Start a child with an empty log and wait for it."""
    log.unlink(missing_ok=True)
    return wait(start(work, log, **options), log, limit=limit)  # type: ignore[arg-type]


def more_memory(gib: float) -> Callable[[], None]:
    """For ``prepare``: limit the address space to what it is now and ``gib`` more."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        allowed = pages * os.sysconf("SC_PAGE_SIZE") + int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, resource.RLIM_INFINITY))

    return limit


def less_time(seconds: int) -> Callable[[], None]:
    """For ``prepare``: limit the CPU time, which does not depend on what else is running."""
    return lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
