"""Seconds per GRPO step: this package against TRL on the same work, in alternating processes.

    python -m benchmarks.step --preset embedded
    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.step --preset paper-cpu --steps 1 --warmup 0 --rounds 1
    python -m benchmarks.step --preset paper-gpu --lora 16 --tokenizer FOLDER
    python -m benchmarks.step --preset paper-gpu --lora 16 --engine ours 4bit

Each engine runs in a separate process, and the engines alternate, so that both run under the same load and peak memory
is measured separately. The first steps of a process are warmup and not counted. Prints medians, and beside the peak
memory what ``medvqa-rl estimate`` expects. With two engines the last line is ``speedup: RATIO``, the median time of a
step of the second divided by that of the first. Exits with 1 if the engines did not do the same work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Clock,
    Rates,
    Workload,
    hardware,
    load_line,
    make_config,
    measure_rates,
    peak_bytes,
    table,
    use_clock,
    write_result,
)
from benchmarks.engine_trl import run_trl
from benchmarks.engines import Step, run_ours, same_work
from benchmarks.floors import PATCH_SIZE, Floor, architecture_of, step_floors
from benchmarks.models import MODELS, PHANTOM, prepared
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.learning.estimate.cost import image_tokens
from medvqa_rl.learning.estimate.estimate import PROCESS, Assumptions, estimate
from medvqa_rl.learning.estimate.hardware import Machine
from medvqa_rl.learning.estimate.hardware import Rates as MachineRates

PRESETS = {
    "embedded": Workload(PHANTOM, prompts=8, generations=8, length=30, side=112),
    "paper-cpu": Workload("quarter", prompts=4, generations=8, length=64, side=504, prompts_per_micro_batch=4),
    "paper-gpu": Workload(
        "qwen2-vl-2b",
        prompts=8,
        generations=8,
        length=256,
        side=504,
        dtype="bfloat16",
        checkpointing=True,
        prompts_per_micro_batch=2,
    ),
    "smoke": Workload("tiny", prompts=2, generations=2, length=4, side=56, prompts_per_micro_batch=2),
}
PHASES = ("rollout", "reward", "reference", "update")
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "trl": {},
    "graph": {"rollout": "graph"},
    "4bit": {"load_in_4bit": True},
    "vllm": {"rollout": "vllm"},
}
"""What runs a step: TRL, or this package with these settings."""
ROOT = Path(__file__).parents[1]


def child(request: Mapping[str, Any]) -> None:
    """Run one engine in this process and print its results as JSON on the last line."""
    use_clock(request["clock"])
    keep_freed_memory()  # as the command does; applies to TRL too
    workload = Workload(**request["workload"])
    run = run_trl if request["engine"] == "trl" else run_ours
    steps = run(workload, Path(request["folder"]), request["steps"], **request["options"])
    print(json.dumps({"peak": peak_bytes(), "steps": [step.as_dict() for step in steps]}))


def in_a_new_process(request: Mapping[str, Any]) -> tuple[list[Step], int]:
    """Run an engine in a new process and return its steps and its peak memory in bytes.

    Raises:
        ValueError: the engine failed; the message ends with its last output.
    """
    command = [sys.executable, "-m", "benchmarks.step", "--child", json.dumps(request)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise ValueError(f"The engine {request['engine']} failed:\n{result.stderr[-3000:]}")
    found = json.loads(result.stdout.splitlines()[-1])
    return [Step(**step) for step in found["steps"]], found["peak"]


def summary(steps: Sequence[Step], peak: int, floors: Mapping[str, Floor]) -> dict[str, Any]:
    """Medians over the steps of one engine."""
    seconds = statistics.median(step.seconds for step in steps)
    floor = sum(part.seconds for part in floors.values())
    phases = {phase: statistics.median(getattr(step, phase) for step in steps) for phase in PHASES}
    return {
        "seconds": seconds,
        "lowest": min(step.seconds for step in steps),
        "highest": max(step.seconds for step in steps),
        "phases": phases,
        "tokens_per_second": steps[0].completion_tokens / seconds,
        "rollout_tokens_per_second": steps[0].completion_tokens / phases["rollout"],
        "share_of_floor": floor / seconds,
        "shares": {phase: part.seconds / phases[phase] for phase, part in floors.items() if part.seconds},
        "peak_gib": peak / 2**30,
        "loss": [step.loss for step in steps],
        "entropy": [step.entropy for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
    }


def estimated_gib(workload: Workload, folder: Path, steps: Sequence[Step], options: Mapping[str, Any]) -> float:
    """The peak memory that ``medvqa-rl estimate`` expects for the longest prompt, on this kind of device; on a GPU
    without its context, which torch's allocator does not count either.

    Args:
        options: of :func:`benchmarks.engines.run_ours`.
    """
    model, across = architecture_of(folder), workload.side // PATCH_SIZE
    longest = max(len(ids) for step in steps for ids in step.prompt_ids)
    assumed = Assumptions(longest - image_tokens(model, [(across, across)]), (workload.side, workload.side), 1)
    machine = Machine("", MachineRates(1.0, 1.0), math.inf, torch.cuda.is_available(), "")
    peak = estimate(make_config(workload, folder, **options), model, machine, assumed).peak
    return (peak - machine.is_gpu * PROCESS[True]) / 2**30


def floors_of(workload: Workload, folder: Path, steps: Sequence[Step], rates: Rates) -> dict[str, Floor]:
    """Median over the steps of the lower bound for each phase."""
    model = architecture_of(folder)
    across = workload.side // PATCH_SIZE
    found = [
        step_floors(model, workload, list(map(len, step.prompt_ids)), [(across, across)] * workload.prompts, rates)
        for step in steps
    ]
    return {
        phase: Floor(
            flops=statistics.median(floor[phase].flops for floor in found),
            bytes=statistics.median(floor[phase].bytes for floor in found),
            seconds=statistics.median(floor[phase].seconds for floor in found),
        )
        for phase in found[0]
    }


def report(found: Mapping[str, Mapping[str, Any]], floors: Mapping[str, Floor]) -> str:
    """Format the table of one comparison."""
    names = list(found)
    rows = [["seconds per step", *names, "floor"]]
    for phase in PHASES:
        floor = f"{floors[phase].seconds:.3f}" if phase in floors else ""
        rows.append([f"  {phase}", *(f"{found[name]['phases'][phase]:.3f}" for name in names), floor])
    total = sum(part.seconds for part in floors.values())
    rows.append(["  whole step", *(f"{found[name]['seconds']:.3f}" for name in names), f"{total:.3f}"])
    spread = [f"{found[name]['lowest']:.3f} to {found[name]['highest']:.3f}" for name in names]
    rows.append(["  lowest to highest", *spread, ""])
    rows.append(["completion tokens per second", *(f"{found[n]['tokens_per_second']:.1f}" for n in names), ""])
    rows.append(["  of the rollout alone", *(f"{found[n]['rollout_tokens_per_second']:.1f}" for n in names), ""])
    rows.append(["share of the floor", *(f"{found[name]['share_of_floor']:.1%}" for name in names), ""])
    rows.append(["peak memory, GiB", *(f"{found[name]['peak_gib']:.2f}" for name in names), ""])
    estimates = ["" if (gib := found[name]["estimated_gib"]) is None else f"{gib:.2f}" for name in names]
    rows.append(["  by medvqa-rl estimate", *estimates, ""])
    return table(rows)


def describe(workload: Workload, steps: Sequence[Step]) -> str:
    """Describe the workload in one line."""
    lengths = sorted(len(ids) for step in steps for ids in step.prompt_ids)
    return (
        f"{workload.model}, {workload.dtype}, {workload.prompts} prompts of {lengths[0]} to {lengths[-1]} tokens "
        f"({workload.side} px) x {workload.generations} completions of {workload.length} tokens, beta "
        f"{workload.beta:g}, {f'LoRA of rank {workload.lora}' if workload.lora else 'all weights'}, vision "
        f"{'trained' if workload.train_vision else 'frozen'}"
    )


def measure(
    workload: Workload,
    engines: Sequence[str],
    *,
    steps: int,
    warmup: int,
    rounds: int,
    options: Mapping[str, str],
    keep: Callable[[dict[str, Any]], None],
    clock: Clock = "wall",
    **folders: Path | None,
) -> dict[str, Any]:
    """Run the engines in turn and compare.

    Args:
        steps: number of measured steps per process.
        warmup: number of unmeasured steps before them.
        rounds: number of processes per engine.
        options: ``attention`` of this package, if it is not the default.
        keep: called after each process with the result so far, which a benchmark that is stopped then leaves.
        folders: ``tokenizer`` and ``models`` of :func:`benchmarks.models.prepared`.

    Returns:
        The content of the result file; ``differences`` lists how the work of the engines differed.
    """
    use_clock(clock)
    rates = measure_rates(getattr(torch, workload.dtype), seconds=0.5)
    measured: dict[str, list[Step]] = {}
    peaks = dict.fromkeys(engines, 0)
    differences: list[str] = []
    settings = {name: {} if name == "trl" else {**ENGINES[name], **options} for name in engines}

    def found(folder: Path) -> dict[str, Any]:
        (first, done), *_ = measured.items()
        floors = floors_of(workload, folder, done, rates)
        estimates = {
            name: None if name == "trl" else estimated_gib(workload, folder, done, settings[name]) for name in measured
        }
        return {
            "benchmark": "step",
            "workload": asdict(workload),
            "hardware": hardware(),
            "rates": asdict(rates),
            "steps": len(measured[first]),
            "warmup": warmup,
            "rounds": rounds,
            "options": dict(options),
            "clock": clock,
            "work": describe(workload, done),
            "floors": {phase: asdict(part) for phase, part in floors.items()},
            "engines": {
                name: summary(measured[name], peaks[name], floors) | {"estimated_gib": estimates[name]}
                for name in measured
            },
            "differences": differences,
        }

    with prepared(workload, **folders) as folder:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for _ in range(rounds):
            runs: dict[str, list[Step]] = {}
            for name in engines:
                request = {
                    "engine": name,
                    "workload": asdict(workload),
                    "folder": str(folder),
                    "steps": warmup + steps,
                    "options": settings[name],
                    "clock": clock,
                }
                runs[name], peak = in_a_new_process(request)
                peaks[name] = max(peaks[name], peak)
                measured[name] = measured.get(name, []) + runs[name][warmup:]
                if len(runs) == 2:
                    differences += same_work(*runs.values())
                result = found(folder)
                keep(result)
                seconds, gib = (result["engines"][name][key] for key in ("seconds", "peak_gib"))
                print(f"{name}: {seconds:.3f} s per step, at most {gib:.2f} GiB", file=sys.stderr)
    return result


def arguments() -> argparse.ArgumentParser:
    """Build the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        nargs="+",
        default=["ours", "trl"],
        help="one or two; graph, 4bit and vllm are this package with CUDA graphs, 4-bit weights, rollouts on vLLM",
    )
    parser.add_argument("--steps", type=int, default=3, help="measured steps per process")
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured steps before them")
    parser.add_argument("--rounds", type=int, default=2, help="processes per engine, alternating")
    parser.add_argument("--model", choices=(PHANTOM, *MODELS))
    for name in ("prompts", "generations", "length", "side", "lora"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--prompts-per-micro-batch", type=int)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--train-vision", action=argparse.BooleanOptionalAction)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--attention", help="model.attention of this package")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Qwen2-VL tokenizer for random weights")
    parser.add_argument("--models", type=Path, help="folder that keeps random models for other benchmarks")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: CPU time, for a busy machine"
    )
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


