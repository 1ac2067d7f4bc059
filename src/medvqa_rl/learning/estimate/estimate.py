"""What the verb ``estimate`` does: find the sizes of the model, work out memory and time of a step, show them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from medvqa_rl.config import Config, LoraConfig, VllmConfig
from medvqa_rl.data.images.budget import image_budget
from medvqa_rl.learning.estimate.cost import Architecture, Grid, count_parameters
from medvqa_rl.learning.estimate.footprint import PARTS, memory, peak
from medvqa_rl.learning.estimate.hardware import GIB, Machine, card, measure
from medvqa_rl.learning.estimate.pace import (
    EXPECTED_BANDWIDTH,
    EXPECTED_FLOPS,
    Rates,
    Seconds,
    expected_seconds,
    seconds,
)
from medvqa_rl.learning.estimate.sizes import find_architecture, with_adapter_read
from medvqa_rl.learning.estimate.workload import Workload, plan, trained_parameters
from medvqa_rl.models.dtype import uses_bfloat16

PROCESS = {False: 0.55 * GIB, True: 0.6 * GIB}
"""Interpreter and libraries on a CPU, measured; on a GPU CUDA's context and libraries, assumed."""

USABLE = 0.95
"""Share of a GPU's memory that can be filled: its driver and fragments take the rest. Assumed."""


VLLM_NOTE = (
    "Rollouts on vLLM: in this process it takes vllm.gpu_memory_utilization of the GPU's memory. How long it takes is "
    "not known here; the seconds of the rollout are those of rollout.engine=eager."
)


@dataclass(frozen=True)
class Change:
    """A setting that takes less memory."""

    override: str
    apply: Callable[[Config], Config | None]
    """The changed settings, or None where it changes nothing."""
    keeps_results: bool
    """It costs time only."""


def find_machine(
    config: Config,
    *,
    device: str,
    card_name: str | None,
    tflops: float | None,
    bandwidth: float | None,
    memory_gib: float | None,
) -> Machine:
    """The machine to estimate for: a card of the table, one of given rates, or this one, measured.

    Raises:
        ValueError: the card is unknown, or there is no GPU to measure.
    """
    given = (tflops, bandwidth, memory_gib)
    wanted = device if device != "auto" else config.model.device
    if card_name is not None:
        machine = card(card_name)
    elif None not in given:
        machine = Machine("the machine described", Rates(0, 0), 0, wanted != "cpu", "as given")
    else:
        if wanted == "auto":
            import torch

            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        machine = measure(wanted, use_bfloat16=uses_bfloat16(config.model.dtype, wanted))
    rates = Rates(
        machine.rates.flops if tflops is None else tflops * 1e12,
        machine.rates.bandwidth if bandwidth is None else bandwidth * 1e9,
    )
    source = machine.source if given == (None, None, None) or machine.source == "as given" else "partly as given"
    return Machine(
        machine.name, rates, machine.memory if memory_gib is None else memory_gib * GIB, machine.is_gpu, source
    )


def _set(section: str, **values: Any) -> Callable[[Config], Config | None]:
    """A change of some settings of a section."""

    def apply(config: Config) -> Config | None:
        current = getattr(config, section)
        changed = current.model_copy(update=values)
        return None if changed == current else config.model_copy(update={section: changed})

    return apply


def changes(config: Config) -> list[Change]:
    """What to change for less memory, in this order: first what costs time only, then what changes the method."""
    pixels, length = 200_704, config.rollout.max_completion_length // 2
    lora = LoraConfig()
    found = [
        Change("train.prompts_per_micro_batch=1", _set("train", prompts_per_micro_batch=1), True),
        Change("model.gradient_checkpointing=true", _set("model", gradient_checkpointing=True), True),
        Change("rollout.max_batch=1", _set("rollout", max_batch=1), True),
        Change("model.dtype=bfloat16", _set("model", dtype="bfloat16"), False),
        Change("model.train_vision=false", _set("model", train_vision=False), False),
    ]
    if config.model.max_pixels is None or config.model.max_pixels > pixels:
        found.append(Change(f"model.max_pixels={pixels}", _set("model", max_pixels=pixels), False))
    if config.model.lora is None:
        found.append(Change("loss.beta=0", _set("loss", beta=0.0), False))
        found.append(Change("'model.lora={rank: 16}'", _set("model", lora=lora), False))
    if config.train.engine in ("auto", "ddp") and config.rollout.engine == "eager":
        found.append(Change("model.load_in_4bit=true", _set("model", load_in_4bit=True), False))
    found.append(
        Change(f"rollout.max_completion_length={length}", _set("rollout", max_completion_length=length), False)
    )
    return found


