"""Setup shared by both training loops: accelerator, data, policy, rollout engine, and the wrapped policy."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
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
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import logging as transformers_logging

from medvqa_rl.config import Config
from medvqa_rl.core.network import joining
from medvqa_rl.core.packages import installed
from medvqa_rl.core.progress import TerminalConsole, waiting
from medvqa_rl.core.text import number_of
from medvqa_rl.core.types import DEFAULT_WORDING, Dataset, Group
from medvqa_rl.data import load_dataset
from medvqa_rl.data.stored import NoSuchSplit
from medvqa_rl.evaluation.pass_rates import load_training_set
from medvqa_rl.learning.batching.skipping import without_images
from medvqa_rl.learning.distributed.launch import Launch, check_launch, read_launch
from medvqa_rl.learning.distributed.trained import Fsdp2Policy, TrainedPolicy
from medvqa_rl.models.families.shared import SharedFamily
from medvqa_rl.models.loading import Policy, load_policy, resolve_device
from medvqa_rl.models.reference import Reference, load_reference
from medvqa_rl.models.shards import Shards
from medvqa_rl.models.summary import count_parameters
from medvqa_rl.rollout.decode import RolloutEngine
from medvqa_rl.rollout.stock.generate import make_engine
from medvqa_rl.rollout.vllm.client import check_answers
from medvqa_rl.rollout.vllm.engine import Source, VllmEngine, check_version
from medvqa_rl.rollout.vllm.local import ENVIRONMENT, Colocated, not_installed
from medvqa_rl.rollout.vllm.server import Server


@dataclass
class Setup:
    """The components of a run."""

    policy: Policy
    engine: RolloutEngine
    """Encodes prompts, runs evaluations, and rolls out training prompts unless vLLM does."""
    datasets: Mapping[str, Dataset]
    """``train``, and ``val`` if evaluation is enabled."""
    num_parameters: int
    num_trained: int
    vllm: VllmEngine | None = None
    """Rolls out training prompts if ``rollout.engine`` is vllm."""

    @property
    def sampler(self) -> RolloutEngine | VllmEngine:
        """The engine that rolls out training prompts."""
        return self.engine if self.vllm is None else self.vllm

    def sampling(self) -> AbstractContextManager[None]:
        """Give :attr:`sampler` the policy's current weights within the block. All ranks enter it together."""
        return nullcontext() if self.vllm is None else self.vllm.fresh()


def make_accelerator(config: Config, prompts_per_step: int) -> Accelerator:
    """Join the processes that a launcher started, or run as a single process.

    Raises:
        ValueError: the settings contradict the launcher, or its port is in use.
    """
    launch = read_launch(os.environ)
    check_launch(config, launch, prompts_per_step)
    is_cpu = resolve_device(config.model.device).type == "cpu"
    uses_zero = launch.engine in ("zero2", "zero3")
    if uses_zero:
        _prepare_deepspeed(launch, is_cpu=is_cpu)
    # A micro-batch without images does not use the parameters of a trained vision tower.
    trains_vision = config.model.train_vision or config.model.train_projector
    with joining():
        accelerator = Accelerator(
            # Accelerate supports DeepSpeed on accelerators only, but accepts a CPU if the backend is given.
            cpu=is_cpu and not uses_zero,
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=trains_vision),
                # Ranks wait while one scores an evaluation or saves, however long; roll_call.py detects lost ranks.
                InitProcessGroupKwargs(backend="gloo" if is_cpu and uses_zero else None, timeout=timedelta(days=1)),
            ],
        )
    if uses_zero:
        # Otherwise transformers would partition every model it loads, including judges. wrap() does the policy.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    if is_cpu and launch.engine == "fsdp2":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # Accelerate omits it without a GPU
    return accelerator


