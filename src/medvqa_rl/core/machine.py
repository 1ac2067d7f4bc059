"""How this process uses the machine: memory allocation, the number of CPU threads, how they wait, and locks that keep
other processes out. No torch.

The number of threads is chosen from the load of the machine before torch is loaded. OpenMP threads spin while they
wait, so with one thread more than there are free cores a small model takes several times longer than with one less
(docs/performance.md). The number must not change during a run, because sums would be rounded differently; how threads
wait may, so :func:`watch_load` lets them sleep while other processes need the cores.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter

from medvqa_rl.core.files import read_json, writing
from medvqa_rl.core.text import printable

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that torch follows. If the user set one, nothing is chosen here."""

SHARE = "MEDVQA_RL_CORES"
"""Environment variable with the number of cores that this process may use, set by commands that start several."""

PARENT = "MEDVQA_RL_PARENT"
"""Environment variable with the process whose end also ends this one, set by commands that start others."""

SMALL_MODEL = 200_000_000
"""Bytes of a checkpoint below which more than MAX_THREADS_OF_SMALL threads would mostly wait."""
MAX_THREADS_OF_SMALL = 4

TOLERANCE = 0.4
"""How busy a core may be and still get a thread; above, the other threads wait for it longer than it helps."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel. Does nothing on other systems.

    Training on a CPU frees and allocates the same large tensors at every step. By default glibc returns each one to
    the kernel and gets it back page by page, which can take most of a step. The cost: the process keeps its peak
    memory.

    All threads also share one heap. With glibc's heap per thread, images that one thread allocates and another frees
    fragment every heap and take half as much memory again.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)
    mallopt(_M_ARENA_MAX, 1)


class Load(NamedTuple):
    """How busy other processes keep the cores of this machine."""

    cores: int
    """Cores that this process may use."""
    busy: float
    """How many of them are busy with other processes."""


class LoadMeter:
    """Measures the load of other processes since it was made."""

    def __init__(self) -> None:
        self._cores = own_cores()
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(self._cores), _own_seconds()

    def read(self) -> Load:
        """The mean load so far, without this process and those that it started and waited for."""
        seconds = time.perf_counter() - self._began
        others = _busy_seconds(self._cores) - self._busy - (_own_seconds() - self._own)
        return Load(len(self._cores), min(len(self._cores), max(0.0, others / seconds)))


def own_cores() -> Sequence[int]:
    """Return the numbers of the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else range(os.cpu_count() or 1)


def _busy_seconds(cores: Sequence[int]) -> float:
    """CPU seconds that all processes have used on these cores; 0 where the system does not count them."""
    times = psutil.cpu_times(percpu=True)
    if max(cores) >= len(times):  # some containers list their own cores only, under other numbers
        cores = range(min(len(cores), len(times)))
    return float(sum(_busy_part(times[core]) for core in cores))


def _busy_part(core: Any) -> float:
    """The busy seconds of a core's times. Those of guest systems are also in its user and nice seconds."""
    idle = core.idle + (core.iowait + core.guest + core.guest_nice if sys.platform == "linux" else 0.0)
    return float(sum(core) - idle)


def _own_seconds() -> float:
    """CPU seconds of this process and of the processes that it waited for."""
    return sum(os.times()[:4])


