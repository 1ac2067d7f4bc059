"""Signals that ask a run to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager, ExitStack
from types import FrameType, TracebackType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals(AbstractContextManager["StopSignals"]):
    """Note a signal within the block instead of dying of it. A second Ctrl-C or SIGTERM raises KeyboardInterrupt."""

    def __init__(self, *, speaks: bool) -> None:
        """
        Args:
            speaks: whether this process reports a signal on standard error.
        """
        self.number = 0
        """The signal received, 0 if none."""
        self._speaks = speaks
        self._exits = ExitStack()
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set signal handlers
            for number in _NUMBERS:
                before = signal.signal(number, self._handle)
                self._exits.callback(signal.signal, number, before)
                if number == signal.SIGHUP and before == signal.SIG_IGN:
                    signal.signal(number, before)  # nohup
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_hangup = number == signal.SIGHUP  # often sent twice: by the kernel and by the shell
        if self.number in (signal.SIGINT, signal.SIGTERM) and not is_hangup:
            raise KeyboardInterrupt
        is_first = not self.number
        self.number = number if is_first or not is_hangup else self.number
        more = "" if is_hangup else " Interrupt again to stop at once and lose unsaved steps."
        # Not through the console: the handler may have interrupted it in the middle of a line.
        try:
            if self._speaks and is_first:
                os.write(2, f"\nStopping after this step.{more}\n".encode())
        except OSError:  # the terminal is gone; writing to it would end the run before it has saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(nowhere, descriptor)
