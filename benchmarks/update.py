"""Forward and backward time of the update: shared prompts against one row per completion.

    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.update --preset cpu
    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.update --preset cpu --scaling --repeats 1
    python -m benchmarks.update --preset gpu --lora 16

Checks first that every layout gives the same log-probabilities and gradient. Image features are precomputed, as with a
frozen vision tower, so only the language model is timed. The lower bound is the FLOPs that a group needs (no masked
pairs, no recomputation) at the throughput of a large matrix product on the same machine. Prints medians; the last line
is ``speedup: RATIO``, the time with one row per completion divided by the time with the default layout.

``--scaling`` times one group of the preset and changes group size, image size and completion length, one at a time;
only the first size is checked.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.common import (
    Rates,
    Workload,
    hardware,
    load_line,
    make_config,
    make_data,
    measure_rates,
    now,
    table,
    use_clock,
    write_result,
)
from benchmarks.floors import architecture_of, trained_of
from benchmarks.models import prepared
from benchmarks.step import PRESETS as STEPS
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.core.types import Completion, Group
from medvqa_rl.learning.estimate.cost import (
    Shape,
    backward_flops,
    forward_flops,
    group_pairs,
)
from medvqa_rl.learning.objective.layout import Layout
from medvqa_rl.learning.objective.logprobs import CompletionBatch, collate, layout_for
from medvqa_rl.learning.setup import make_accelerator, wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.models.dimensions import Architecture
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.families.qwen2_vl import Qwen2VL
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.models.processor import Processor

Way = Literal["default", "dense", "separate"]
WAYS: Mapping[Way, str] = {
    "default": "shared prompt",
    "dense": "shared prompt, dense mask",
    "separate": "one row per completion",
}
PRESETS = {
    "cpu": replace(STEPS["paper-cpu"], beta=0.0),
    "gpu": replace(STEPS["paper-gpu"], beta=0.0, checkpointing=False),
    "smoke": replace(STEPS["smoke"], beta=0.0),
}
SCALING: Mapping[str, Mapping[str, Sequence[int]]] = {
    "cpu": {
        "generations": (2, 4, 8, 16, 32),
        "side": (224, 336, 504, 756, 1008),
        "length": (16, 64, 256),
    },
    "gpu": {
        "generations": (2, 4, 8, 16, 32),
        "side": (224, 336, 504, 756, 1008),
        "length": (64, 256, 1024),
    },
    "smoke": {"generations": (2, 3), "side": (56, 112), "length": (2, 4)},
}
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.25}
"""Tolerance for log-probabilities between layouts, in nats."""


def make_groups(policy: Policy, workload: Workload) -> list[Group]:
    """Groups with image features and random completions of the workload's length."""
    generator = np.random.default_rng(0)
    processor = policy.processor
    allowed = np.setdiff1d(np.arange(len(processor.tokenizer)), [*processor.suppressed_ids, *processor.stop_ids])
    samples = make_data(workload.prompts, workload.side).samples
    prompts = [processor.encode(sample) for sample in samples]
    with torch.no_grad():
        features = policy.family.image_features(policy.model, prompts, policy.device)
    return [
        Group(
            sample,
            prompt,
            [
                Completion(tuple(generator.choice(allowed, workload.length).tolist()), "", True)
                for _ in range(workload.generations)
            ],
            feature,
        )
        for sample, prompt, feature in zip(samples, prompts, features)
    ]


def make_learner(workload: Workload, folder: Path) -> Learner:
    """A learner without a reference."""
    config = make_config(replace(workload, beta=0.0), folder)
    policy = load_policy(config.model)
    policy.model.train()
    accelerator = make_accelerator(config, workload.prompts)
    return Learner(config, accelerator, policy, None, wrap(config, accelerator, policy))


def lay_out(learner: Learner, groups: Sequence[Group], way: Way) -> list[CompletionBatch]:
    """Micro-batches of whole groups; with a row per completion, one group at a time to limit memory."""
    policy = learner.policy
    size = 1 if way == "separate" else learner.config.train.prompts_per_micro_batch
    attention = backbone(policy.model).language_model.config._attn_implementation
    layout = {"default": layout_for(attention), "dense": Layout.ROWS, "separate": Layout.SEPARATE}[way]
    return [
        collate(groups[start : start + size], policy.processor, policy.device, layout=layout)
        for start in range(0, len(groups), size)
    ]


