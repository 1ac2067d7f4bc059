"""The command ``medvqa-rl``: its verbs, the options before them, and ``env``. Imports no torch until a verb runs.

Each verb has its own module or folder here; it reads its arguments and makes one call.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Annotated, Literal

import typer

from medvqa_rl import __version__
from medvqa_rl.cli.ask import ask
from medvqa_rl.cli.common import Verbs, verb
from medvqa_rl.cli.config import config_app
from medvqa_rl.cli.data.verbs import data_app
from medvqa_rl.cli.demo import demo
from medvqa_rl.cli.estimate import estimate, models
from medvqa_rl.cli.evaluate import compare, evaluate
from medvqa_rl.cli.export.verb import export
from medvqa_rl.cli.init.verb import init
from medvqa_rl.cli.judge.verbs import judge_app
from medvqa_rl.cli.phantom import phantom_app
from medvqa_rl.cli.report import report
from medvqa_rl.cli.rewards import rewards_app
from medvqa_rl.cli.serve.verb import serve
from medvqa_rl.cli.study import study_app
from medvqa_rl.cli.train import sft, train
from medvqa_rl.cli.view.verb import view
from medvqa_rl.core.network import VARIABLE, forbid_network
from medvqa_rl.core.packages import TESTED, installed, was_tested
from medvqa_rl.core.text import number_of

app = Verbs(
    name="medvqa-rl",
    help="Fine-tune vision-language models for medical visual question answering with reinforcement learning, and "
    "measure whether it helped. Research software, not for clinical use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
PACKAGES = ("medvqa-rl", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow", "pydantic")

# In the order of --help: from the first look to the last result.
for function, name in (
    (demo, "demo"),
    (init, "init"),
    (models, "models"),
    (estimate, "estimate"),
    (train, "train"),
    (sft, "sft"),
    (evaluate, "eval"),
    (compare, "compare"),
    (ask, "ask"),
    (serve, "serve"),
    (report, "report"),
    (view, "view"),
    (export, "export"),
):
    app.command(name=name)(function)
for group, name in (
    (data_app, "data"),
    (config_app, "config"),
    (rewards_app, "rewards"),
    (judge_app, "judge"),
    (study_app, "study"),
    (phantom_app, "phantom"),
):
    app.add_typer(group, name=name)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"medvqa-rl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, metavar="", help="Print the version.")
    ] = False,
    network: Annotated[
        Literal["on", "off"],
        typer.Option(envvar=VARIABLE, help="off blocks every connection to other machines, for any verb."),
    ] = "on",
) -> None:
    """Options before the verb."""
    if network == "off":
        forbid_network()


@app.command()
@verb
def env() -> None:
    """Print versions, devices, threads and memory, to include in a bug report."""
    import torch

    gib = 2**30
    rows = {"python": platform.python_version(), "platform": platform.platform()}
    rows |= {name: _with_tested(name, version) for name, version in installed(PACKAGES).items()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows[f"GPU {index}"] = f"{properties.name}, {properties.total_memory / gib:.0f} GiB"
        rows["torch CUDA"] = str(torch.version.cuda)
    else:
        rows["GPU"] = "none available to torch"
    rows["CPU"] = f"{number_of(os.cpu_count() or 1, 'core')}, {number_of(torch.get_num_threads(), 'torch thread')}"
    rows["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / gib:.1f} GiB"
    extras = installed_extras()
    rows["extras"] = ", ".join(name for name, is_installed in extras.items() if is_installed) or "none"
    rows["extras missing"] = ", ".join(name for name, is_installed in extras.items() if not is_installed) or "none"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def _with_tested(name: str, version: str) -> str:
    """A version, and which were tested if it is none of them."""
    return version if name not in TESTED or was_tested(name, version) else f"{version} (tested: {TESTED[name]})"


def installed_extras() -> dict[str, bool]:
    """Return each optional extra of this package, and whether all of its requirements are installed."""
    extras: dict[str, bool] = {}
    try:
        requirements = metadata.requires("medvqa-rl") or ()
    except metadata.PackageNotFoundError:  # it runs from its source
        return extras
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*;.*extra == ['\"]([\w-]+)['\"]", requirement)
        if match is not None:
            extras[match[2]] = extras.get(match[2], True) and bool(installed([match[1]]))
    return extras