@dataclass(frozen=True)
class Estimate:
    """What a step needs."""

    work: Workload
    machine: Machine
    moments: Mapping[str, Mapping[str, float]]
    note: str = ""
    """What else is to be said."""

    @property
    def peak(self) -> float:
        """Bytes at most."""
        return sum(self.moments[peak(self.moments)].values())

    @property
    def limit(self) -> float:
        """Bytes that can be used."""
        return self.machine.memory * (USABLE if self.machine.is_gpu else 1.0)

    @property
    def fits(self) -> bool:
        """Whether the step fits the memory."""
        return self.peak <= self.limit


@dataclass(frozen=True)
class Assumptions:
    """What the settings do not say."""

    question_tokens: int
    image_size: tuple[int, int] | None
    ranks: int


def estimate(config: Config, model: Architecture, machine: Machine, assumed: Assumptions) -> Estimate:
    """Memory of a step.

    Raises:
        ValueError: the prompts cannot be shared out, an adapter or image cannot be used.
    """
    grid: Grid | None = None
    if assumed.image_size is not None:
        width, height = image_budget(config.model)[0].resized(*assumed.image_size)
        grid = (height // model.patch_size, width // model.patch_size)
    work = plan(
        config,
        model,
        question_tokens=assumed.question_tokens,
        grid=grid,
        on_gpu=machine.is_gpu,
        ranks=assumed.ranks,
    )
    moments = memory(work, process=PROCESS[machine.is_gpu])
    if config.rollout.engine == "vllm":
        return Estimate(work, machine, beside_vllm(moments, config.vllm, machine), VLLM_NOTE)
    return Estimate(work, machine, moments)


def beside_vllm(
    moments: Mapping[str, Mapping[str, float]], vllm: VllmConfig, machine: Machine
) -> dict[str, dict[str, float]]:
    """Memory where vLLM decodes: a share of the GPU's in its place, all the time or, where it sleeps, in rollouts."""
    share = vllm.gpu_memory_utilization * machine.memory if vllm.mode == "colocate" else 0.0
    return {
        name: {**parts, "vLLM": share * (name.startswith("rollout") or not vllm.sleep)}
        for name, parts in moments.items()
        if name not in ("rollout: prefill", "rollout: decode")
    }


def advise(config: Config, first: Estimate, redo: Callable[[Config], Estimate]) -> list[tuple[Change, Estimate]]:
    """Changes that lower the peak, one on top of the other, until it fits; all of them where nothing helps enough."""
    taken: list[tuple[Change, Estimate]] = []
    current = first
    for change in changes(config):
        if current.fits:
            break
        changed = change.apply(config)
        if changed is None:
            continue
        result = redo(changed)
        if result.peak < 0.995 * current.peak:
            config, current = changed, result
            taken.append((change, result))
    return taken


def run_estimate(
    config: Config,
    *,
    model_size: str | None,
    device: str,
    card_name: str | None,
    tflops: float | None,
    bandwidth: float | None,
    memory_gib: float | None,
    question_tokens: int,
    completion_tokens: int | None,
    image_size: tuple[int, int] | None,
    ranks: int,
    as_json: bool,
) -> bool:
    """Print memory by part and seconds by phase of a training step.

    Returns:
        Whether it fits the memory.

    Raises:
        ValueError: something given cannot be used, or not even one group at a time fits the memory.
    """
    config = with_adapter_read(config)
    model = find_architecture(config.model, model_size)
    limit = config.rollout.max_completion_length
    mean = limit if completion_tokens is None else completion_tokens
    if mean > limit:
        raise ValueError(
            f"--completion-tokens is {mean}, but completions end at rollout.max_completion_length, {limit}: give "
            "at most that."
        )
    assumed = Assumptions(question_tokens, image_size, ranks)
    machine = find_machine(
        config, device=device, card_name=card_name, tflops=tflops, bandwidth=bandwidth, memory_gib=memory_gib
    )
    result = estimate(config, model, machine, assumed)
    advice = advise(config, result, lambda changed: estimate(changed, model, machine, assumed))
    if as_json:
        print(json.dumps(as_data(result, advice, mean), indent=2))
    else:
        show(Console(width=100), result, advice, mean)
    free = [changed for change, changed in advice if change.keeps_results]
    if not result.fits and not (free and free[-1].fits):
        least = min([result.peak, *(changed.peak for changed in free)])
        raise ValueError(
            f"Even one group of {result.work.generations} completions at a time needs {least / GIB:.1f} GiB, but "
            f"{machine.name} has {result.limit / GIB:.1f} GiB to use: "
            + (
                f"set {', '.join(change.override for change, _ in advice)}."
                if advice and advice[-1][1].fits
                else "take a smaller model, shorter completions or a larger machine."
            )
        )
    return result.fits


def as_data(result: Estimate, advice: list[tuple[Change, Estimate]], completion_tokens: int) -> dict[str, Any]:
    """The estimate as plain data: bytes and seconds."""
    work, machine = result.work, result.machine
    return {
        "machine": {
            "name": machine.name,
            "flops": machine.rates.flops,
            "bandwidth": machine.rates.bandwidth,
            "memory": machine.memory,
            "source": machine.source,
        },
        "parameters": count_parameters(work.model)._asdict() | {"trained": trained_parameters(work)},
        "step": {
            "prompts": work.prompts,
            "generations": work.generations,
            "prompt_tokens": work.prompt_tokens,
            "completion_tokens": work.completion_tokens,
            "groups_per_micro_batch": work.groups_per_micro_batch,
        },
        "memory": result.moments,
        "peak": {"moment": peak(result.moments), "bytes": result.peak, "usable": result.limit, "fits": result.fits},
        "seconds": {
            "at_least": _phases(seconds(work, machine.rates, completion_tokens=completion_tokens)),
            "expected": _phases(expected_seconds(work, machine.rates, completion_tokens=completion_tokens)),
        },
        "notes": [result.note] if result.note else [],
        "changes": [{"set": change.override, "peak": changed.peak} for change, changed in advice],
    }


def _phases(times: Seconds) -> dict[str, float]:
    """Seconds by name."""
    return {**times._asdict(), "rollout": times.rollout, "total": times.total}


def show(console: Console, result: Estimate, advice: list[tuple[Change, Estimate]], completion_tokens: int) -> None:
    """Print the estimate as tables."""
    work, machine = result.work, result.machine
    counts = count_parameters(work.model)
    console.print(
        f"{sum(counts) / 1e6:,.1f} M parameters (language model {counts.language / 1e6:,.1f}, vision "
        f"{counts.vision / 1e6:,.1f}), {trained_parameters(work) / 1e6:,.1f} M trained, in "
        f"{'bfloat16' if work.is_bfloat16 else 'float32'}{' and 4 bits' if work.is_4bit else ''}. "
        f"A step: {work.prompts} prompts of {work.prompt_tokens} "
        f"tokens x {work.generations} completions of {work.completion_tokens}; "
        f"{work.prompts_per_rollout_batch} prompts at a time in the rollout, {work.groups_per_micro_batch} in the "
        "update.",
        highlight=False,
    )
    table = Table(title="Memory in GiB", title_justify="left", title_style="bold")
    names = [peak(result.moments, phase) for phase in ("rollout", "update")]
    table.add_column("")
    for name in names:
        table.add_column(name + (" (peak)" if name == peak(result.moments) else ""), justify="right")
    for part in (*PARTS, "vLLM"):
        cells = [result.moments[name].get(part, 0.0) / GIB for name in names]
        if any(cells):
            table.add_row(part, *(f"{value:.2f}" for value in cells))
    table.add_row("total", *(f"{sum(result.moments[name].values()) / GIB:.2f}" for name in names), style="bold")
    console.print(table)

    least = seconds(work, machine.rates, completion_tokens=completion_tokens)
    likely = expected_seconds(work, machine.rates, completion_tokens=completion_tokens)
    table = Table(title="Seconds per step", title_justify="left", title_style="bold")
    for heading in ("", "at least", "expected"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("rollout", "reference", "update", "total"):
        style = "bold" if name == "total" else None
        table.add_row(name, f"{getattr(least, name):.2f}", f"{getattr(likely, name):.2f}", style=style)
    console.print(table)
    console.print(
        f"{machine.name}: {machine.rates.flops / 1e12:.3g} TFLOP/s, {machine.rates.bandwidth / 1e9:.0f} GB/s "
        f"({machine.source}). Expected: {EXPECTED_FLOPS:.0%} of the one, {EXPECTED_BANDWIDTH:.0%} of the other, and "
        "the time of Python while decoding; rewards and reading images are not counted.",
        style="dim",
        highlight=False,
    )
    if result.note:
        console.print(result.note, style="dim", highlight=False)
    verdict = "It fits" if result.fits else "It does not fit"
    console.print(
        f"{verdict}: {result.peak / GIB:.1f} of {result.limit / GIB:.1f} GiB, at the peak of the "
        f"{peak(result.moments).partition(':')[0]}.",
        style="green" if result.fits else "bold red",
        highlight=False,
    )
    for kind, keeps in (("Costs time only:", True), ("Changes what is learned:", False)):
        chosen = [(change, changed) for change, changed in advice if change.keeps_results is keeps]
        if chosen:
            console.print(kind, highlight=False)
        for change, changed in chosen:
            text = f"  {change.override}  then {changed.peak / GIB:.1f} GiB{', fits' if changed.fits else ''}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
