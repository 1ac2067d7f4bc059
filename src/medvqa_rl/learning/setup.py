"""What both loops begin with: ranks, data, policy, rollout engine, and the policy as an engine trains it."""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils.dataclasses import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from rich.console import Console
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from medvqa_rl.config import Config
from medvqa_rl.core.types import Dataset, Group
from medvqa_rl.data import load_dataset
from medvqa_rl.learning.distributed.launch import check_launch, read_launch
from medvqa_rl.learning.distributed.trained import Fsdp2Policy, TrainedPolicy
from medvqa_rl.models.loading import Policy, Reference, load_policy, load_reference, resolve_device
from medvqa_rl.models.shards import Shards
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.vllm import Source, VllmEngine
from medvqa_rl.rollout.vllm_local import ENVIRONMENT, Colocated, not_installed
from medvqa_rl.rollout.vllm_server import Server, check_answers


@dataclass
class Setup:
    """The parts of a run."""

    policy: Policy
    engine: RolloutEngine
    """Prepares prompts, answers evaluations, and samples what is trained on unless vLLM does."""
    datasets: Mapping[str, Dataset]
    """``train``, and ``val`` where there are evaluations."""
    num_parameters: int
    num_trained: int
    vllm: VllmEngine | None = None
    """Samples what is trained on where ``rollout.engine`` is vllm."""

    @property
    def sampler(self) -> RolloutEngine | VllmEngine:
        """Samples what is trained on."""
        return self.engine if self.vllm is None else self.vllm

    def sampling(self) -> AbstractContextManager[None]:
        """:attr:`sampler` has the policy's weights for the time of the block; all ranks enter it together."""
        return nullcontext() if self.vllm is None else self.vllm.fresh()


def make_accelerator(config: Config, prompts_per_step: int) -> Accelerator:
    """Join the processes that a launcher started, or run alone.

    Raises:
        ValueError: settings and launcher do not fit together; a sentence says how.
    """
    launch = read_launch(os.environ)
    check_launch(config, launch, prompts_per_step)
    is_cpu = resolve_device(config.model.device).type == "cpu"
    uses_zero = launch.engine in ("zero2", "zero3")
    if uses_zero:
        _prepare_deepspeed(launch.engine, is_cpu=is_cpu)
    # With a trained vision tower a micro-batch without images leaves parameters unused.
    trains_vision = config.model.train_vision or config.model.train_projector
    accelerator = Accelerator(
        # Accelerate knows DeepSpeed on accelerators only; it takes a CPU for one where the backend is named.
        cpu=is_cpu and not uses_zero,
        mixed_precision="no",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=trains_vision),
            # Ranks wait for one that evaluates or saves, however long that takes; roll_call.py sees if one is lost.
            InitProcessGroupKwargs(backend="gloo" if is_cpu and uses_zero else None, timeout=timedelta(days=1)),
        ],
    )
    if uses_zero:
        # Or transformers would partition every model that it loads, judges too. The policy is when it is wrapped.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    if is_cpu and launch.engine == "fsdp2":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # which it leaves out without a GPU
    return accelerator


def _prepare_deepspeed(engine: str | None, *, is_cpu: bool) -> None:
    """Have DeepSpeed ready before Accelerate imports it.

    Raises:
        ValueError: it is not installed.
    """
    if is_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"The launcher asks for {engine}, but DeepSpeed cannot be imported ({error}): install it with "
            "`pip install 'medvqa-rl[deepspeed]'`, or launch with fsdp2, which needs nothing more."
        ) from error
    if is_cpu:
        # It would compile a kernel of its own at the first use; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wrap(config: Config, accelerator: Accelerator, policy: Policy) -> TrainedPolicy:
    """The policy as the engine that was launched trains it.

    Args:
        policy: with the weights that training starts from. Afterwards its model is for what needs no gradients, and
            where weights are sharded it is empty outside of :meth:`TrainedPolicy.gathered`.
    """
    match read_launch(os.environ).engine:
        case "fsdp2":
            return Fsdp2Policy(config.optimizer, accelerator, policy)
        case "zero2" | "zero3":
            from medvqa_rl.learning.distributed.zero import ZeroPolicy  # needs DeepSpeed, which few have

            return ZeroPolicy(config.optimizer, accelerator, policy)
        case _:
            return TrainedPolicy(config.optimizer, accelerator, policy)


def check_vllm(config: Config) -> None:
    """See whether vLLM is there where ``rollout.engine`` asks for it, before anything is loaded.

    Raises:
        ValueError: it is not installed, or no server answers.
    """
    if config.rollout.engine != "vllm":
        return
    if config.vllm.mode == "server":
        check_answers(config.vllm)
    elif importlib.util.find_spec("vllm") is None:
        raise ValueError(not_installed("no module named vllm"))


def start_vllm(config: Config, accelerator: Accelerator, policy: Policy) -> VllmEngine | None:
    """vLLM where ``rollout.engine`` asks for it; all ranks call this together, before :func:`wrap`.

    Raises:
        ValueError: it is not installed, does not start, or its server cannot be used.
    """
    if config.rollout.engine != "vllm":
        return None
    source: Source
    if config.vllm.mode == "server":
        source = Server(
            policy,
            config.vllm,
            is_main=accelerator.is_main_process,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
    else:
        os.environ |= ENVIRONMENT
        rank, num_ranks = accelerator.process_index, accelerator.num_processes
        source = Colocated(policy, config.vllm, rank=rank, num_ranks=num_ranks)
    return VllmEngine(policy, source)


def make_reference(config: Config, policy: Policy) -> Reference | None:
    """The policy as it is now, for the divergence; None where nothing weighs it. Call it before :func:`wrap`.

    A whole second model is sharded where the engine shards anything.
    """
    if config.loss.beta == 0:
        return None
    if policy.is_lora or read_launch(os.environ).engine in (None, "ddp"):
        return load_reference(policy)
    trained = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    return Reference(policy, None, Shards(trained))


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
    decoder: Literal["eager", "graph"] = "graph" if config.rollout.engine == "graph" else "eager"
    engine = RolloutEngine(policy, config.prompt.template, engine=decoder)
    # Weights in 4 bits lie two in a byte.
    sizes = [
        (parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1), parameter.requires_grad)
        for parameter in policy.model.parameters()
    ]
    return Setup(
        policy,
        engine,
        datasets,
        num_parameters=sum(size for size, _ in sizes),
        num_trained=sum(size for size, is_trained in sizes if is_trained),
    )


def report_dry_run(setup: Setup, groups: Sequence[Group], rows: Mapping[str, str]) -> None:
    """Print what one step looks like: sizes, shapes and memory."""
    policy = setup.policy
    prompts = [len(group.prompt.input_ids) for group in groups]
    images = [0 if group.image_features is None else len(group.image_features) for group in groups]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    lines = {
        "device": str(policy.device),
        "parameters": f"{setup.num_parameters:,}, of which {setup.num_trained:,} are trained",
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
