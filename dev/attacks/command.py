"""Run the command in this process, and judge how it ended."""

from __future__ import annotations

import io
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import typer

PATIENT = "DOE^JANE"
"""Stands in the DICOM files; no message may show it."""
SECONDS, LONGEST_WAIT = 10.0, 120.0
"""Seconds of CPU time and of real time that an input may take; the first does not depend on what else is running."""
LONGEST = 2_000
"""A message may be this long."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class OutOfTime(BaseException):
    """Raised by the alarm."""


class Fault(AssertionError):
    """What a check of an attack found."""


def invoke(arguments: Sequence[str], *, debug: bool = True) -> str:
    """Run ``medvqa-rl ARGUMENTS`` and return what it printed.

    Args:
        arguments: of the command.
        debug: add ``--debug``, which lets every error through instead of printing its sentence.

    Raises:
        typer.Exit: the command ended with an exit code other than 0.
        Fault: it printed a control character.
    """
    from medvqa_rl.cli.app import app

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [*arguments[:2], "--debug", *arguments[2:]] if debug else list(arguments)
        code = app(words, prog_name="medvqa-rl", standalone_mode=False)
    printed = out.getvalue()
    if found := CONTROL.search(printed.replace("\r", "")):
        raise Fault(f"{arguments[0]} prints the control character {found[0]!r}")
    if code:
        raise typer.Exit(code)
    return printed


def outcome(work: Callable[[], Any]) -> tuple[str, str]:
    """Run ``work`` and return a class and a detail: fine, sentence, or the name of a fault and where it arose.

    A sentence is an error that the package itself raised, of a type that the command prints without a traceback, short
    and printable.
    """

    def ring(signum: int, frame: Any) -> None:
        raise OutOfTime

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, LONGEST_WAIT)}
    for number, (timer, seconds) in timers.items():
        signal.signal(number, ring)
        signal.setitimer(timer, seconds)
    try:
        work()
    except typer.Exit:
        return "fine", ""
    except OutOfTime as error:
        return "too slow", _origin(error)
    except Fault as error:
        return "fault", str(error)[:300]
    except MemoryError as error:
        return "out of memory", _origin(error)
    except BaseException as error:  # noqa: BLE001  (judged below)
        return _judge_error(error)
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
    return "fine", ""


def _judge_error(error: BaseException) -> tuple[str, str]:
    from medvqa_rl.evaluation.evaluate import EvaluationFailed
    from medvqa_rl.learning.run.errors import TrainingFailed

    detail = f"{type(error).__name__}: {str(error)[:120]!r} at {_origin(error)}"
    if not isinstance(error, ValueError | OSError | ArithmeticError | EvaluationFailed | TrainingFailed):
        return "traceback", detail
    if PATIENT in str(error):
        return "names the patient", detail
    if not _was_raised_by_us(error):
        return "raw error", detail
    if len(str(error)) > LONGEST and not isinstance(error, OSError):  # whose path somebody gave
        return "long message", detail
    if CONTROL.search(str(error)):
        return "unprintable message", detail
    return "sentence", str(error)[:200]


def _was_raised_by_us(error: BaseException) -> bool:
    """Whether somebody wrote its sentence, or it is the operating system's about a named file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return "medvqa_rl" in frames[-1].filename


def _origin(error: BaseException) -> str:
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/medvqa_rl/" in frame.filename]
    return " < ".join(f"{f.filename.rpartition('/medvqa_rl/')[2]}:{f.lineno}" for f in reversed(own[-2:])) or "?"
