"""What both loops begin with: devices, data, policy, optimizer and rollout engine."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import DistributedDataParallelKwargs, DistributedType
from rich.console import Console
from transformers.utils import logging as transformers_logging

from medvqa_rl.config import Config
from medvqa_rl.data import load_dataset
from medvqa_rl.learning.optimizer import Optimizer
from medvqa_rl.models.loading import Policy, load_policy, resolve_device
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.types import Dataset, Group


@dataclass
class Setup:
    """The parts of a run."""

    policy: Policy
    optimizer: Optimizer
    engine: RolloutEngine
    datasets: Mapping[str, Dataset]
    """``train``, and ``val`` where there are evaluations."""


def make_accelerator(config: Config, prompts_per_step: int) -> Accelerator:
    """Join the processes that a launcher started, or run alone.

    Raises:
        ValueError: the prompts of a step cannot be shared out evenly, or the launcher asks for sharded weights.
    """
    # With a trained vision tower a micro-batch without images leaves parameters unused.
    trains_vision = config.model.train_vision or config.model.train_projector
    accelerator = Accelerator(
        cpu=resolve_device(config.model.device).type == "cpu",
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=trains_vision)],
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"The launcher asks for {kind.value}, but this version trains with one process or with plain data "
            "parallelism: run `accelerate launch --multi_gpu` without DeepSpeed or FSDP."
        )
    if prompts_per_step % accelerator.num_processes:
        raise ValueError(
            f"A step has {prompts_per_step} prompts, which {accelerator.num_processes} processes cannot share out "
            "evenly: set train.prompts_per_step (sft.batch_size for sft) to a multiple of the number of processes."
        )
    return accelerator


def set_up(
    config: Config, train_set: Dataset | None, val_set: Dataset | None, *, with_validation: bool = True
) -> Setup:
    """Load data and model.

    Raises:
        ValueError: either cannot be used; a sentence says why.
    """
    datasets = {"train": load_dataset(config.data, "train") if train_set is None else train_set}
    if with_validation and config.train.eval_steps:
        datasets["val"] = load_dataset(config.data, "val") if val_set is None else val_set
    for split, dataset in datasets.items():
        if not dataset.is_endless and len(dataset) == 0:
            raise ValueError(
                f"The {split} split of {dataset.name} is empty: check data.path, data.answer_types and data.families."
            )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the run shows its own
    torch.manual_seed(config.train.seed)  # a new adapter begins with random weights
    policy = load_policy(config.model)
    engine = RolloutEngine(policy, config.prompt.template, engine=config.rollout.engine)
    return Setup(policy, Optimizer(policy.model, config.optimizer), engine, datasets)


def report_dry_run(setup: Setup, groups: Sequence[Group], rows: Mapping[str, str]) -> None:
    """Print what one step looks like: sizes, shapes and memory."""
    policy = setup.policy
    prompts = [len(group.prompt.input_ids) for group in groups]
    images = [0 if group.image_features is None else len(group.image_features) for group in groups]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    trained = sum(parameter.numel() for parameter in setup.optimizer.parameters.values())
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    lines = {
        "device": str(policy.device),
        "parameters": f"{total:,}, of which {trained:,} are trained",
        "training samples": "endless" if setup.datasets["train"].is_endless else f"{len(setup.datasets['train']):,}",
        "groups": f"{len(groups)} prompts x {len(groups[0].completions)} completions",
        "prompt tokens": f"{min(prompts)} to {max(prompts)}",
        "cached image tokens": f"{min(images)} to {max(images)}",
        "completion tokens": f"{min(lengths)} to {max(lengths)}",
        **rows,
        "memory": memory(policy.device),
    }
    width = max(map(len, lines))
    console = Console()
    console.print("Dry run: everything loads, and one step runs. Nothing was written.", highlight=False)
    for name, value in lines.items():
        console.print(f"  {name:<{width}}  {value}", highlight=False, markup=False, soft_wrap=True)


def memory(device: torch.device) -> str:
    """The most memory in use so far, in GiB."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the GPU at most"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.2f} GiB at most"