def _prepare_deepspeed(launch: Launch, *, is_cpu: bool) -> None:
    """Prepare DeepSpeed before Accelerate imports it.

    Raises:
        ValueError: DeepSpeed cannot be imported.
    """
    if is_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            f"The launcher asks for {launch.engine}, but DeepSpeed cannot be imported ({error}): install it with "
            "`pip install 'medvqa-rl[deepspeed]'`, or launch with fsdp2, which needs nothing more."
        ) from error
    if is_cpu:
        # DeepSpeed would compile its own kernel at the first use; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if launch.optimizer_device == "cpu":
        _build_cpu_adam()


def _build_cpu_adam() -> None:
    """Compile the AdamW that DeepSpeed uses for state on the CPU, or load what was compiled before.

    Raises:
        ValueError: it cannot be compiled.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load()
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise ValueError(
            "The launcher offloads the optimizer to the CPU, but DeepSpeed cannot compile its AdamW for it "
            f"({str(error).partition(':')[0].rstrip('.')}): install a C++ compiler, Python's header files and ninja "
            "(`apt-get install g++ python3-dev ninja-build`), or set offload_optimizer_device to none in the launch "
            "file."
        ) from error


def wrap(config: Config, accelerator: Accelerator, policy: Policy) -> TrainedPolicy:
    """Wrap the policy for the launched engine: single process, DDP, FSDP2 or ZeRO.

    Args:
        policy: holds the weights that training starts from. Afterwards its model only serves passes without
            gradients; if weights are sharded, it is empty outside of :meth:`TrainedPolicy.gathered`.
    """
    shards = read_launch(os.environ).engine not in (None, "ddp")
    if shards and not isinstance(policy.family, SharedFamily) and not policy.vision_is_frozen:
        raise ValueError(
            f"The vision tower and the projector of {policy.family.title} cannot be trained with sharded weights: set "
            "model.train_vision and model.train_projector to false, or launch with DDP."
        )
    match read_launch(os.environ).engine:
        case "fsdp2":
            return Fsdp2Policy(config.optimizer, accelerator, policy)
        case "zero2" | "zero3":
            from medvqa_rl.learning.distributed.zero import ZeroPolicy  # needs DeepSpeed

            return ZeroPolicy(config.optimizer, accelerator, policy)
        case _:
            return TrainedPolicy(config.optimizer, accelerator, policy)


def check_vllm(config: Config) -> list[str]:
    """Check that vLLM is available if ``rollout.engine`` is vllm, before anything is loaded.

    Returns:
        Warnings.

    Raises:
        ValueError: it is not installed or too old, or no server answers.
    """
    if config.rollout.engine != "vllm":
        return []
    version: str | None
    if config.vllm.mode == "server":
        version = check_answers(config.vllm)
    elif importlib.util.find_spec("vllm") is None:
        raise ValueError(not_installed("no module named vllm"))
    else:
        version = installed(["vllm"]).get("vllm")
    warning = check_version(version)
    return [] if warning is None else [warning]


def start_vllm(config: Config, accelerator: Accelerator, policy: Policy) -> VllmEngine | None:
    """Start vLLM if ``rollout.engine`` is vllm. All ranks call this together, before :func:`wrap`.

    Raises:
        ValueError: it is not installed, does not start, or its server cannot be used.
    """
    if config.rollout.engine != "vllm":
        return None
    if not policy.family.has_vllm:
        raise ValueError(
            f"rollout.engine is vllm, but {policy.family.title} is not run on vLLM here, which would need its image "
            "features: set rollout.engine to eager."
        )
    source: Source
    with waiting("starting vLLM" if config.vllm.mode == "colocate" else "waiting for the vLLM server"):
        if config.vllm.mode == "server":
            source = Server(
                policy,
                config.vllm,
                is_main=accelerator.is_main_process,
                wait_for_everyone=accelerator.wait_for_everyone,
            )
        else:
            os.environ |= ENVIRONMENT
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # it logs every handover
            rank, num_ranks = accelerator.process_index, accelerator.num_processes
            source = Colocated(policy, config.vllm, rank=rank, num_ranks=num_ranks)
        return VllmEngine(policy, source)


def make_reference(config: Config, policy: Policy) -> Reference | None:
    """Keep the current policy as the reference of the KL term; None if beta is 0. Call this before :func:`wrap`.

    A second full model is sharded if the engine shards weights.
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
    """Load the data sets and the policy.

    Args:
        train_set: defaults to the data of ``config.data``; so does ``val_set``.
        with_validation: load ``val_set`` if the run evaluates.

    Raises:
        ValueError: either cannot be used.
    """
    train_set = load_training_set(config.data) if train_set is None else train_set
    datasets = {"train": without_images(train_set, config.data.skip_images)}
    if with_validation and config.train.eval_steps:
        try:
            datasets["val"] = load_dataset(config.data, "val") if val_set is None else val_set
        except NoSuchSplit as error:
            error.add_note("To train without validation, set train.eval_steps=0.")
            raise
    for split, dataset in datasets.items():
        if not dataset.is_endless and len(dataset) == 0:
            raise ValueError(
                f"The {split} split of {dataset.name} is empty: check data.path, data.answer_types and data.families."
            )
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the run shows its own progress
    torch.manual_seed(config.train.seed)  # new adapters have random weights
    policy = load_policy(config.model)
    if config.prompt.wording != DEFAULT_WORDING:
        policy.processor.use(config.prompt.wording)
    decoder: Literal["eager", "graph"] = "graph" if config.rollout.engine == "graph" else "eager"
    engine = make_engine(policy, config.prompt.template, engine=decoder)
    return Setup(policy, engine, datasets, *count_parameters(policy.model))


