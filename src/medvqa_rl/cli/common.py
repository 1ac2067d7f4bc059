"""What all verbs share: common arguments, error messages, exit codes and process settings. Imports no torch.

Exit codes: 0 success, 1 the run failed, 2 invalid input (explained in a sentence), 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import csv
import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from medvqa_rl.core.network import forbid_network, is_off, spare_this_machine
from medvqa_rl.core.progress import TerminalConsole
from medvqa_rl.core.text import is_unicode, printable, shown

if TYPE_CHECKING:
    from medvqa_rl.config import Purpose
    from medvqa_rl.config.yaml import Loaded

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config, such as those in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that override the config, such as train.steps=100."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Load everything, run one step, print its shapes and exit.")]
MAX_MESSAGE = 2000
"""Most characters of a line of an error message, whatever a library put into it."""
Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback on errors.")]
Split = Literal["train", "val", "test"]
TextOnly = Annotated[
    bool,
    typer.Option("--allow-text-only", help="Keep questions without an image; otherwise they are unusable rows."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN,...",
        help="Which columns of your table are what, such as image=Bild,question=Frage, where their names are not "
        "recognised; quote an entry whose column has a comma.",
    ),
]


class _Verb(TyperCommand):
    """A command whose flags show no type in ``--help``, and that says how to write a setting given as an option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if isinstance(parameter, TyperOption) and parameter.is_flag and parameter.metavar is None:
                _without_type(parameter)

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        return _without_type(super().get_help_option(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        if any(parameter.name == "overrides" for parameter in self.params):
            for word, following in zip(args, [*args[1:], ""]):
                option, _, value = word.partition("=")
                if option.startswith("--") and option not in known and (names := _settings_called(option)):
                    value = value or (following if following and not following.startswith("-") else "VALUE")
                    written = " or ".join(f"{name}={value}" for name in names[:3])
                    _print_error(f"{option} is not an option: settings are written without dashes, as {written}.")
                    raise typer.Exit(2)
        return super().parse_args(ctx, args)


class _Group(TyperGroup):
    """A group whose flags show no type."""

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        return _without_type(super().get_help_option(ctx))

    def get_params(self, ctx: Any) -> list[Any]:
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if isinstance(parameter, TyperOption) and parameter.name in ("install_completion", "show_completion"):
                _without_type(parameter)
        return parameters


def _without_type(flag: TyperOption | None) -> TyperOption | None:
    if flag is not None:
        flag.metavar = ""
    return flag


def _settings_called(option: str) -> list[str]:
    """The settings that an unknown option may mean: ``--steps`` or ``--train.steps`` is ``train.steps``."""
    from medvqa_rl.config.other_names import OTHER_NAMES
    from medvqa_rl.config.schema import all_settings

    given = option.removeprefix("--").replace("-", "_")
    names = [name for name, _ in all_settings() if given in (name, name.rpartition(".")[2])]
    return names or [name for other, name in OTHER_NAMES.items() if other == given]


class Verbs(typer.Typer):
    """A group of verbs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        return super().command(name, cls=_Verb, **settings)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Make a verb of a function: add ``--debug``, prepare the process, and report errors as one sentence.

    Errors that the user can fix end with an exit code instead of a traceback; defects, and everything under
    ``--debug``, keep their traceback.
    """
    signature = inspect.signature(function, eval_str=True)
    debug_option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        prepare_process()
        try:
            _refuse_other_names(kwargs)
            function(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            print("Stopped.", file=sys.stderr)
            raise typer.Exit(130) from None
        except (ValueError, OSError, ArithmeticError) as error:
            if debug or isinstance(error, BrokenPipeError):  # the reader of our output has exited: end quietly
                raise
            _print_error(_sentence(error))
            raise typer.Exit(1 if isinstance(error, ArithmeticError) else 2) from None
        except RuntimeError as error:
            from medvqa_rl.evaluation.evaluate import EvaluationFailed
            from medvqa_rl.learning.run.errors import TrainingFailed

            if debug or not isinstance(error, TrainingFailed | EvaluationFailed):
                raise
            _print_error(_sentence(error))
            raise typer.Exit(1) from None

    parameters = [*signature.parameters.values(), debug_option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {**function.__annotations__, "debug": Debug}
    return run


def _refuse_other_names(given: Mapping[str, object]) -> None:
    """Raise ValueError for arguments, or a working folder, that are not UTF-8: settings, records and pages are, and
    could not name them. Overrides are checked where they are read."""
    for name, value in given.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, Path | str) and name != "overrides" and not is_unicode(str(one)):
                raise ValueError(
                    f"The argument {shown(str(one), 300)} is not UTF-8: write it in UTF-8, and rename files that are "
                    "not."
                )
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it was removed: absolute paths still work
        return
    if not is_unicode(folder):
        raise ValueError(
            f"The name of the working folder {shown(folder, 300)} is not UTF-8: rename it, or run from another folder."
        )


def prepare_process() -> None:
    """End with the process that started this one, reuse freed memory, keep local requests off proxies, turn telemetry
    off, and silence what the libraries below would print into our output. Imports none of them."""
    from medvqa_rl.core.machine import end_with_parent, keep_freed_memory

    end_with_parent()
    keep_freed_memory()
    spare_this_machine()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows it too, when it is imported
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    # PEFT imports bitsandbytes if it is installed. On some CPUs bitsandbytes then runs code from the Hub through the
    # package kernels, or warns that the package is missing.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT's question to transformers.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def read_settings(path: Path, overrides: Sequence[str], *, purpose: Purpose) -> Loaded:
    """Read and check a config, and block the network if the config or ``--network`` says so.

    Raises:
        ConfigError: the config is invalid; has a sentence for each problem.
    """
    from medvqa_rl.config.yaml import load_config

    loaded = load_config(path, [*overrides, *(["network=off"] if is_off() else [])], purpose=purpose)
    if loaded.config.network == "off":
        forbid_network()
    return loaded


def run_folder(path: Path) -> Path | None:
    """The run directory that an argument names; None for a config.

    Raises:
        ValueError: it is a folder, but not that of a run.
    """
    if not path.is_dir():
        return None
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"The folder {path} is not a run directory, because it has no config.yaml: give the output_dir of a "
            "training run, or a YAML config."
        )
    return path


def use_threads(model: str | None, *, processes: int = 1, records: Iterable[Path] = ()) -> None:
    """Before torch is loaded: check the releases of the packages that compute, choose the number of CPU threads and
    print it. A number that the user set is used as is.

    Args:
        model: ``model.path``; a small model gets few threads. None if it is unknown.
        processes: number of processes that run side by side on this machine, this one included.
        records: files of what is resumed, with its number of threads: see :func:`recorded_threads`.

    Raises:
        ValueError: a package is missing or too old.
    """
    from medvqa_rl.core import machine
    from medvqa_rl.core.embedded import checkpoint_bytes
    from medvqa_rl.core.packages import check_installed

    if (warning := check_installed()) is not None and os.environ.get("RANK", "0") == "0":
        print(warning, file=sys.stderr)

    if "torch" in sys.modules:  # too late
        return
    if not machine.is_set():
        size = None if model is None else checkpoint_bytes(model)
        before = machine.recorded_threads(records)
        load = machine.measure_load()
        count = machine.choose_threads(load, machine.own_share(processes), num_bytes=size, before=before)
        os.environ["OMP_NUM_THREADS"] = str(count)
        print(machine.describe(count, load, is_kept=count == before), file=sys.stderr)
    machine.watch_load()


def _sentence(error: Exception) -> str:
    """Return an error's message as a sentence, followed by its notes."""
    from medvqa_rl.config import ConfigError
    from medvqa_rl.config.errors import sentence

    if isinstance(error, ConfigError):
        return "\nerror: ".join(error.problems)
    return sentence(error) or f"{type(error).__name__} without a message: run again with --debug to see where."


def _print_error(message: str) -> None:
    """Print an error message to standard error without wrapping, so that it can be searched for."""
    console = TerminalConsole(stderr=True, soft_wrap=True, highlight=False)
    console.print("error:", style="bold red", end=" ")
    console.print("\n".join(printable(line, MAX_MESSAGE) for line in message.split("\n")), markup=False)


def read_columns(given: Sequence[str] | None) -> dict[str, str]:
    """The columns that ``--columns`` names: our name -> column.

    Raises:
        ValueError: an entry is not understood, or names something twice.
    """
    from medvqa_rl.config.inputs import ColumnsConfig

    allowed = list(ColumnsConfig.model_fields)
    found: dict[str, str] = {}
    for entry in (entry for row in csv.reader(given or (), skipinitialspace=True) for entry in row):
        name, _, column = (part.strip() for part in entry.partition("="))
        if name not in allowed or not column or name in found:
            raise ValueError(
                f"--columns has {shown(entry)}: write NAME=COLUMN, with commas between several, where each NAME is "
                f"given once and is one of {', '.join(allowed)}."
            )
        found[name] = column
    return found
