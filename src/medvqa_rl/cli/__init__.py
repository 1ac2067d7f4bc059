"""The command ``medvqa-rl``. Imports no torch until a verb runs."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command; the entry point of the installed package."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    from medvqa_rl.cli.app import app

    try:
        try:
            app(prog_name="medvqa-rl")
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:  # of printing: a verb reports its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try again at exit
        if isinstance(error, BrokenPipeError):  # the reader of our output has exited: end quietly
            raise SystemExit(1) from None
        print(f"error: Standard output cannot be written ({error.strerror or error}).", file=sys.stderr)
        raise SystemExit(2) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: exit at once while a module is imported, else raise KeyboardInterrupt.

    Modules written in C++ abort the process when an exception passes through them (torch), or report another one.
    """
    inner = frame
    while inner is not None:
        if inner.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"Stopped.\n")
            os._exit(130)
        inner = inner.f_back
    signal.default_int_handler(number, frame)
