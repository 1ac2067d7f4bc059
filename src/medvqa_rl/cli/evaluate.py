"""The verbs ``medvqa-rl eval`` and ``medvqa-rl compare``. Imports no torch until a verb runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import DryRun, Overrides, Split, read_settings, verb

RunOrConfig = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CONFIG",
        help="Folder of a run, whose best checkpoint is evaluated (else its last), or a YAML file with settings.",
    ),
]


@verb
def evaluate(
    config: RunOrConfig,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a trained model or adapter; without it, the run's, or that of the settings."),
    ] = None,
    split: Annotated[Split, typer.Option(help="Which questions.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for samples.jsonl and results.json; without it, a new one under output_dir."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A YAML file whose data section names a further data set; give it once for each."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to ask with, such as think_answer,direct; compared at the end.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Sample so many answers to each question too; sets eval.num_samples.")
    ] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Also ask without the images and with the options in other orders.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(help="Answer only this part of the questions, such as 0/4; the last part merges.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an evaluation that was stopped, in the same folder.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Answer a split and report accuracy with intervals: greedily, and with sampled answers and controls if asked."""
    from medvqa_rl.core.files import find_checkpoint
    from medvqa_rl.core.prompts import read_templates
    from medvqa_rl.evaluation.store import Shard

    given = [*(overrides or ()), *([] if samples is None else [f"eval.num_samples={samples}"])]
    run = config if config.is_dir() else None
    if run is not None and not (run / "config.yaml").is_file():
        raise ValueError(
            f"The folder {run} is not a run, for it holds no config.yaml: give the output_dir of a training run, "
            "or a YAML file with settings."
        )
    if run is not None and checkpoint is None:
        checkpoint = find_checkpoint(run)
    settings = read_settings(config if run is None else run / "config.yaml", given, purpose="eval").config
    if run is not None:  # it may have moved, or been named from elsewhere
        settings = settings.model_copy(update={"output_dir": str(run)})
    further = [read_settings(path, (), purpose="eval").config.data for path in data or ()]
    part = None if shard is None else Shard.parse(shard)
    templates = () if prompts is None else read_templates(prompts)
    from medvqa_rl.evaluation.cells import run_eval

    run_eval(
        settings,
        checkpoint=checkpoint,
        split=split,
        output=output,
        dry_run=dry_run,
        data=further,
        prompts=templates,
        controls=controls,
        shard=part,
        resume=resume,
    )


@verb
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_A RUN_B ...", help="Folders of evaluations; the first is the baseline."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="JSON file for everything, with every question that flipped.")
    ] = None,
    flips: Annotated[
        int, typer.Option(min=0, help="Show so many questions that got better, and so many that got worse.")
    ] = 5,
) -> None:
    """Compare evaluations of the same questions: differences with intervals and tests, by group, and what flipped."""
    from medvqa_rl.evaluation.statistics.compare import run_compare

    run_compare(runs, output=output, flips=flips)
