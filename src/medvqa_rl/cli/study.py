"""The verbs ``medvqa-rl study``: experiments of many runs, each in its own process. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medvqa_rl.cli.common import Overrides, Verbs, use_threads, verb
from medvqa_rl.core.network import forbid_network
from medvqa_rl.core.text import for_terminal, number_of

if TYPE_CHECKING:
    from medvqa_rl.study.plan.recipe import Recipe

study_app = Verbs(
    help="Plan, run and collect an experiment: arms x seeds x test sets, defined by a recipe.", no_args_is_help=True
)

RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="YAML file, or the name of a shipped recipe such as four_factors_phantom."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Run the small version defined under quick in the recipe.")]
Output = Annotated[
    Path | None, typer.Option(help="Folder of the study. Defaults to runs/RECIPE, or runs/RECIPE-quick.")
]
Arms = Annotated[
    str | None,
    typer.Option(help="Run only these arms (comma-separated), the arms that they start from, and the baseline."),
]


def _read(
    recipe: str, overrides: list[str] | None, output: Path | None, quick: bool, arms: str | None
) -> tuple[Recipe, Path]:
    from medvqa_rl.study.plan.recipe import find_recipe, read_recipe

    path = find_recipe(recipe)
    folder = Path("runs") / (f"{path.stem}-quick" if quick else path.stem) if output is None else output
    only = [name.strip() for name in arms.split(",") if name.strip()] if arms else []
    return read_recipe(path, folder, quick=quick, overrides=overrides or (), only=only), folder


@study_app.command()
@verb
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Output = None,
    quick: Quick = False,
    arms: Arms = None,
) -> None:
    """Check a recipe and print its cells with their state and the remaining time."""
    from medvqa_rl.core.progress import open_console
    from medvqa_rl.study.plan.leaks import compare_pixels
    from medvqa_rl.study.running import plan_table

    study, _ = _read(recipe, overrides, output, quick, arms)
    for line in compare_pixels(study.pairs):
        print(for_terminal(line))
    open_console().print(plan_table(study))


@study_app.command()
@verb
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Output = None,
    quick: Quick = False,
    arms: Arms = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of cells to run in parallel.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Number of GPUs per cell.")] = 1,
) -> None:
    """Run all unfinished cells and write the tables. The same command resumes an interrupted study."""

    from medvqa_rl.core.progress import TerminalConsole
    from medvqa_rl.study.collect import collect as read_results
    from medvqa_rl.study.output import write_study
    from medvqa_rl.study.plan.leaks import compare_pixels
    from medvqa_rl.study.running import run_study

    study, folder = _read(recipe, overrides, output, quick, arms)
    for line in compare_pixels(study.pairs):
        print(for_terminal(line))
    failures = run_study(study, folder, jobs=jobs, processes=processes, console=TerminalConsole(stderr=True))
    if failures:
        reasons = "; ".join(f"{failure.cell.label} ({failure.last_line})" for failure in failures)
        print(for_terminal(f"error: {number_of(len(failures), 'cell')} failed: {reasons}"), file=sys.stderr)
        raise typer.Exit(1)
    for path in write_study(read_results(study), folder / "tables"):
        print(path)


@study_app.command(hidden=True)
@verb
def answer(
    tests: Annotated[
        Path,
        typer.Argument(help="File written by `study run`, with the checkpoint and the settings of each test folder."),
    ],
) -> None:
    """Evaluate one model on several tests, each in its own folder; resumes those already started."""
    from medvqa_rl.config.yaml import build_config, read_file

    given = read_file(tests)
    if given.keys() != {"checkpoint", "tests"} or not isinstance(given["tests"], dict):
        raise ValueError(
            f"The file {tests} must have the keys checkpoint and tests, as written by `medvqa-rl study run`."
        )
    configs = {Path(folder): build_config(settings, purpose="eval") for folder, settings in given["tests"].items()}
    if any(config.network == "off" for config in configs.values()):
        forbid_network()
    records = [folder / "evaluation.json" for folder in configs]
    use_threads(next(iter(configs.values())).model.path, records=records)
    from medvqa_rl.evaluation.cells import run_eval

    checkpoint = None if given["checkpoint"] is None else Path(given["checkpoint"])
    for folder, config in configs.items():
        run_eval(config, checkpoint=checkpoint, output=folder, resume=True)


@study_app.command()
@verb
def collect(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Output = None,
    quick: Quick = False,
    arms: Arms = None,
) -> None:
    """Write the results of the finished cells: tables (Markdown, CSV, LaTeX), figures and an HTML page."""
    from medvqa_rl.study.collect import collect as read_results
    from medvqa_rl.study.output import write_study

    study, folder = _read(recipe, overrides, output, quick, arms)
    for path in write_study(read_results(study), folder / "tables"):
        print(path)