def run(learner: Learner, batches: Sequence[CompletionBatch]) -> tuple[list[torch.Tensor], float]:
    """Run forward and backward over all micro-batches; gradients stay on the parameters.

    Returns:
        The log-probabilities of every micro-batch, (B, Tc), and the seconds.
    """
    learner.trained.zero_grad()
    began = now()
    logps = []
    for batch in batches:
        stats = learner.trained.forward(batch, temperature=1.0, entropy="value")
        # Different weights per completion, like advantages.
        weights = torch.linspace(-1, 1, batch.num_completions, device=batch.mask.device)
        (stats.logps * weights[:, None]).sum().backward()
        logps.append(stats.logps.detach())
    return logps, now() - began


def gradient(learner: Learner) -> torch.Tensor:
    """All gradients as one float32 vector."""
    return torch.cat(
        [p.grad.flatten().float().cpu() for p in learner.trained.parameters.values() if p.grad is not None]
    )


def compare(learner: Learner, groups: Sequence[Group], ways: Sequence[Way], dtype: str) -> dict[str, Any]:
    """Compare layouts with one row per completion: largest difference in log-probabilities, relative one in gradients.

    Raises:
        ValueError: the log-probabilities differ by more than the tolerance.
    """
    few = groups[:1]
    logps, _ = run(learner, lay_out(learner, few, "separate"))
    expected, grads = torch.cat(logps), gradient(learner)
    found = {}
    for way in ways:
        if way == "separate":
            continue
        logps, _ = run(learner, lay_out(learner, few, way))
        difference = float((torch.cat(logps) - expected).abs().max())
        relative = float((gradient(learner) - grads).norm() / grads.norm())
        found[way] = {"logps": difference, "gradient": relative}
        if not difference <= TOLERANCES[dtype]:
            raise ValueError(
                f"With the layout '{WAYS[way]}' log-probabilities differ by {difference:.2g} from one row per "
                f"completion, but the tolerance in {dtype} is {TOLERANCES[dtype]:g}: do not trust its speed."
            )
    learner.trained.zero_grad()
    return found


def count_flops(model: Architecture, workload: Workload, prompts: Sequence[int], way: Way) -> float:
    """FLOPs of forward and backward in a layout, without recomputation."""
    completions = [workload.length] * workload.generations
    rows, trained = workload.generations, trained_of(workload)
    scored = rows * workload.length * len(prompts)
    if way == "separate":
        tokens = rows * (sum(prompts) + workload.length * len(prompts))
        pairs = sum(group_pairs(0, [p + length for length in completions]) for p in prompts)
    else:
        tokens = sum(prompts) + scored
        pairs = sum(
            (p + rows * workload.length) ** 2 if way == "dense" else group_pairs(p, completions) for p in prompts
        )
    shape = Shape(tokens, pairs, scored)
    return forward_flops(model, shape, trained) + backward_flops(model, shape, trained, attention=2.0)


def time_ways(
    learner: Learner, groups: Sequence[Group], ways: Sequence[Way], repeats: int, warmup: int
) -> dict[str, Any]:
    """Median seconds of each layout, alternating after warmup passes, and peak GPU memory."""
    batches = {way: lay_out(learner, groups, way) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0)
    for index in range(warmup + repeats):
        for way in ways:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            _, took = run(learner, batches[way])
            if index >= warmup:
                seconds[way].append(took)
            if torch.cuda.is_available():
                peaks[way] = torch.cuda.max_memory_allocated()
    return {
        way: {"seconds": statistics.median(seconds[way]), "peak_gib": peaks[way] / 2**30 if peaks[way] else None}
        for way in ways
    }


def measure(
    learner: Learner,
    workload: Workload,
    ways: Sequence[Way],
    folder: Path,
    rates: Rates,
    *,
    repeats: int,
    warmup: int,
    is_checked: bool = False,
) -> dict[str, Any]:
    """Compare and time layouts.

    Args:
        learner: learner with the workload's model.
        is_checked: skip the comparison.
    """
    pixels = workload.side**2
    learner.policy.processor = Processor.from_folder(folder, Qwen2VL(), min_pixels=pixels, max_pixels=pixels)
    groups = make_groups(learner.policy, workload)
    equality = {} if is_checked else compare(learner, groups, ways, workload.dtype)
    timed = time_ways(learner, groups, ways, repeats, warmup)
    model, prompts = architecture_of(folder), [len(group.prompt.input_ids) for group in groups]
    needed = count_flops(model, workload, prompts, "default")
    for way in ways:
        computed = count_flops(model, workload, prompts, way)
        timed[way] |= {
            "flops": computed,
            "rate_share": computed / timed[way]["seconds"] / rates.flops,
            "floor_share": needed / rates.flops / timed[way]["seconds"],
        }
    return {"prompt_tokens": prompts, "equality": equality, "needed_flops": needed, "ways": timed}


