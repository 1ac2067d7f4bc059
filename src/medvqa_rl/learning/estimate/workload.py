"""The sizes of a training step, from the settings and the model's dimensions. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from medvqa_rl.config import Config, LoraConfig
from medvqa_rl.config.learning import TrainEngine
from medvqa_rl.core.files import read_json
from medvqa_rl.core.text import shown
from medvqa_rl.learning.estimate.cost import Trained, image_tokens, lora_parameters
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.models.dimensions import Architecture, Grid, uses_bfloat16

LAYOUTS: Mapping[str, Layout] = {"sdpa": Layout.PACKED, "eager": Layout.ROWS, "flash_attention_2": Layout.SEPARATE}


@dataclass(frozen=True)
class Workload:
    """One training step on one device."""

    model: Architecture
    trained: Trained
    is_bfloat16: bool
    is_4bit: bool
    """The decoder's linear layers are stored in 4 bits and dequantized one at a time."""
    on_gpu: bool
    prompts: int
    """P, on this device."""
    generations: int
    prompt_tokens: int
    """Tokens per prompt, including image tokens."""
    completion_tokens: int
    """Tokens per completion: the limit, so that memory is an upper bound."""
    grids: tuple[Grid, ...]
    """Patches of each prompt's image, or of its tiles; empty for questions without images."""
    prompts_per_rollout_batch: int
    groups_per_micro_batch: int
    has_reference: bool
    """The loss has a KL term (beta > 0)."""
    has_entropy_pass: bool
    """A pass without gradients finds the tokens of highest entropy (top_entropy_quantile < 1)."""
    iterations: int
    layout: Layout
    prefetch_bytes: int
    """Memory limit of the prompts that are prefetched for the next step."""
    keeps_cache: bool
    """The KV cache stays allocated during the update, because CUDA graphs were captured on it."""
    checks_itself: bool
    """The first update also computes a group with a row per completion."""
    ranks: int
    """Devices that share the prompts of a step."""
    engine: TrainEngine
    """How they share the model; ddp for one device."""

    @property
    def shards_state(self) -> bool:
        """Gradients, optimizer state and reference are divided among the ranks."""
        return self.engine != "ddp"

    @property
    def shards_weights(self) -> bool:
        """Weights are divided too, and gathered for rollouts and, layer by layer, in the update."""
        return self.engine in ("zero3", "fsdp2")

    @property
    def bytes(self) -> int:
        """Bytes per weight."""
        return 2 if self.is_bfloat16 else 4

    @property
    def patches(self) -> int:
        """Patches of a prompt's image."""
        return sum(down * across for down, across in self.grids)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: of a group, or of a prompt and completion in the separate layout."""
        completions = 1 if self.layout == Layout.SEPARATE else self.generations
        return self.prompt_tokens + completions * self.completion_tokens

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.groups_per_micro_batch * (self.generations if self.layout == Layout.SEPARATE else 1)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an update."""
        return -(-self.prompts // self.groups_per_micro_batch)

    @property
    def vision_is_frozen(self) -> bool:
        """Image features are cached from the rollout to the update."""
        return not self.trained.tower and not self.trained.projector


def plan(
    config: Config,
    model: Architecture,
    *,
    question_tokens: int,
    grids: tuple[Grid, ...],
    on_gpu: bool,
    ranks: int = 1,
) -> Workload:
    """Derive the sizes of a step on one device.

    Args:
        config: the settings.
        model: the model's dimensions.
        question_tokens: prompt tokens besides the image: template, question, options.
        grids: patches of a resized image or of its tiles, or empty.
        on_gpu: the device is a GPU.
        ranks: devices that share the prompts of a step, under ``train.engine``; auto counts as ddp.

    Raises:
        ValueError: the ranks cannot share the prompts evenly, LoRA targets unknown layers, or a group exceeds
            ``train.max_tokens_per_micro_batch``.
    """
    prompts = config.train.prompts_per_step
    if prompts % ranks:
        raise ValueError(
            f"A step has {prompts} prompts, which {ranks} devices cannot share evenly: set train.prompts_per_step to "
            "a multiple of the number of devices."
        )
    lora = config.model.lora
    if lora is not None:
        lora_parameters(model, lora.rank, lora.targets)  # raises for unknown layers
    layout, rollout = LAYOUTS[config.model.attention], config.rollout
    tokens = question_tokens + image_tokens(model, grids)
    length = rollout.num_generations * (rollout.max_completion_length + tokens * (layout == Layout.SEPARATE))
    group = length + tokens * (layout != Layout.SEPARATE)
    budget = config.train.max_tokens_per_micro_batch or prompts * group
    if budget < group:
        raise ValueError(
            f"train.max_tokens_per_micro_batch is {budget}, but a group with a prompt of {tokens} tokens can have "
            f"{group} and is never divided: set it to {group} or more, or shorten prompts or completions."
        )
    return Workload(
        model=model,
        trained=Trained(
            lora_rank=0 if lora is None else lora.rank,
            lora_targets=() if lora is None else tuple(sorted(set(lora.targets))),
            tower=config.model.train_vision,
            projector=config.model.train_projector,
            checkpointing=config.model.gradient_checkpointing,
        ),
        is_bfloat16=uses_bfloat16(config.model.dtype, "cuda" if on_gpu else "cpu"),
        is_4bit=config.model.load_in_4bit,
        on_gpu=on_gpu,
        prompts=prompts // ranks,
        generations=rollout.num_generations,
        prompt_tokens=tokens,
        completion_tokens=rollout.max_completion_length,
        grids=grids,
        prompts_per_rollout_batch=min(prompts // ranks, rollout.max_batch),
        groups_per_micro_batch=min(prompts // ranks, config.train.prompts_per_micro_batch, budget // group),
        has_reference=config.loss.beta > 0,
        has_entropy_pass=config.loss.top_entropy_quantile < 1,
        iterations=config.loss.num_iterations,
        layout=layout,
        prefetch_bytes=config.prefetch.max_mib * 2**20 if config.prefetch.workers else 0,
        keeps_cache=rollout.engine == "graph",
        checks_itself=config.train.self_check,
        ranks=ranks,
        engine="ddp" if config.train.engine == "auto" or ranks == 1 else config.train.engine,
    )


def trained_parameters(work: Workload) -> int:
    """Parameters that the optimizer updates."""
    counts, trained = work.model.parameters, work.trained
    language = (
        lora_parameters(work.model, trained.lora_rank, trained.lora_targets) if trained.lora_rank else counts.language
    )
    return language + trained.tower * counts.tower + trained.projector * counts.projector


class _Adapter(BaseModel):
    """What is read of an adapter_config.json."""

    r: Annotated[int, Field(ge=1)]
    target_modules: Annotated[list[str], Field(min_length=1)] | str


_ADAPTER = TypeAdapter(_Adapter)


def with_adapter_settings(config: Config) -> Config:
    """Set ``model.lora`` to the rank and targets of ``model.adapter``, if there is one.

    Raises:
        ValueError: its folder does not describe a LoRA adapter.
    """
    if config.model.adapter is None:
        return config
    file = Path(config.model.adapter).expanduser() / "adapter_config.json"
    remedy = "give the folder of a checkpoint that was trained with model.lora as model.adapter"
    if not file.is_file():
        raise ValueError(f"model.adapter is {shown(config.model.adapter)}, but there is no file {file}: {remedy}.")
    content = read_json(_ADAPTER, file, remedy)
    targets = content.target_modules
    names = targets if isinstance(targets, list) else re.findall(r"\w+_proj", targets)
    lora = LoraConfig(rank=content.r, targets=tuple(names))
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})
