"""How this process was launched: on its own or as one of several ranks, and with which engine. Imports no torch.

``accelerate launch`` configures its processes through environment variables, which are checked here before anything
is set up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from medvqa_rl.config import Config, TrainEngine
from medvqa_rl.config.problems.weights import refuse_sharded
from medvqa_rl.core.text import number_of, shown

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch needs, besides WORLD_SIZE, so that processes find each other."""
_OFFLOAD = "ACCELERATE_DEEPSPEED_OFFLOAD_{}_DEVICE"


class Launch(NamedTuple):
    """What the launcher requests."""

    engine: TrainEngine | None
    """None for a single process."""
    num_ranks: int
    optimizer_device: str = "none"
    """``cpu`` if ZeRO offloads the optimizer."""

    def record(self) -> dict[str, int | str | None]:
        """What decides how sums are rounded, for env.json. Files of older versions lack some of it."""
        return {"ranks": self.num_ranks, "engine": self.engine, "offload_optimizer_device": self.optimizer_device}


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's environment variables.

    Raises:
        ValueError: the launcher requests something that is not supported.
    """

    def is_on(name: str) -> bool:
        return environ.get(name, "false").lower() in ("true", "1")

    num_ranks = _number(environ, "WORLD_SIZE", "1")
    if num_ranks < 1 or not 0 <= _number(environ, "RANK", "0") < num_ranks:
        raise ValueError(
            f"The environment variables RANK={environ.get('RANK', '0')} and WORLD_SIZE={num_ranks} do not name one of "
            "the processes of a launch: unset both to train in one process, or let `accelerate launch` or --gpus set "
            "them."
        )
    missing = [name for name in _NEEDED if not environ.get(name)] if num_ranks > 1 else []
    if missing:
        raise ValueError(
            f"The environment variable WORLD_SIZE is {num_ranks}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start the processes with `accelerate launch`, torchrun "
            "or --gpus, which set all of them, or unset WORLD_SIZE to run in one process."
        )
    if is_on("ACCELERATE_USE_DEEPSPEED"):
        return Launch(_zero_engine(environ), num_ranks, environ.get(_OFFLOAD.format("OPTIMIZER"), "none"))
    if is_on("ACCELERATE_USE_FSDP"):
        version = environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise _unsupported(f"FSDP version {version}", "fsdp_version: 2 under fsdp_config in the launch file")
        if is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
            raise _unsupported(
                "fsdp_cpu_ram_efficient_loading", "fsdp_cpu_ram_efficient_loading: false in the launch file"
            )
        return Launch("fsdp2", num_ranks)
    for name, what in (("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"), ("ACCELERATE_USE_TP", "tensor parallelism")):
        if is_on(name):
            raise _unsupported(what, "one of the launch files in configs/launch")
    return Launch("ddp" if num_ranks > 1 else None, num_ranks)


def _number(environ: Mapping[str, str], name: str, default: str) -> int:
    text = environ.get(name, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(
            f"The environment variable {name} is {shown(text)}, but must be a whole number: unset it to train in one "
            "process, or let `accelerate launch` or --gpus set it."
        )
    return int(text)


def _zero_engine(environ: Mapping[str, str]) -> TrainEngine:
    """The engine of the requested ZeRO stage."""
    if environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise _unsupported("a deepspeed_config_file", "its settings in the launch file itself, as configs/launch does")
    stages: dict[str, TrainEngine] = {"2": "zero2", "3": "zero3"}
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in stages:
        raise _unsupported(f"DeepSpeed ZeRO stage {stage}", "zero_stage: 2 or zero_stage: 3 in the launch file")
    for what in ("OPTIMIZER", "PARAM"):
        name = f"offload_{what.lower()}_device"
        if (device := environ.get(_OFFLOAD.format(what), "none")) not in ("none", "cpu"):
            raise _unsupported(f"{name}: {device}", f"{name}: cpu or {name}: none in the launch file")
    return stages[stage]


def _unsupported(what: str, remedy: str) -> ValueError:
    return ValueError(
        f"The launcher requests {what}, but training supports a single process, ddp, zero2, zero3 and fsdp2: use "
        f"{remedy}."
    )


def check_launch(config: Config, launch: Launch, prompts_per_step: int) -> None:
    """Check that the settings are compatible with how the process was launched.

    Raises:
        ValueError: they are not; the message names the first conflict.
    """
    if problem := next(_problems(config, launch, prompts_per_step), None):
        raise ValueError(problem)


def _problems(config: Config, launch: Launch, prompts_per_step: int) -> Iterator[str]:
    wanted, given, ranks = config.train.engine, launch.engine, launch.num_ranks
    if given is None and wanted not in ("auto", "ddp"):
        yield (
            f"train.engine is {wanted}, but only this one process was started: start it with `accelerate launch "
            f"--config_file configs/launch/{wanted}.yaml -m medvqa_rl train ...` or `medvqa-rl train ... --gpus N`, "
            "or set train.engine=auto."
        )
    if given is not None and wanted not in ("auto", given):
        yield (
            f"train.engine is {wanted}, but the launcher requests {given}: launch with configs/launch/{wanted}.yaml, "
            f"or set train.engine={given} or auto."
        )
    if ranks > prompts_per_step:
        yield (
            f"There are {ranks} ranks but only {number_of(prompts_per_step, 'prompt')} per step, and all "
            "completions of a prompt are on one rank: set train.prompts_per_step (sft.batch_size for sft) to a "
            f"multiple of {ranks}, or launch fewer processes."
        )
    if prompts_per_step % ranks:
        yield (
            f"A step has {number_of(prompts_per_step, 'prompt')}, which {ranks} ranks cannot share evenly: set "
            f"train.prompts_per_step (sft.batch_size for sft) to a multiple of {ranks}."
        )
    if given in ("zero2", "zero3", "fsdp2") and config.model.load_in_4bit:
        yield refuse_sharded(given)
    if given in ("zero2", "zero3", "fsdp2") and config.data.allow_text_only:
        yield (
            f"data.allow_text_only is true, but under {given} a rank whose questions have no image would wait forever "
            "for the others' vision tower: launch with ddp, or set data.allow_text_only=false."
        )
    if given in ("zero3", "fsdp2") and config.rollout.engine == "graph":
        yield (
            f"rollout.engine is graph, but {given} gathers the weights into new memory for every rollout, so a CUDA "
            "graph cannot be replayed: set rollout.engine=eager, or launch with ddp or zero2."
        )
