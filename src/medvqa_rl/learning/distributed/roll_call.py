"""Notices that a rank is dead, frozen or stuck, so that the others do not wait for it for ever.

A thread of every rank counts a pulse up in the store of the process group, beside what its main thread is doing. A
pulse that stands still belongs to a process that is dead or frozen. Where all pulses go on but no rank gets any
further, those furthest behind are stuck, and of several in the same place those that do not wait for the others. Time
is measured on each rank's own clock, by when it saw something change.
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

PULSE_SECONDS = 60.0
"""A pulse may stand still for so long, where ``train.rank_timeout`` is not shorter."""

PHASES = ("start", "rollout", "rewards", "update", "logging")
"""What a rank does, in the order of a step; saving and evaluating are part of the last."""

_DONE = "done"

_EXCHANGES = (str(Path(distributed_c10d.__file__).parent), torch.autograd.graph.__file__)
"""Where the code lies that waits for other ranks: exchanges, and backward passes, in which gradients are exchanged."""


@dataclass
class _Rank:
    """What is known of a rank."""

    pulse: int = 0
    moves: int = 0
    """Grows whenever its main thread gets on."""
    step: int = 0
    phase: int = 0
    waits: bool = False
    """Its main thread is within an exchange with other ranks."""
    ended: str | None = None
    """None while it runs, then ``done`` or why it failed."""
    seen: float = field(default_factory=time.monotonic)
    """When its pulse was last seen to move."""


class RollCall:
    """Watches the other ranks from now on, until :meth:`leave`."""

    def __init__(self, rank: int, num_ranks: int, timeout: float, on_loss: Callable[[str, bool], None]) -> None:
        """
        Args:
            timeout: seconds, ``train.rank_timeout``.
            on_loss: gets the sentence about lost ranks, in a thread of every rank that is alive, and whether this
                is the one rank to say it; then all processes exit with 1.
        """
        self._rank, self._timeout, self._on_loss = rank, timeout, on_loss
        self._pulse_timeout = min(PULSE_SECONDS, timeout)
        self._interval = min(5.0, timeout / 10)
        self._own = _Rank()
        self._others = {other: _Rank() for other in range(num_ranks) if other != rank}
        self._round = self._progress = time.monotonic()  # when the store was last read, and when anybody got on
        self._has_left = threading.Event()
        self._thread = threading.get_ident()
        # A connection of its own: that of the process group may be held for as long as a rank waits.
        store: Any = distributed_c10d._get_default_store()
        self._store: Any = store.clone()
        for work in (self._count, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def set_phase(self, step: int, phase: str) -> None:
        """The main thread begins a phase of a step, counted from 1."""
        self._own.step, self._own.phase = step, PHASES.index(phase)
        self.tick()

    def tick(self) -> None:
        """The main thread gets on, within something that other ranks wait for."""
        self._own.moves += 1
        self._progress = time.monotonic()

    def leave(self, reason: str | None = None) -> None:
        """This rank ends: well, or for a reason that the others may tell."""
        self._has_left.set()
        self._own.ended = _DONE if reason is None else reason
        try:
            self._tell()
        except (RuntimeError, OSError):
            return  # the store has gone with whoever held it, so nobody reads this

    def find_lost_ranks(self) -> str | None:
        """After an exchange between ranks failed: a sentence about those that are gone, None if all are there."""
        # What a rank wrote just before it died may not have been read yet, and would look like a later sign of life.
        time.sleep(2 * self._interval)
        before = {other: known.pulse for other, known in self._others.items()}
        began = time.monotonic()
        time.sleep(4 * self._interval)
        lost = [other for other, known in self._others.items() if known.pulse == before[other]]
        lost = [other for other in lost if self._others[other].ended != _DONE]
        if self._round < began:
            lost = [0]  # its process holds the store, unless a launcher does
        return self._sentence(lost) if lost else None

    def _tell(self) -> None:
        own = self._own
        own.waits = _is_in_exchange(self._thread)
        value = [own.pulse, own.moves, own.step, own.phase, own.waits, own.ended]
        self._store.set(f"roll_call/{self._rank}", json.dumps(value))

    def _count(self) -> None:
        """The thread of the pulse. Where the store is gone it ends, which :meth:`_judge` sees."""
        try:
            while not self._has_left.is_set():
                self._own.pulse += 1
                self._tell()
                for other, known in self._others.items():
                    self._read(f"roll_call/{other}", known)
                self._round = time.monotonic()
                self._has_left.wait(self._interval)
        except (RuntimeError, OSError):
            return

    def _read(self, key: str, known: _Rank) -> None:
        """What another rank tells of itself."""
        if not self._store.check([key]):
            return  # it has not begun
        pulse, moves, known.step, known.phase, known.waits, known.ended = json.loads(self._store.get(key))
        now = time.monotonic()
        if pulse != known.pulse:
            known.pulse, known.seen = pulse, now
        if moves != known.moves:
            known.moves, self._progress = moves, now

    def _judge(self) -> None:
        """The thread that ends the process where ranks are lost, once it has seen so three times in a row."""
        verdicts: list[tuple[tuple[int, ...], str]] = []
        while not self._has_left.wait(self._interval):
            verdict = self._verdict(time.monotonic())
            verdicts = [*verdicts, verdict] if verdict is not None else []
            if len(verdicts) >= 3 and len({lost for lost, _ in verdicts[-3:]}) == 1:
                lost, sentence = verdicts[-1]
                speaker = min({self._rank, *self._others} - set(lost), default=0)
                self._on_loss(sentence, self._rank == speaker)
                if self._rank != speaker:
                    time.sleep(3 * self._interval)  # a launcher ends all when the first one ends
                os._exit(1)

    def _verdict(self, now: float) -> tuple[tuple[int, ...], str] | None:
        """Which ranks are lost, and a sentence about them."""
        if now - self._round > self._pulse_timeout and self._rank != 0:
            return (0,), self._sentence([0])
        silent = [
            other
            for other, known in self._others.items()
            if known.ended != _DONE and now - known.seen > self._pulse_timeout
        ]
        if silent:
            return tuple(silent), self._sentence(silent)
        if now - self._progress > self._timeout:
            ranks = {self._rank: self._own, **self._others}
            least = min((known.step, known.phase) for known in ranks.values() if known.ended is None)
            behind = sorted(rank for rank, known in ranks.items() if (known.step, known.phase) == least)
            behind = [rank for rank in behind if not ranks[rank].waits] or behind
            where = _place(*least)
            return tuple(behind), (
                f"No rank has got any further for {self._timeout:g} s (train.rank_timeout): {_named(behind).lower()} "
                f"{_verb(behind, 'is', 'are')} stuck {where}, and the others wait."
            )
        return None

    def _sentence(self, lost: Sequence[int]) -> str:
        """That ranks are dead or frozen, or why the first of them failed, and where this rank misses them.

        Ranks are never further apart than from one exchange to the next, so its own place is the best that is known.
        """
        where = _place(self._own.step, self._own.phase)
        reason = self._others[lost[0]].ended
        if reason is not None:
            return f"{_named(lost)} failed, which was noticed {where}: {reason}"
        return (
            f"{_named(lost)} {_verb(lost, 'gives', 'give')} no sign of life {where}: "
            f"{_verb(lost, 'its process is', 'their processes are')} dead or frozen, or cannot be reached."
        )


def _is_in_exchange(thread: int) -> bool:
    """Whether a thread is somewhere below the code that exchanges something with other ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_EXCHANGES):
            return True
        frame = frame.f_back
    return False


def _place(step: int, phase: int) -> str:
    """ "in the update of step 4"."""
    return f"in the {PHASES[phase]} of step {step}" if step else "at the start"


def _named(ranks: Iterable[int]) -> str:
    """ "Rank 1" or "Ranks 1, 2"."""
    numbers = [str(rank) for rank in ranks]
    return f"Rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _verb(ranks: Sequence[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several
