"""The verbs ``medvqa-rl train`` and ``medvqa-rl sft``. Imports no torch until a verb runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from medvqa_rl.cli.common import ConfigPath, DryRun, Overrides, read_settings, use_threads, verb
from medvqa_rl.core.text import number_of

if TYPE_CHECKING:
    from medvqa_rl.config import Config, TrainEngine
    from medvqa_rl.config.yaml import Loaded

Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in output_dir from its last checkpoint.")]
ResumeFrom = Annotated[
    int | None,
    typer.Option("--resume-from", min=1, metavar="STEP", help="Resume from the checkpoint of this step instead."),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Number of processes to start on this machine, each with its own GPU."),
]


@verb
def train(
    context: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune with reinforcement learning (GRPO, Dr. GRPO, DAPO or online DPO)."""
    loaded = _read_or_relaunch("train", context, config, overrides, gpus, resume=resume or resume_from is not None)
    from medvqa_rl.learning.grpo import train as run

    folder = run(loaded.config, resume=resume, resume_from=resume_from, dry_run=dry_run, given=loaded.given)
    _write_cards(folder, dry_run)


@verb
def sft(
    context: typer.Context,
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = None,
    resume: Resume = False,
    resume_from: ResumeFrom = None,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune with supervision on the same data and prompts, as the baseline."""
    loaded = _read_or_relaunch("sft", context, config, overrides, gpus, resume=resume or resume_from is not None)
    from medvqa_rl.learning.sft import train_sft

    folder = train_sft(loaded.config, resume=resume, resume_from=resume_from, dry_run=dry_run, given=loaded.given)
    _write_cards(folder, dry_run)


def _read_or_relaunch(
    verb_name: Literal["train", "sft"],
    context: typer.Context,
    config: Path,
    overrides: list[str] | None,
    gpus: int | None,
    *,
    resume: bool,
) -> Loaded:
    """Return the checked settings and choose the number of threads; with ``--gpus``, replace this process by the
    launcher instead."""
    loaded = read_settings(config, overrides or (), purpose=verb_name)
    if resume:
        loaded = _follow_moved_run(loaded, config.parent)
    if gpus is not None:
        flags = [f"--{name.replace('_', '-')}" for name, value in context.params.items() if value is True]
        if (step := context.params["resume_from"]) is not None:
            flags.append(f"--resume-from={step}")
        command = launch_command(loaded.config, gpus, [verb_name, str(config), *(overrides or ()), *flags])
        os.execv(command[0], command)
    records = [Path(loaded.config.output_dir).expanduser() / "env.json"] if resume else []
    use_threads(loaded.config.model.path, records=records)
    return loaded


def _follow_moved_run(loaded: Loaded, folder: Path) -> Loaded:
    """Resume the run whose folder holds the config, if it was moved or renamed since it started.

    Raises:
        ValueError: the run was copied, so it is not clear which one is meant.
    """
    recorded = Path(loaded.config.output_dir).expanduser()
    is_run = (folder / "status.json").is_file() and (folder / "config.resolved.json").is_file()
    if "output_dir" in loaded.overridden or not is_run or folder.resolve() == recorded.resolve():
        return loaded
    if (recorded / "status.json").is_file():
        raise ValueError(
            f"The config is in the run folder {folder}, but its output_dir is {recorded}, which holds a run too: add "
            f"output_dir={folder} or output_dir={recorded} to say which one to resume."
        )
    from medvqa_rl.config import moved
    from medvqa_rl.config.yaml import merge
    from medvqa_rl.core.progress import to_stderr

    to_stderr(f"The run in {folder} was moved: its output_dir was {recorded}.")
    config = moved(loaded.config, folder)
    given = merge(loaded.given, [(("output_dir",), config.output_dir)])
    if config.data != loaded.config.data:
        given = merge(given, [(("data", "path"), config.data.path)])
    return replace(loaded, config=config, given=given)


def _write_cards(run: Path, dry_run: bool) -> None:
    """Write the model cards of a finished run, on the first rank only."""
    from medvqa_rl.report.card import write_cards

    if not dry_run and os.environ.get("RANK", "0") == "0":
        write_cards(run)


# --- several GPUs ---------------------------------------------------------------------------------------------------

LAUNCH_FLAGS: dict[TrainEngine, tuple[str, ...]] = {
    "ddp": ("--multi_gpu",),
    "zero2": ("--use_deepspeed", "--zero_stage", "2", "--zero3_init_flag", "false"),
    "zero3": ("--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "false"),
    "fsdp2": (
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true"),
        *("--fsdp_cpu_ram_efficient_loading", "false"),
    ),
}
"""The files in configs/launch as flags of ``accelerate launch``."""


def launch_command(config: Config, gpus: int, arguments: Sequence[str]) -> list[str]:
    """Return the ``accelerate launch`` command that runs a verb on several GPUs of this machine.

    Args:
        config: ``train.engine`` chooses the engine; auto is ddp.
        gpus: number of processes.
        arguments: of ``medvqa-rl``, from the verb on, without ``--gpus``.

    Raises:
        ValueError: the machine has fewer GPUs, or this process was started by a launcher.
    """
    if "RANK" in os.environ:
        raise ValueError(
            "--gpus starts several processes, but this one was already started by a launcher: remove one of the two."
        )
    if config.model.device != "cpu":
        import torch

        found = torch.cuda.device_count()
        if found < gpus:
            raise ValueError(
                f"--gpus is {gpus}, but torch finds {number_of(found, 'GPU')} on this machine: "
                f"give at most {found}, or set model.device=cpu to run the processes on the CPU."
            )
    engine: TrainEngine = "ddp" if config.train.engine == "auto" else config.train.engine
    flags = () if gpus == 1 and engine == "ddp" else LAUNCH_FLAGS[engine]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    counts = ["--num_processes", str(gpus), "--num_machines", "1", "--main_process_port", "0"]
    network = ["network=off"] if config.network == "off" else []  # may come from --network, before the verb
    command = [*launcher, *counts, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "medvqa_rl"]
    return [*command, *arguments, *network]