def measure_load(seconds: float = 0.25) -> Load:
    """Measure the load of other processes. This one computes meanwhile, so that processes that start together see
    each other."""
    meter, end = LoadMeter(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return meter.read()


def choose_threads(load: Load, share: int, *, num_bytes: int | None = None, before: int | None = None) -> int:
    """Choose the number of threads.

    Args:
        load: from :func:`measure_load`.
        share: from :func:`own_share`.
        num_bytes: size of the model's checkpoint; None if it is unknown.
        before: number of threads that a resumed run or evaluation was started with. It is kept if there are as many
            cores, because with another number sums are rounded differently.
    """
    if before is not None and before <= load.cores:
        return before
    is_small = num_bytes is not None and num_bytes < SMALL_MODEL
    limit = min(share, MAX_THREADS_OF_SMALL) if is_small else share
    return max(1, min(limit, int(load.cores - load.busy + TOLERANCE)))


def describe(count: int, load: Load, *, is_kept: bool) -> str:
    """Return a sentence that says how many threads are used and why."""
    number, cores = _counted(count, "CPU thread"), _counted(load.cores, "core")
    reason = "it was started with as many" if is_kept else "set OMP_NUM_THREADS to use another number"
    return f"Using {number}: other processes keep {load.busy:.1f} of {cores} busy ({reason})."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_set() -> bool:
    """Whether the user has set the number of threads."""
    return any(os.environ.get(name) for name in VARIABLES)


def own_share(processes: int = 1) -> int:
    """Return the number of physical cores that this process may use.

    Args:
        processes: number of processes that run side by side on this machine, this one included.
    """
    given = os.environ.get(SHARE, "")
    if given.isdecimal():
        return max(1, int(given))
    cores = len(own_cores())
    return max(1, min(cores, psutil.cpu_count(logical=False) or cores) // processes)


class _Recorded(BaseModel):
    threads: int | None = None


_RECORDED = TypeAdapter(_Recorded)


def recorded_threads(files: Iterable[Path]) -> int | None:
    """Return the number of threads that a run or an evaluation was started with; None if it is not recorded.

    Args:
        files: ``env.json`` of the run, or ``evaluation.json`` of the evaluations; the newest one counts.
    """
    newest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    return read_json(_RECORDED, newest, "restore the file, or start again in another folder").threads


def watch_load(seconds: float = 1.0) -> None:
    """Start a thread that lets torch's threads sleep while they wait, whenever other processes need their cores.

    Spinning is faster on free cores only. libgomp, the OpenMP of torch on Linux, spins briefly and then sleeps while
    there are more OpenMP threads than cores, so idle ones are added. Results do not change.

    Args:
        seconds: time between two looks at the load.
    """
    if sys.platform == "linux":
        Thread(target=_watch, args=(seconds,), daemon=True, name="load").start()


def _watch(seconds: float) -> None:
    """The thread of :func:`watch_load`."""
    while "torch" not in sys.modules:
        time.sleep(seconds)
    import torch  # waits until the main thread has imported it

    count = torch.get_num_threads()
    release: Event | None = None
    while count > 1:
        meter = LoadMeter()
        time.sleep(seconds)
        load = meter.read()
        is_crowded = count > load.cores - load.busy + 0.5
        if is_crowded and release is None:
            release = _add_idle_threads(count)
        elif release is not None and not is_crowded:
            release.set()
            release = None


def _add_idle_threads(count: int) -> Event:
    """Add OpenMP threads, more than there are cores, that sleep until the event is set.

    Args:
        count: number of threads that torch uses, which is also the size of each team that is added.
    """
    import torch

    release = Event()

    def idle() -> None:
        torch.ones(count * 2**16).mul_(2)  # large enough for all threads; they remain until this one ends
        release.wait()

    for _ in range((len(own_cores()) - count) // (count - 1) + 1):  # each adds count - 1 to the count there are
        Thread(target=idle, daemon=True, name="idle").start()
    return release


def end_with_parent(*, seconds: float = 1.0) -> None:
    """Terminate this process (SIGTERM, so training saves a checkpoint) when the process in :data:`PARENT` has ended,
    also if that one was killed. Checks every ``seconds``; does nothing if the variable is not set."""
    if PARENT not in os.environ:
        return

    def watch() -> None:
        try:
            parent = psutil.Process(int(os.environ[PARENT]))
            while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(seconds)
        except psutil.NoSuchProcess:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=watch, name="end with parent", daemon=True).start()


# --- one process at a time -----------------------------------------------------------------------------------------


class ProcessLock:
    """An exclusive lock on a file, and beside it the process that holds it, for the messages of others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.holder = path.with_name(f"{path.name}.pid")
        self._lock = FileLock(path)

    def acquire(self, sentence: str) -> None:
        """Take the lock; its folder is created.

        Args:
            sentence: says what another process that has it does, and what to do: "is using x: wait for it."

        Raises:
            ValueError: another process has it; the message names the process.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self._name_holder()} {sentence}") from None
        try:
            with writing(self.holder):
                self.holder.write_text(_this_process(), encoding="utf-8", errors="replace")
        except BaseException:
            self.release()
            raise

    def _name_holder(self) -> str:
        try:
            pid, _, host = self.holder.read_text(encoding="utf-8", errors="replace").partition(" ")
        except OSError:  # of an older version, or about to be written
            return "Another process"
        where = "" if host == platform.node() else f" on {printable(host, 100)}"
        return f"Process {pid}{where}" if pid.isdecimal() else "Another process"

    def is_ours(self) -> bool:
        """Whether the file beside the lock still names this process."""
        try:
            return self.holder.read_text(encoding="utf-8", errors="replace") == _this_process()
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock. Its file stays: removing it would let two waiting processes in."""
        if self.is_ours():
            self.holder.unlink(missing_ok=True)
        self._lock.release()


def _this_process() -> str:
    return f"{os.getpid()} {platform.node()}"


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Let only this process write ``path`` in the block. Check there, not before, that it does not exist yet.

    Raises:
        ValueError: another process is writing it; the message names the process.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    is_new = not path.parent.exists()
    lock = ProcessLock(path.with_name(f".{path.name}.lock"))
    lock.acquire(f"is writing {path}: wait for it, or choose another output.")
    try:
        yield
    finally:
        lock.path.unlink(missing_ok=True)  # whoever comes later finds the output
        lock.release()
        if is_new:
            with suppress(OSError):  # something was written
                path.parent.rmdir()
