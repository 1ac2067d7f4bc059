"""The verbs ``medvqa-rl eval`` and ``medvqa-rl compare``. Imports no torch until a verb runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from medvqa_rl.cli.common import DryRun, Overrides, Split, read_settings, run_folder, use_threads, verb
from medvqa_rl.core.progress import open_console, print_line

RunOrConfig = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_CONFIG",
        help="Run directory, whose best (else last) checkpoint is evaluated, or YAML config.",
    ),
]


@verb
def evaluate(
    config: RunOrConfig,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a trained model or adapter. Defaults to the run's checkpoint, or the configured model."
        ),
    ] = None,
    split: Annotated[Split, typer.Option(help="Split to evaluate.")] = "test",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for samples.jsonl and results.json. Defaults to a new one under output_dir."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="YAML config whose data section names another data set to evaluate. May be repeated."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt templates, such as think_answer,direct; compared at the end.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Also sample this many answers per question; sets eval.num_samples.")
    ] = None,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also run the bias controls: without images, and with reordered options."),
    ] = False,
    protocol: Annotated[
        str | None, typer.Option(help="Also score the answers by the rules of other harnesses: medevalkit, lmms_eval.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Answer only this part of the questions, such as 0/4; the last one to finish merges."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted evaluation in the same folder.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Evaluate a model on a split and report accuracy with confidence intervals.

    Answers are greedy; sampled answers and bias controls are optional.
    """
    from medvqa_rl.config import moved
    from medvqa_rl.core.files import find_checkpoint, note_on_best, run_config
    from medvqa_rl.core.prompts import read_templates
    from medvqa_rl.evaluation.measures.protocols import read_protocols
    from medvqa_rl.evaluation.store import Shard

    given = [*(overrides or ()), *([] if samples is None else [f"eval.num_samples={samples}"])]
    run = run_folder(config)
    if run is not None and checkpoint is None:
        checkpoint = find_checkpoint(run)
        if note := note_on_best(run):
            print_line(open_console(), note)
    settings = read_settings(config if run is None else run_config(run), given, purpose="eval").config
    if run is not None:  # it may have been moved since
        settings = moved(settings, run)
    further = [read_settings(path, (), purpose="eval").config.data for path in data or ()]
    part = None if shard is None else Shard.parse(shard)
    templates = () if prompts is None else read_templates(prompts)
    protocols = () if protocol is None else read_protocols(protocol)
    folder = Path(settings.output_dir) / "eval" if output is None else output
    records = folder.rglob("evaluation.json") if resume else ()
    use_threads(settings.model.path, processes=1 if part is None else part.count, records=records)
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
        protocols=protocols,
    )
    home = Path(settings.output_dir)
    if not dry_run and (home / "status.json").is_file():
        is_inside = output is None or output.resolve().is_relative_to(home.resolve() / "eval")
        where = "" if output is None or is_inside else f" --evals {shlex.quote(str(output))}"
        print_line(open_console(), f"Next, the report of the run: medvqa-rl report {shlex.quote(str(home))}{where}")


@verb
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_A RUN_B ...", help="Folders of evaluations; the first is the baseline."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the whole comparison, with every flipped question.")
    ] = None,
    flips: Annotated[int, typer.Option(min=0, help="Number of improved and of worsened questions to show.")] = 5,
) -> None:
    """Compare evaluations of the same questions: differences with intervals and tests, and the flipped answers."""
    from medvqa_rl.evaluation.statistics.compare import run_compare

    run_compare(runs, output=output, flips=flips)
