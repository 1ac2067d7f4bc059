"""``--gpus N``: start this command again as N processes through ``accelerate launch``. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from medvqa_rl.config import Config, TrainEngine

FLAGS: dict[TrainEngine, tuple[str, ...]] = {
    "ddp": ("--multi_gpu",),
    "zero2": ("--use_deepspeed", "--zero_stage", "2", "--zero3_init_flag", "false"),
    "zero3": ("--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "false"),
    "fsdp2": (
        *("--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true"),
        *("--fsdp_cpu_ram_efficient_loading", "false"),
    ),
}
"""What the files in configs/launch say, as flags."""


def launch_command(config: Config, gpus: int, arguments: Sequence[str]) -> list[str]:
    """The command that runs this one on several GPUs of this machine.

    Args:
        config: ``train.engine`` chooses the engine; auto is ddp.
        gpus: processes.
        arguments: of this command, from the verb on, without ``--gpus``.

    Raises:
        ValueError: there are not so many GPUs, or this process was launched already.
    """
    if "RANK" in os.environ:
        raise ValueError(
            "--gpus starts several processes, but a launcher has started this one: leave out --gpus, or the launcher."
        )
    if config.model.device != "cpu":
        import torch

        found = torch.cuda.device_count()
        if found < gpus:
            raise ValueError(
                f"--gpus is {gpus}, but this machine shows {found} GPUs: give at most as many as there are, or set "
                "model.device=cpu to run as many processes on the CPU."
            )
    engine: TrainEngine = "ddp" if config.train.engine == "auto" else config.train.engine
    flags = () if gpus == 1 and engine == "ddp" else FLAGS[engine]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    counts = ["--num_processes", str(gpus), "--num_machines", "1", "--main_process_port", "0"]
    kept_off = ["network=off"] if config.network == "off" else []  # it may have been given before the verb
    command = [*launcher, *counts, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "medvqa_rl"]
    return [*command, *arguments, *kept_off]


def relaunch(config: Config, gpus: int, arguments: Sequence[str]) -> None:
    """Become the launcher; does not return.

    Raises:
        ValueError: as for :func:`launch_command`.
    """
    command = launch_command(config, gpus, arguments)
    os.execv(command[0], command)
