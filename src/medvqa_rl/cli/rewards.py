"""The verb ``medvqa-rl rewards attack``. Imports no torch until it runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import Overrides, Verbs, read_settings, run_folder, use_threads, verb
from medvqa_rl.core.progress import open_console, print_line, to_stderr

rewards_app = Verbs(help="Check rewards before training with them.", no_args_is_help=True)


@rewards_app.callback()
def _root() -> None:
    """Rewards and the functions in rewards.functions."""


@rewards_app.command("attack")
@verb
def attack(
    config: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_CONFIG", help="Run directory, whose report shows the result, or YAML config."),
    ],
    overrides: Overrides = None,
    questions: Annotated[int, typer.Option(min=1, help="Number of training questions to attack.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the questions and of the texts.")] = 0,
    bound: Annotated[
        float,
        typer.Option(
            help="The most by which the total of a wrong answer may exceed that of the honest right one; a negative "
            "number is a margin by which every wrong answer must stay below it."
        ),
    ] = 0.0,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the result. Defaults to reward_attack.json in a run directory.")
    ] = None,
) -> None:
    """Measure how much a wrong answer can get from the rewards: adversarial texts, scored as in training.

    Loads no weights of the policy. Exits with 1 if the bound is exceeded.
    """
    from medvqa_rl.config import moved
    from medvqa_rl.core.files import run_config, write_json
    from medvqa_rl.rewards.attack.results import FILE

    if not math.isfinite(bound):
        raise ValueError(f"--bound is {bound}: give a finite number, such as 0 or -0.5.")
    run = run_folder(config)
    path = run / FILE if run is not None and output is None else output
    if path is not None and path.is_dir():
        raise ValueError(f"--output is the folder {path}: give the path of a JSON file, such as {path / FILE}.")
    settings = read_settings(config if run is None else run_config(run), overrides or (), purpose="train").config
    if run is not None:  # it may have been moved since
        settings = moved(settings, run)
    use_threads(settings.model.path)
    from medvqa_rl.learning.attack import run_attack
    from medvqa_rl.rewards.attack.tables import attack_lines, attack_tables

    result = run_attack(settings, questions=questions, seed=seed, bound=bound, say=to_stderr)
    if path is not None:
        write_json(path, result.model_dump())
    console = open_console()
    for table in attack_tables(result):
        console.print(table)
    for line in attack_lines(result):
        print_line(console, line)
    if path is not None:
        print_line(console, f"Written: {path}")
    if result.is_exceeded:
        raise typer.Exit(1)
