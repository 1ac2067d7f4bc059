"""Estimate the memory of a training step from the settings and the model's dimensions. Imports no torch.

The folder, top down: :mod:`command` is the verb, :mod:`advice` finds settings that fit, :mod:`workload` derives the
sizes of a step from the settings, :mod:`memory` and :mod:`duration` add up what they cost, with the formulas of
:mod:`cost`; :mod:`architecture` looks up the dimensions of a model and :mod:`hardware` those of a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medvqa_rl.config import Config, VllmConfig
from medvqa_rl.learning.estimate.hardware import GIB, Machine
from medvqa_rl.learning.estimate.memory import peak, step_memory
from medvqa_rl.learning.estimate.workload import Workload, plan
from medvqa_rl.models.dimensions import Architecture, Grid

PROCESS = {False: 0.55 * GIB, True: 0.6 * GIB}
"""By ``is_gpu``: interpreter and libraries on a CPU, measured; CUDA context and libraries on a GPU, assumed."""

USABLE = 0.95
"""Usable share of a GPU's memory; the rest is left for the driver and fragmentation. Assumed."""

VLLM_NOTE = (
    "Rollouts on vLLM: in colocate mode it takes vllm.gpu_memory_utilization of the GPU's memory. Its speed is not "
    "known here; the rollout's seconds are those of rollout.engine=eager."
)


@dataclass(frozen=True)
class Assumptions:
    """What the settings leave open."""

    question_tokens: int
    """Prompt tokens besides the image: template, question, options."""
    image_size: tuple[int, int] | None
    """Width and height in pixels before resizing; None for questions without images."""
    ranks: int
    """Devices that share the prompts of a step."""
    model_size: str | None = None
    """A published model instead of the configured one."""


@dataclass(frozen=True)
class Estimate:
    """The memory of a step on a machine."""

    work: Workload
    machine: Machine
    moments: Mapping[str, Mapping[str, float]]
    """Bytes by part, see :func:`step_memory`."""
    note: str = ""
    """A caveat to print."""

    @property
    def peak(self) -> float:
        """Peak memory in bytes."""
        return sum(self.moments[peak(self.moments)].values())

    @property
    def limit(self) -> float:
        """Usable memory in bytes."""
        return self.machine.memory * (USABLE if self.machine.is_gpu else 1.0)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.peak <= self.limit


def estimate(config: Config, model: Architecture, machine: Machine, assumptions: Assumptions) -> Estimate:
    """Estimate the memory of a step.

    Raises:
        ValueError: the ranks cannot share the prompts evenly, or an adapter or image cannot be used.
    """
    from medvqa_rl.models.families.costs import image_rule

    grids: tuple[Grid, ...] = ()
    if assumptions.image_size is not None:
        grids = image_rule(config.model, assumptions.model_size)[0].size(*assumptions.image_size).grids
    work = plan(
        config,
        model,
        question_tokens=assumptions.question_tokens,
        grids=grids,
        on_gpu=machine.is_gpu,
        ranks=assumptions.ranks,
    )
    moments = step_memory(work, process=PROCESS[machine.is_gpu])
    if config.rollout.engine == "vllm":
        return Estimate(work, machine, _with_vllm(moments, config.vllm, machine), VLLM_NOTE)
    return Estimate(work, machine, moments)


def _with_vllm(
    moments: Mapping[str, Mapping[str, float]], vllm: VllmConfig, machine: Machine
) -> dict[str, dict[str, float]]:
    """Replace prefill and decoding by vLLM's share of the GPU, held all the time or, with sleep, during rollouts."""
    share = vllm.gpu_memory_utilization * machine.memory if vllm.mode == "colocate" else 0.0
    return {
        name: {**parts, "vLLM": share * (name.startswith("rollout") or not vllm.sleep)}
        for name, parts in moments.items()
        if name not in ("rollout: prefill", "rollout: decode")
    }
