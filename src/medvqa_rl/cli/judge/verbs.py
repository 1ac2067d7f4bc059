"""The verb ``medvqa-rl judge``. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import verb
from medvqa_rl.core.network import is_off

judge_app = typer.Typer(
    help="Judges of answers and reasoning, models and people, and how far they can be trusted.", no_args_is_help=True
)


@judge_app.callback()
def _root() -> None:
    """Judges of answers and reasoning."""


@judge_app.command("calibrate")
@verb
def calibrate(
    judge: Annotated[
        str, typer.Option(help="phantom:judge, phantom:judge_eval, folder, Hub id, or an endpoint's model.")
    ] = "phantom:judge",
    pairs: Annotated[
        Path | None, typer.Option(help="JSON Lines with reasoning and label: measure against these too.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for calibration.json and calibration.png; without it, print only.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable with the endpoint's key.")
    ] = None,
    template: Annotated[str, typer.Option(help="auto, biogpt, biomistral, chat or phantom.")] = "auto",
    strictness: Annotated[float, typer.Option(help="Nats by which Yes must exceed No.")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or such as cuda:1.")] = "auto",
    count: Annotated[
        int, typer.Option(min=2, help="Phantom texts that were written; as many again are sampled.")
    ] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the phantom texts.")] = 0,
    policies: Annotated[bool, typer.Option(help="Also judge what the embedded models sample.")] = True,
) -> None:
    """Measure a judge against the phantom oracle, and against your own labelled reasoning."""
    from medvqa_rl.config import Config
    from medvqa_rl.config.yaml import build_config
    from medvqa_rl.rewards.judges.load import notices

    given = {
        "model": judge,
        "endpoint": endpoint,
        "api_key_env": api_key_env,
        "template": template,
        "strictness": strictness,
        "device": device,
    }
    network = "off" if is_off() else "on"
    config: Config = build_config({"network": network, "judge": given, "rewards": {"semantic": 1.0}})
    for line in notices(config):
        print(line)
    from medvqa_rl.cli.judge.calibrate import run_calibrate

    run_calibrate(config.judge, pairs_file=pairs, output=output, count=count, seed=seed, with_policies=policies)


@judge_app.command("eval")
@verb
def judge_eval(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_EVALUATION ...", help="Of a run, the first and the last evaluation are judged."
        ),
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A model, or settings such as model=NAME,endpoint=URL; give it twice for two judges."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers of each evaluation at most.")] = None,
    bias_samples: Annotated[
        int, typer.Option(min=0, help="Answers that are judged again, edited, to check the judge; 0 checks none.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Seed of choices, edits and the bootstrap.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Write over what was judged before.")] = False,
) -> None:
    """Have answers judged by one or two models: correctness, reasoning from 0 to 3, agreement, the judges' biases."""
    from medvqa_rl.cli.judge.evaluate import read_judge, run_judge_eval

    configs = [read_judge(text) for text in judge or ()]
    run_judge_eval(folders, configs, samples=samples, bias_samples=bias_samples, seed=seed, replace=replace)


@judge_app.command("sheet")
@verb
def sheet(
    evaluations: Annotated[
        list[Path],
        typer.Argument(
            metavar="EVALUATION ...", help="Folders of evaluations of the same questions; first: baseline."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The sheet, an HTML file; its key is written beside it.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Questions at most; each gives an item for every different answer.")
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the choice and of the order.")] = 0,
    images: Annotated[bool, typer.Option(help="Put the images into the sheet.")] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a sheet that is there.")] = False,
) -> None:
    """Write a blinded sheet on which people rate the answers of one or several evaluations."""
    from medvqa_rl.cli.judge.rate import run_sheet

    run_sheet(evaluations, output=output, questions=samples, seed=seed, images=images, replace=replace)


@judge_app.command("ratings")
@verb
def ratings(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The key that was written beside the sheet.")],
    files: Annotated[list[Path], typer.Argument(metavar="RATINGS ...", help="What the raters saved, one file each.")],
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the results; the tables are written beside it as Markdown.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Read what people rated: accuracy and reasoning of each evaluation, and how far the raters agree."""
    from medvqa_rl.cli.judge.rate import run_ratings

    run_ratings(key, files, output=output, seed=seed)
