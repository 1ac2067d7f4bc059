"""The command ``medvqa-rl``: each verb reads its arguments and makes one call. Imports no torch until a verb runs.

Exit codes: 0 done, 1 the run failed, 2 something given was wrong (said in a sentence), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medvqa_rl import __version__
from medvqa_rl.cli.common import ConfigPath, Debug, DryRun, Overrides, prepare_process, read_settings
from medvqa_rl.cli.common import told_plainly as _told_plainly
from medvqa_rl.cli.data.verbs import data_app
from medvqa_rl.cli.estimate import estimate
from medvqa_rl.cli.evaluate import compare, evaluate
from medvqa_rl.cli.init.verb import init
from medvqa_rl.cli.judge.verbs import judge_app
from medvqa_rl.cli.report import report, watch
from medvqa_rl.cli.study import study_app
from medvqa_rl.core.network import VARIABLE, forbid_network

if TYPE_CHECKING:
    from medvqa_rl.config.yaml import Loaded

app = typer.Typer(
    name="medvqa-rl",
    help="Fine-tune vision-language models for medical visual question answering with reinforcement learning, and "
    "measure honestly whether it helped. Research software, not for clinical use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)
phantom_app = typer.Typer(help="The embedded phantom world: its tiny models and its images.", no_args_is_help=True)
config_app = typer.Typer(help="Look at settings without running anything.", no_args_is_help=True)
app.add_typer(phantom_app, name="phantom")
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.add_typer(judge_app, name="judge")
app.command()(init)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(estimate)
app.command()(report)
app.command()(watch)

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir from its last checkpoint.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Start so many processes on this machine, each with a GPU of its own."),
]
Scanner = Literal["home", "unseen", "worn"]
Purpose = Literal["train", "sft", "eval"]


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name="medvqa-rl")


def _write_cards(run: Path, dry_run: bool) -> None:
    """Describe the checkpoints of a run that has ended; of several processes the first one does."""
    from medvqa_rl.report.card import write_cards

    if not dry_run and os.environ.get("RANK", "0") == "0":
        write_cards(run)


def _prepare(
    verb: Literal["train", "sft"],
    config: Path,
    overrides: list[str] | None,
    gpus: int | None,
    flags: Mapping[str, bool],
) -> Loaded:
    """The checked settings of a verb that trains; with ``--gpus`` its processes are started instead, and this one
    does not return."""
    from medvqa_rl.cli.launching import relaunch

    loaded = read_settings(config, overrides or (), purpose=verb)
    if gpus is not None:
        given = [flag for flag, is_set in flags.items() if is_set]
        relaunch(loaded.config, gpus, [verb, str(config), *(overrides or ()), *given])
    prepare_process()
    return loaded


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"medvqa-rl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    network: Annotated[
        Literal["on", "off"],
        typer.Option(envvar=VARIABLE, help="off refuses every connection beyond this machine, whatever the verb."),
    ] = "on",
) -> None:
    """Options before the verb."""
    if network == "off":
        forbid_network()


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the samples and of every sampled token.")] = 0,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Adapt the embedded model to a scanner it has not seen, and show that it got better. Minutes on a CPU."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.phantom.demo import run_demo

        run_demo(output, seed, dry_run=dry_run)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fine-tune with reinforcement learning (GRPO, Dr. GRPO, DAPO or online DPO)."""
    with _told_plainly(debug):
        loaded = _prepare(
            "train", config, overrides, gpus, {"--resume": resume, "--dry-run": dry_run, "--debug": debug}
        )
        from medvqa_rl.learning.grpo import train as run

        folder = run(loaded.config, resume=resume, dry_run=dry_run, given=loaded.given)
        _write_cards(folder, dry_run)