def slower(setup: Setup, config: Config) -> list[str]:
    """What a family without the fast path costs, if the policy's is one.

    The factor is the tokens of a group when its prompt is repeated, over those when it is shared, for the first prompt
    and the longest completions.
    """
    if isinstance(setup.policy.family, SharedFamily):
        return []
    prompt = len(setup.engine.encode(setup.datasets["train"][0]).input_ids)
    size, length = config.rollout.num_generations, config.rollout.max_completion_length
    factor = size * (prompt + length) / (prompt + size * length)
    return [
        f"{setup.policy.family.title} has no fast path: rollouts use transformers' generate, and every completion is "
        f"computed with its prompt. With a prompt of {prompt} tokens and {size} completions of {length}, a step "
        f"computes about {factor:.1f} times as many tokens; shorter completions raise this."
    ]


def report_dry_run(setup: Setup, groups: Sequence[Group], rows: Mapping[str, str]) -> None:
    """Print the sizes, shapes and memory of one step."""
    policy = setup.policy
    prompts = [len(group.prompt.input_ids) for group in groups]
    images = [0 if group.image_features is None else len(group.image_features) for group in groups]
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    lines = {
        "device": str(policy.device),
        "parameters": f"{setup.num_parameters:,}, of which {setup.num_trained:,} are trained",
        "training samples": "endless" if setup.datasets["train"].is_endless else f"{len(setup.datasets['train']):,}",
        "groups": f"{number_of(len(groups), 'prompt')} x {number_of(len(groups[0].completions), 'completion')}",
        "prompt tokens": f"{min(prompts)} to {max(prompts)}",
        "cached image tokens": f"{min(images)} to {max(images)}",
        "completion tokens": f"{min(lengths)} to {max(lengths)}",
        **rows,
        "memory": memory(policy.device),
    }
    width = max(map(len, lines))
    console = TerminalConsole()
    console.print("Dry run: everything loads, and one step runs. Nothing was written.", highlight=False)
    for name, value in lines.items():
        console.print(f"  {name:<{width}}  {value}", highlight=False, markup=False, soft_wrap=True)


def memory(device: torch.device) -> str:
    """Return the peak memory so far, in GiB."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB of the GPU at most"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.2f} GiB at most"
