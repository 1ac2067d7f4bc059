"""Detects dead, frozen or stuck ranks, names them, and ends the run.

Launchers notice when a process dies, and the process group's timeout ends a collective that never completes. Neither
notices a frozen process, names the rank that blocks the others, or tells it from a rank that is busy with a long
evaluation, for which that timeout has to be long.

Each rank publishes a heartbeat and its position in the training loop through the process group's store. A rank whose
heartbeat stops is dead or frozen. If all heartbeats continue but no rank makes progress, the ranks furthest behind are
stuck, and among several at the same position those that are not waiting in a collective. All times are measured on
the local clock, from when a change was seen.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.autograd.graph
from torch.distributed import distributed_c10d

HEARTBEAT_TIMEOUT = 60.0
"""Seconds without a heartbeat after which a rank counts as dead, unless ``train.rank_timeout`` is shorter."""

PHASES = ("start", "rollout", "rewards", "update", "logging")
"""Phases of a step in order; evaluating and saving belong to the last."""

_DONE = "done"

_COLLECTIVE_CODE = (str(Path(distributed_c10d.__file__).parent), torch.autograd.graph.__file__)
"""Files whose code waits for other ranks: collectives, and the backward pass, which synchronizes gradients."""


@dataclass
class _Rank:
    """What is known about a rank."""

    heartbeat: int = 0
    progress: int = 0
    """Incremented whenever its main thread makes progress."""
    step: int = 0
    phase: int = 0
    in_collective: bool = False
    """Whether its main thread is in a collective or a backward pass."""
    ended: str | None = None
    """None while it runs, then ``done`` or the reason for its failure."""
    last_seen: float = field(default_factory=time.monotonic)
    """When its heartbeat last changed."""


class RollCall:
    """Watches the other ranks in background threads until :meth:`leave`."""

    def __init__(self, rank: int, num_ranks: int, timeout: float, on_lost: Callable[[str, bool], None]) -> None:
        """
        Args:
            timeout: ``train.rank_timeout``, in seconds.
            on_lost: called on every surviving rank, in a thread, with a sentence that names the lost ranks and with
                whether this is the one rank that should print it. All processes then exit with code 1.
        """
        self._rank, self._timeout, self._on_lost = rank, timeout, on_lost
        self._heartbeat_timeout = min(HEARTBEAT_TIMEOUT, timeout)
        self._interval = min(5.0, timeout / 10)
        self._own = _Rank()
        self._others = {other: _Rank() for other in range(num_ranks) if other != rank}
        self._last_read = self._last_progress = time.monotonic()
        self._has_left = threading.Event()
        self._main_thread = threading.get_ident()
        # A separate connection, because collectives can block the one of the process group.
        store: Any = distributed_c10d._get_default_store()
        self._store: Any = store.clone()
        # Two threads, because reading blocks if the process that hosts the store is frozen.
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, daemon=True).start()

    def set_phase(self, step: int, phase: str) -> None:
        """The main thread begins a phase of a step, counted from 1."""
        self._own.step, self._own.phase = step, PHASES.index(phase)
        self.tick()

    def tick(self) -> None:
        """The main thread made progress within a phase."""
        self._own.progress += 1
        self._last_progress = time.monotonic()

    def leave(self, reason: str | None = None) -> None:
        """Stop watching, and tell the other ranks that this one is done, or the reason for its failure."""
        self._has_left.set()
        self._own.ended = _DONE if reason is None else reason
        try:
            self._publish()
        except (RuntimeError, OSError):
            return  # the process that hosts the store is gone

    def find_lost_ranks(self) -> str | None:
        """Look for lost ranks after a failed collective; takes six intervals.

        Returns:
            A sentence that names them, or None if all ranks respond.
        """
        time.sleep(6 * self._interval)  # longer than below, because the last heartbeat may be read late
        lost = self._silent(4 * self._interval)
        return self._lost_sentence(lost) if lost else None

    def _silent(self, timeout: float) -> list[int]:
        """The running ranks whose heartbeat has not changed for ``timeout`` seconds."""
        now = time.monotonic()
        if now - self._last_read > timeout and self._rank != 0:
            return [0]  # the store cannot be read, and rank 0 hosts it unless a launcher does
        return [
            other for other, known in self._others.items() if known.ended != _DONE and now - known.last_seen > timeout
        ]

    def _publish(self) -> None:
        own = self._own
        own.in_collective = _is_in_collective(self._main_thread)
        value = [own.heartbeat, own.progress, own.step, own.phase, own.in_collective, own.ended]
        self._store.set(f"roll_call/{self._rank}", json.dumps(value))

    def _exchange(self) -> None:
        """Thread: publish this rank's state and read the others'. Ends if the store is gone, which _watch notices."""
        try:
            while not self._has_left.is_set():
                self._own.heartbeat += 1
                self._publish()
                for other, known in self._others.items():
                    self._read(f"roll_call/{other}", known)
                self._last_read = time.monotonic()
                self._has_left.wait(self._interval)
        except (RuntimeError, OSError):
            return

    def _read(self, key: str, known: _Rank) -> None:
        if not self._store.check([key]):
            return  # it has not started yet
        heartbeat, progress, known.step, known.phase, known.in_collective, known.ended = json.loads(
            self._store.get(key)
        )
        now = time.monotonic()
        if heartbeat != known.heartbeat:
            known.heartbeat, known.last_seen = heartbeat, now
        if progress != known.progress:
            known.progress, self._last_progress = progress, now

    def _watch(self) -> None:
        """Thread: end the process once the same ranks were found lost three times in a row."""
        before: list[int] = []
        times = 0
        while not self._has_left.wait(self._interval):
            lost, sentence = self._find_lost()
            times = times + 1 if lost == before else 1
            before = lost
            if not lost or times < 3:
                continue
            speaker = min({self._rank, *self._others} - set(lost), default=0)
            self._on_lost(sentence, self._rank == speaker)
            if self._rank != speaker:
                time.sleep(3 * self._interval)  # launchers kill the others as soon as one exits
            os._exit(1)

    def _find_lost(self) -> tuple[list[int], str]:
        """The lost ranks and a sentence that names them."""
        if silent := self._silent(self._heartbeat_timeout):
            return silent, self._lost_sentence(silent)
        if time.monotonic() - self._last_progress <= self._timeout:
            return [], ""
        running = {rank: known for rank, known in {self._rank: self._own, **self._others}.items() if not known.ended}
        position = min((known.step, known.phase) for known in running.values())
        behind = sorted(rank for rank, known in running.items() if (known.step, known.phase) == position)
        stuck = [rank for rank in behind if not running[rank].in_collective] or behind
        return stuck, (
            f"No rank has made progress for {self._timeout:g} s (train.rank_timeout): {_ranks(stuck).lower()} got "
            f"stuck {_position(*position)} while the others wait."
        )

    def _lost_sentence(self, lost: Sequence[int]) -> str:
        """Say that ranks stopped responding, or why the first of them failed.

        Ranks are at most one collective apart, so this rank's position stands for that of the lost ones.
        """
        where = _position(self._own.step, self._own.phase)
        reason = self._others[lost[0]].ended
        if reason is not None:
            return f"{_ranks(lost)} failed, which was noticed {where}: {reason}"
        return f"{_ranks(lost)} stopped responding {where}: dead, frozen or unreachable."


def _is_in_collective(thread: int) -> bool:
    """Whether a thread is executing code that waits for other ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_COLLECTIVE_CODE):
            return True
        frame = frame.f_back
    return False


def _position(step: int, phase: int) -> str:
    """Format a position as ``in the update of step 4``."""
    return f"in the {PHASES[phase]} of step {step}" if step else "at the start"


def _ranks(ranks: Iterable[int]) -> str:
    """Format ranks as ``Rank 1`` or ``Ranks 1, 2``."""
    numbers = [str(rank) for rank in ranks]
    return f"Rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
