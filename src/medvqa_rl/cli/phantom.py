"""The verbs ``medvqa-rl phantom ...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from medvqa_rl.cli.common import DryRun, Verbs, use_threads, verb

phantom_app = Verbs(help="The embedded phantom world: its small models and its images.", no_args_is_help=True)


@phantom_app.command("build")
@verb
def build_models(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("runs/phantom_build"),
    family: Annotated[
        str, typer.Option(help="Architecture: qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3 or internvl.")
    ] = "qwen2_vl",
    size: Annotated[str, typer.Option(help="small, base or large: 0.4, 1.5 or 6 million weights.")] = "base",
    base_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the stage base. Defaults to the size's.")
    ] = None,
    instruct_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the stage instruct. Defaults to the size's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted build: at most 50 steps are repeated.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Train the embedded checkpoints, or those of another family or size, from scratch, by the committed recipe."""
    use_threads("phantom:instruct")
    from medvqa_rl.phantom.build import build

    build(
        output,
        family=family,
        size=size,
        seed=seed,
        steps={"base": base_steps, "instruct": instruct_steps},
        resume=resume,
        dry_run=dry_run,
    )


@phantom_app.command("build-judges")
@verb
def build_judges(
    output: Annotated[Path, typer.Option(help="Folder for the judges.")] = Path("runs/judges"),
    only: Annotated[list[str] | None, typer.Option(help="judge, judge_eval or judge_sees. Defaults to all.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Train the embedded judges by the committed recipes: those of text from scratch, and the one that sees."""
    use_threads("phantom:instruct")
    from medvqa_rl.phantom.judge import SEEING
    from medvqa_rl.phantom.judge import build_judges as build
    from medvqa_rl.phantom.seeing_judge import build_seeing_judge

    of_text = [name for name in only or ("judge", "judge_eval") if name != SEEING]
    if of_text:
        build(output, names=of_text, dry_run=dry_run)
    if SEEING in (only or (SEEING,)):
        build_seeing_judge(output, dry_run=dry_run)


@phantom_app.command("build-lm")
@verb
def build_lm(
    output: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("runs/lm"),
    dry_run: DryRun = False,
) -> None:
    """Train the embedded language model, which measures perplexity, from scratch, by the committed recipe."""
    use_threads("phantom:instruct")
    from medvqa_rl.phantom.lm import build_lm as build

    build(output, dry_run=dry_run)


@phantom_app.command("draw")
@verb
def draw(
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("phantom.png"),
    count: Annotated[int, typer.Option(min=1, max=600, help="Number of images.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the phantom world.")] = 0,
    scanner: Annotated[
        Literal["home", "unseen", "worn"], typer.Option(help="Scanner that the images come from.")
    ] = "home",
) -> None:
    """Draw a contact sheet of phantom images, each with a question and its answer."""
    from medvqa_rl.data.phantom.sheet import draw_sheet

    print(draw_sheet(output, count, seed, scanner))