@app.command()
def sft(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Fine-tune with supervision on the same data and prompts: the baseline."""
    with _told_plainly(debug):
        loaded = _prepare("sft", config, overrides, gpus, {"--resume": resume, "--dry-run": dry_run, "--debug": debug})
        from medvqa_rl.learning.sft import train_sft

        folder = train_sft(loaded.config, resume=resume, dry_run=dry_run, given=loaded.given)
        _write_cards(folder, dry_run)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or of a run: its best, or its last.")],
    output: Annotated[Path, typer.Argument(help="New folder to write.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add a LoRA adapter to the model below it, in full precision.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write a model as one plain Hugging Face folder, or an adapter as a PEFT folder, without what training needs."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.cli.export import export_model

        print(export_model(checkpoint, output, merge=merge))
        if merge:
            typer.echo(
                "The adapter was added to the base model's stored weights, in full precision, also where it was "
                "trained above weights in 4 bits.",
                err=True,
            )


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str, typer.Option(help="Folder of a model or adapter, Hub id, phantom:base or phantom:instruct.")
    ] = "phantom:instruct",
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option to choose from; give it once for each."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Sample so many answers and count votes; 0 is greedy.")] = 0,
    temperature: Annotated[float, typer.Option(min=1e-3, help="Temperature of the samples.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    direct: Annotated[bool, typer.Option("--direct", help="Ask for the answer alone, without reasoning.")] = False,
    debug: Debug = False,
) -> None:
    """Ask a model one question about an image. Never for a decision about a patient."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.cli.ask import run_ask

        run_ask(
            image,
            question,
            model=model,
            options=tuple(option or ()),
            samples=samples,
            temperature=temperature,
            seed=seed,
            max_length=max_length,
            template="direct" if direct else "think_answer",
        )


@app.command()
def env(debug: Debug = False) -> None:
    """Versions, device, threads and memory: what to send along with a question."""
    with _told_plainly(debug):
        from medvqa_rl.cli.ask import show_environment

        show_environment()


@phantom_app.command("build")
def phantom_build(
    output: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("runs/phantom_build"),
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the embedded checkpoints again from nothing, by the committed recipe."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.phantom.build import build

        build(output, seed=seed, dry_run=dry_run)


@phantom_app.command("build-judges")
def phantom_build_judges(
    output: Annotated[Path, typer.Option(help="Folder for the judges.")] = Path("runs/judges"),
    only: Annotated[list[str] | None, typer.Option(help="judge or judge_eval; without it, both.")] = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the embedded judges of reasoning again from nothing, by the committed recipe."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.phantom.judge import build_judges

        build_judges(output, names=only or (), dry_run=dry_run)


@phantom_app.command("build-lm")
def phantom_build_lm(
    output: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("runs/lm"),
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train the embedded language model, which measures perplexity, again from nothing, by the committed recipe."""
    with _told_plainly(debug):
        prepare_process()
        from medvqa_rl.phantom.lm import build_lm

        build_lm(output, dry_run=dry_run)


@phantom_app.command("draw")
def phantom_draw(
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("phantom.png"),
    count: Annotated[int, typer.Option(min=1, max=600, help="How many images.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
    scanner: Annotated[Scanner, typer.Option(help="Which scanner takes the images.")] = "home",
    debug: Debug = False,
) -> None:
    """Draw a contact sheet of phantom images with a question and its answer."""
    with _told_plainly(debug):
        from medvqa_rl.data.phantom.sheet import draw_sheet

        print(draw_sheet(output, count, seed, scanner))


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None, debug: Debug = False) -> None:
    """Print every setting as it would be used, those that were given marked."""
    with _told_plainly(debug):
        from medvqa_rl.config.yaml import load_config, show_config

        sys.stdout.write(show_config(load_config(config, overrides or ())))


@config_app.command("check")
def config_check(
    config: ConfigPath,
    overrides: Overrides = None,
    purpose: Annotated[Purpose, typer.Option("--for", help="The verb that will use them.")] = "train",
    debug: Debug = False,
) -> None:
    """Say 'ok', or everything that is wrong at once."""
    with _told_plainly(debug):
        from medvqa_rl.config.yaml import load_config

        load_config(config, overrides or (), purpose=purpose)
        print("ok")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the settings, for editors that check YAML while you type."""
    import json

    from medvqa_rl.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("tables", hidden=True)
def config_tables() -> None:
    """Print the tables of docs/configuration.md."""
    from medvqa_rl.config.schema import reference_tables

    print(reference_tables())