CHANGES = (
    *("model", "prompts", "generations", "length", "side", "lora", "prompts_per_micro_batch", "beta", "dtype"),
    *("train_vision", "checkpointing"),
)
"""Options that change the preset's workload."""


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    if options.child is not None:
        child(json.loads(options.child))
        return 0
    given = {name: getattr(options, name) for name in CHANGES if getattr(options, name) is not None}
    workload = replace(PRESETS[options.preset], **given)
    if workload.lora and workload.train_vision:
        raise ValueError(
            "--lora and --train-vision cannot be combined: TRL's adapters exclude the vision tower. Drop one of them."
        )
    if workload.prompts % workload.prompts_per_micro_batch:
        raise ValueError(
            f"--prompts is {workload.prompts}, which is not a multiple of --prompts-per-micro-batch "
            f"({workload.prompts_per_micro_batch}): set --prompts-per-micro-batch to a divisor."
        )
    engines = list(dict.fromkeys(options.engine))
    if len(engines) > 2:
        raise ValueError(f"--engine names {len(engines)} engines ({' '.join(engines)}): give one or two.")
    if "4bit" in engines and not workload.lora:
        raise ValueError("--engine 4bit needs an adapter above the 4-bit weights: add --lora 16.")

    def keep(result: dict[str, Any]) -> None:
        write_result(options.output, {"preset": options.preset} | result)

    result = measure(
        workload,
        engines,
        steps=options.steps,
        warmup=options.warmup,
        rounds=options.rounds,
        options={} if options.attention is None else {"attention": options.attention},
        keep=keep,
        clock=options.clock,
        tokenizer=options.tokenizer,
        models=options.models,
    )
    machine, rates = result["hardware"], result["rates"]
    print(result["work"])
    print(
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, {options.clock} clock; "
        f"{rates['flops'] / 1e9:,.0f} GFLOP/s, {rates['bytes'] / 1e9:,.1f} GB/s; "
        f"{result['steps']} steps measured, in {options.rounds} processes each"
    )
    print(load_line(machine, options.clock))
    print(report(result["engines"], {phase: Floor(**part) for phase, part in result["floors"].items()}))
    for difference in result["differences"]:
        print(f"NOT COMPARABLE: {difference}")
    if len(engines) == 2:
        first, second = (result["engines"][name]["seconds"] for name in engines)
        print(f"speedup: {second / first:.2f}")
    return bool(result["differences"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
