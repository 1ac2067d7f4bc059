"""What all verbs of the command share: common arguments, and errors told in plain sentences. Imports no torch."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from medvqa_rl.core.network import NetworkRefused, forbid_network, is_off

if TYPE_CHECKING:
    from medvqa_rl.config import Purpose
    from medvqa_rl.config.yaml import Loaded

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with settings, as those in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win over the file's, such as train.steps=100."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Load everything, show the shapes of one step, and stop.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show where in the program an error comes from.")]
Split = Literal["train", "val", "test"]


@contextmanager
def told_plainly(debug: bool = False) -> Iterator[None]:
    """Turn errors that the user can mend into one clear message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise typer.Exit(130) from None
    except (ValueError, OSError, ArithmeticError) as error:
        if debug or isinstance(error, BrokenPipeError):  # the reader of our output has gone; that ends quietly
            raise
        _say(_sentence(error))
        raise typer.Exit(1 if isinstance(error, ArithmeticError) else 2) from None
    except RuntimeError as error:
        from medvqa_rl.evaluation.evaluate import EvaluationFailed
        from medvqa_rl.learning.run.errors import TrainingFailed

        if debug or not isinstance(error, TrainingFailed | EvaluationFailed):
            raise
        _say(_sentence(error))
        raise typer.Exit(1) from None


def read_settings(path: Path, overrides: Sequence[str], *, purpose: Purpose) -> Loaded:
    """Read and check the settings of a verb, and shut the network where they, or ``--network``, say so.

    Raises:
        ConfigError: with a sentence for everything that is wrong.
    """
    from medvqa_rl.config.yaml import load_config

    loaded = load_config(path, [*overrides, *(["network=off"] if is_off() else [])], purpose=purpose)
    if loaded.config.network == "off":
        forbid_network()
    return loaded


def _sentence(error: Exception) -> str:
    """The message of an error, as a sentence."""
    from medvqa_rl.config import ConfigError

    if not isinstance(error, OSError) or isinstance(error, NetworkRefused):
        return (
            "\nerror: ".join(error.problems)
            if isinstance(error, ConfigError)
            else str(error) or f"{type(error).__name__} without a message: run again with --debug to see where."
        )
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"No space is left on the device{where}: free some, or choose another output folder."
    return f"{error.strerror or error}{where}: check the path and its permissions."


def _say(message: str) -> None:
    """Write an error message, unwrapped so that it can be searched for."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False)


def prepare_process() -> None:
    """Switch off the bars and notices of the libraries below, which would run into ours, and code that one of them
    would fetch; reuse memory."""
    import logging as standard_logging
    import warnings

    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    from medvqa_rl.core.memory import keep_freed_memory

    keep_freed_memory()
    # PEFT imports bitsandbytes where it is installed, and that, on some CPUs, runs code from the Hub where the package
    # kernels is, or else complains that it is not.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    standard_logging.getLogger("bitsandbytes").setLevel(standard_logging.ERROR)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