def scaling(
    learner: Learner,
    workload: Workload,
    changes: Mapping[str, Sequence[int]],
    folder: Path,
    rates: Rates,
    *,
    repeats: int,
    warmup: int,
) -> list[dict[str, Any]]:
    """Time the default layout and one row per completion for one group, changing one size at a time."""
    base = replace(workload, prompts=1, prompts_per_micro_batch=1)
    rows: list[dict[str, Any]] = []
    for name, values in changes.items():
        for value in values:
            found = measure(
                learner,
                replace(base, **{name: value}),
                ("default", "separate"),
                folder,
                rates,
                repeats=repeats,
                warmup=warmup,
                is_checked=bool(rows),
            )
            rows.append({"changed": name, "value": value, **found})
    return rows


def report(result: Mapping[str, Any]) -> str:
    """Format the table of layouts."""
    rows = [["layout", "seconds", "TFLOP computed", "of matrix rate", "of the floor", "peak GiB"]]
    for way, row in result["ways"].items():
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        shares = [f"{row['rate_share']:.1%}", f"{row['floor_share']:.1%}"]
        rows.append([WAYS[way], f"{row['seconds']:.3f}", f"{row['flops'] / 1e12:.3f}", *shares, peak])
    return table(rows)


def report_scaling(found: Sequence[Mapping[str, Any]]) -> str:
    """Format the table of sizes."""
    names = {"generations": "completions", "side": "image, px", "length": "tokens of a completion"}
    rows = [["one group", "", "prompt tokens", "shared, s", "separate, s", "ratio", "ratio of TFLOP"]]
    for row in found:
        shared, separate = row["ways"]["default"], row["ways"]["separate"]
        rows.append(
            [
                names[row["changed"]],
                str(row["value"]),
                str(row["prompt_tokens"][0]),
                f"{shared['seconds']:.3f}",
                f"{separate['seconds']:.3f}",
                f"{separate['seconds'] / shared['seconds']:.2f}",
                f"{separate['flops'] / shared['flops']:.2f}",
            ]
        )
    return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="measured passes per layout, alternating")
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured passes before them")
    parser.add_argument("--scaling", action="store_true", help="change group size, image and length, one at a time")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="processor: CPU time, for a busy machine"
    )
    parser.add_argument("--models", type=Path, help="folder that keeps random models for other benchmarks")
    parser.add_argument("--output", type=Path, help="result file")
    options = parser.parse_args(argv)
    use_clock(options.clock)
    keep_freed_memory()
    workload = replace(PRESETS[options.preset], lora=options.lora, checkpointing=options.checkpointing)
    ways: tuple[Way, ...] = ("default", "dense", "separate")
    rates = measure_rates(getattr(torch, workload.dtype), seconds=0.5)
    with prepared(workload, models=options.models) as folder:
        result: dict[str, Any] = {"workload": asdict(workload), "rates": asdict(rates), "repeats": options.repeats}
        result |= {"warmup": options.warmup, "clock": options.clock}
        learner = make_learner(workload, folder)
        counts = {"repeats": options.repeats, "warmup": options.warmup}
        if options.scaling:
            changes = SCALING[options.preset]
            result["scaling"] = scaling(learner, workload, changes, folder, rates, **counts)
        else:
            result |= measure(learner, workload, ways, folder, rates, **counts)
    result = {"benchmark": "update", "preset": options.preset, "hardware": hardware()} | result
    write_result(options.output, result)
    machine = result["hardware"]
    print(
        f"{workload.model}, {workload.dtype}, {f'LoRA of rank {workload.lora}' if workload.lora else 'all weights'}, "
        f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, {options.clock} clock, "
        f"{rates.flops / 1e9:,.0f} GFLOP/s"
    )
    print(load_line(machine, options.clock))
    if options.scaling:
        print(report_scaling(result["scaling"]))
        ratios = [row["ways"]["separate"]["seconds"] / row["ways"]["default"]["seconds"] for row in result["scaling"]]
        speedup = math.exp(statistics.fmean(map(math.log, ratios)))
    else:
        for way, difference in result["equality"].items():
            print(
                f"{WAYS[way]}: log-probabilities differ by at most {difference['logps']:.1e}, the gradient by "
                f"{difference['gradient']:.1e} relative to its norm"
            )
        print(report(result))
        speedup = result["ways"]["separate"]["seconds"] / result["ways"]["default"]["seconds"]
    print(f"speedup: {speedup:.2f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
