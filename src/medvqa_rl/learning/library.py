"""What a program that calls the package as a library is spared. Imports no torch until something fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from medvqa_rl.config import Config
from medvqa_rl.config.errors import MedVQAError, sentence
from medvqa_rl.core.network import forbid_network, spare_this_machine
from medvqa_rl.core.packages import check_installed


def prepare(config: Config) -> None:
    """Check the installed packages, and block the network if the settings say so, before torch is loaded."""
    if (warning := check_installed()) is not None:
        warnings.warn(warning.removeprefix("Warning: "), stacklevel=5)
    spare_this_machine()
    if config.network == "off":
        forbid_network()


@contextmanager
def as_library() -> Iterator[None]:
    """Raise what the user can fix as :class:`MedVQAError`, and leave the process as it was: Accelerate's state, which
    holds the precision of the first run, would bind every later one.

    A signal that stopped a run, which has saved a checkpoint, is sent again, so that the program handles it as it
    always does: Ctrl-C raises KeyboardInterrupt.
    """
    received = 0
    owns_accelerate = not _is_accelerating() and "RANK" not in os.environ
    quantizer = logging.getLogger("bitsandbytes")
    level, blocks = quantizer.level, "kernels" not in sys.modules
    if blocks:  # PEFT imports bitsandbytes, which runs code from the Hub on some CPUs, or warns
        sys.modules["kernels"] = None  # type: ignore[assignment]
        quantizer.setLevel(logging.ERROR)
    try:
        yield
    except MedVQAError:
        raise
    except (ValueError, OSError, ArithmeticError) as error:
        raise MedVQAError(sentence(error) or f"{type(error).__name__} without a message.") from error
    except RuntimeError as error:
        from medvqa_rl.evaluation.evaluate import EvaluationFailed
        from medvqa_rl.learning.run.errors import TrainingFailed

        if not isinstance(error, TrainingFailed | EvaluationFailed):
            raise
        raise MedVQAError(sentence(error)) from error
    except SystemExit as error:
        from medvqa_rl.learning.run.errors import Stopped

        if not isinstance(error, Stopped):
            raise
        received = int(str(error.code)) - 128
    finally:
        if blocks:
            sys.modules.pop("kernels", None)
            quantizer.setLevel(level)
        if owns_accelerate and _is_accelerating():
            accelerate = sys.modules["accelerate.state"]
            accelerate.AcceleratorState._reset_state(reset_partial_state=True)
            accelerate.GradientState._reset_state()
    if received:
        signal.raise_signal(received)


def _is_accelerating() -> bool:
    """Whether the process has a state of Accelerate."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is not None and bool(accelerate.PartialState._shared_state)
