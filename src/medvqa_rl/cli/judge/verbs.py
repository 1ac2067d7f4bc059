"""The verb ``medvqa-rl judge``. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import Verbs, use_threads, verb
from medvqa_rl.core.network import is_off

judge_app = Verbs(
    help="Judge answers and reasoning by models or people, and measure the judges.", no_args_is_help=True
)


@judge_app.callback()
def _root() -> None:
    """Judges of answers and reasoning."""


@judge_app.command("calibrate")
@verb
def calibrate(
    judge: Annotated[
        str, typer.Option(help="An embedded judge such as phantom:judge, folder, Hub id, or an endpoint's model.")
    ] = "phantom:judge",
    pairs: Annotated[
        Path | None, typer.Option(help="JSON Lines with reasoning and label to measure the judge against, too.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for calibration.json and calibration.png; by default results are only printed."),
    ] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of an OpenAI-compatible server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable with the endpoint's key.")
    ] = None,
    template: Annotated[str, typer.Option(help="auto, biogpt, biomistral, chat or phantom.")] = "auto",
    sees: Annotated[
        str, typer.Option(help="text, description or image: what the judge is shown besides the reasoning.")
    ] = "text",
    strictness: Annotated[float, typer.Option(help="Nats by which log P(Yes) must exceed log P(No).")] = 0.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or such as cuda:1.")] = "auto",
    count: Annotated[int, typer.Option(min=2, help="Number of written phantom texts, and of sampled ones.")] = 600,
    seed: Annotated[int, typer.Option(help="Seed of the phantom texts.")] = 0,
    policies: Annotated[bool, typer.Option(help="Also judge texts sampled from the embedded models.")] = True,
) -> None:
    """Measure a judge against the phantom oracle, and against your own labelled reasoning."""
    from medvqa_rl.config import Config
    from medvqa_rl.config.yaml import build_config

    use_threads(judge)
    from medvqa_rl.rewards.judges.load import notices

    given = {
        "model": judge,
        "endpoint": endpoint,
        "api_key_env": api_key_env,
        "template": template,
        "sees": sees,
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
            metavar="RUN_OR_EVALUATION ...",
            help="Finished evaluations, or runs, whose first and last evaluation are judged.",
        ),
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A model, or settings such as model=NAME,endpoint=URL; give it twice for two judges."),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Maximum number of answers per evaluation.")] = None,
    bias_samples: Annotated[
        int,
        typer.Option(
            min=0, help="Answers judged again after an edit, to check the judge for bias; 0 skips the check."
        ),
    ] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the choice of answers, the edits and the bootstrap.")] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite earlier results.")] = False,
) -> None:
    """Have one or two models judge answers: correctness, reasoning from 0 to 3, agreement and bias of the judges."""
    use_threads(None)
    from medvqa_rl.cli.judge.evaluate import read_judge, run_judge_eval

    configs = [read_judge(text) for text in judge or ()]
    run_judge_eval(folders, configs, samples=samples, bias_samples=bias_samples, seed=seed, replace=replace)


@judge_app.command("sheet")
@verb
def sheet(
    evaluations: Annotated[
        list[Path],
        typer.Argument(metavar="EVALUATION ...", help="Evaluations of the same questions; the first is the baseline."),
    ],
    output: Annotated[Path, typer.Option(help="HTML file for the sheet; its key is written beside it.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Maximum number of questions; each gives one item per distinct answer.")
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the choice of questions and the order of items.")] = 0,
    images: Annotated[bool, typer.Option(help="Embed the images in the sheet.")] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an existing sheet.")] = False,
) -> None:
    """Write a blinded sheet on which people rate the answers of one or more evaluations."""
    from medvqa_rl.cli.judge.rate import run_sheet

    run_sheet(evaluations, output=output, questions=samples, seed=seed, images=images, replace=replace)


@judge_app.command("ratings")
@verb
def ratings(
    key: Annotated[Path, typer.Argument(metavar="KEY", help="The key written beside the sheet.")],
    files: Annotated[list[Path], typer.Argument(metavar="RATINGS ...", help="The files saved by the raters.")],
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the results; tables are written beside it as Markdown.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Summarise ratings: accuracy and reasoning of each evaluation, and agreement of the raters."""
    from medvqa_rl.cli.judge.rate import run_ratings

    run_ratings(key, files, output=output, seed=seed)
