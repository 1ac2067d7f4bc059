"""``medvqa-rl estimate``: estimate a step and print it as tables or JSON. Imports torch only to benchmark."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from medvqa_rl.config import Config
from medvqa_rl.core.progress import duration, open_console
from medvqa_rl.core.tables import TextTable
from medvqa_rl.learning.estimate.advice import Change, advise
from medvqa_rl.learning.estimate.architecture import find_architecture
from medvqa_rl.learning.estimate.duration import (
    EXPECTED_BANDWIDTH,
    EXPECTED_FLOPS,
    Seconds,
    expected_seconds,
    least_seconds,
)
from medvqa_rl.learning.estimate.estimate import Assumptions, Estimate, estimate
from medvqa_rl.learning.estimate.hardware import GIB, find_machine
from medvqa_rl.learning.estimate.memory import PARTS, peak
from medvqa_rl.learning.estimate.workload import trained_parameters, with_adapter_settings

Advice = list[tuple[Change, Estimate]]


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
        Whether it fits into memory.

    Raises:
        ValueError: an argument cannot be used, or not even one group at a time fits.
    """
    config = with_adapter_settings(config)
    model = find_architecture(config.model, model_size)
    limit = config.rollout.max_completion_length
    mean_tokens = limit if completion_tokens is None else completion_tokens
    if mean_tokens > limit:
        raise ValueError(
            f"--completion-tokens is {mean_tokens}, but completions end at rollout.max_completion_length, {limit}: "
            "give at most that."
        )
    assumptions = Assumptions(question_tokens, image_size, ranks, model_size)
    machine = find_machine(
        config, device=device, card_name=card_name, tflops=tflops, bandwidth=bandwidth, memory_gib=memory_gib
    )
    result = estimate(config, model, machine, assumptions)
    advice = advise(config, result, lambda changed: estimate(changed, model, machine, assumptions))
    if as_json:
        print(json.dumps(_as_data(result, advice, mean_tokens), indent=2))
    else:
        _show(open_console(), result, advice, mean_tokens)
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


def _as_data(result: Estimate, advice: Advice, completion_tokens: int) -> dict[str, Any]:
    """The estimate for ``--json``, in bytes and seconds."""
    work, machine = result.work, result.machine
    return {
        "machine": {
            "name": machine.name,
            "flops": machine.rates.flops,
            "bandwidth": machine.rates.bandwidth,
            "memory": machine.memory,
            "source": machine.source,
        },
        "parameters": work.model.parameters._asdict() | {"trained": trained_parameters(work)},
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
            "at_least": _by_phase(least_seconds(work, machine.rates, completion_tokens=completion_tokens)),
            "expected": _by_phase(expected_seconds(work, machine.rates, completion_tokens=completion_tokens)),
        },
        "notes": [result.note] if result.note else [],
        "changes": [{"set": change.override, "peak": changed.peak} for change, changed in advice],
    }


def _by_phase(seconds: Seconds) -> dict[str, float]:
    """Seconds of each phase, of the rollout, and in total."""
    return {**seconds._asdict(), "rollout": seconds.rollout, "total": seconds.total}


def _show(console: Console, result: Estimate, advice: Advice, completion_tokens: int) -> None:
    """Print the estimate as tables."""
    work, machine = result.work, result.machine
    counts = work.model.parameters
    console.print(
        f"{sum(counts) / 1e6:,.1f} M parameters (language model {counts.language / 1e6:,.1f}, vision "
        f"{counts.vision / 1e6:,.1f}), {trained_parameters(work) / 1e6:,.1f} M trained, in "
        f"{'bfloat16' if work.is_bfloat16 else 'float32'}{' and 4 bits' if work.is_4bit else ''}"
        f"{f', shared by {work.ranks} devices under {work.engine}' if work.shards_state else ''}. "
        f"A step: {work.prompts} prompts of {work.prompt_tokens} "
        f"tokens x {work.generations} completions of {work.completion_tokens}; "
        f"{work.prompts_per_rollout_batch} prompts at a time in the rollout, {work.groups_per_micro_batch} in the "
        "update.",
        highlight=False,
    )
    console.print(_memory_table(result))
    console.print(_time_table(result, completion_tokens))
    console.print(
        f"{machine.name}: {machine.rates.flops / 1e12:.3g} TFLOP/s, {machine.rates.bandwidth / 1e9:.0f} GB/s "
        f"({machine.source}). Expected: {EXPECTED_FLOPS:.0%} of the FLOP/s, {EXPECTED_BANDWIDTH:.0%} of the "
        "bandwidth, plus Python's overhead while decoding; rewards and image loading are not included.",
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
    for heading, keeps_results in (("Costs time only:", True), ("Changes what is learned:", False)):
        chosen = [(change, changed) for change, changed in advice if change.keeps_results is keeps_results]
        if chosen:
            console.print(heading, highlight=False)
        for change, changed in chosen:
            text = f"  {change.override}  then {changed.peak / GIB:.1f} GiB{', fits' if changed.fits else ''}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def _memory_table(result: Estimate) -> TextTable:
    """Memory by part, at the peaks of rollout and update."""
    names = [peak(result.moments, phase) for phase in ("rollout", "update")]
    titles = [name + (" (peak)" if name == peak(result.moments) else "") for name in names]
    rows = [
        (part, *(f"{value:.2f}" for value in cells))
        for part in (*PARTS, "vLLM")
        if any(cells := [result.moments[name].get(part, 0.0) / GIB for name in names])
    ]
    rows.append(("total", *(f"{sum(result.moments[name].values()) / GIB:.2f}" for name in names)))
    return TextTable("Memory in GiB", ("", *titles), rows, bold={len(rows) - 1})


def _time_table(result: Estimate, completion_tokens: int) -> TextTable:
    """Time by phase, at full and at expected rates."""
    least = least_seconds(result.work, result.machine.rates, completion_tokens=completion_tokens)
    expected = expected_seconds(result.work, result.machine.rates, completion_tokens=completion_tokens)
    rows = [
        (name, *(f"{value:.2f} s" if value < 90 else duration(value) for value in values))
        for name in ("rollout", "reference", "update", "total")
        for values in [(getattr(least, name), getattr(expected, name))]
    ]
    return TextTable("Time per step", ("", "at least", "expected"), rows, bold={3})
