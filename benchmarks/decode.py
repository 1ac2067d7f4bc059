"""Rollout tokens per second: this package against transformers' ``generate`` on the same work, alternating.

    python -m benchmarks.decode --preset embedded
    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.decode --preset paper-cpu --rounds 1
    python -m benchmarks.decode --preset paper-gpu --engine eager graph --output FILE

Both sample G completions of a fixed number of tokens per prompt (stop tokens are suppressed) from prompts that are
encoded beforehand. ``generate`` is called with ``num_return_sequences``, so it also encodes each image only once. A
rollout of one token measures vision and prefill; decoding time is the difference to a whole rollout. The lower bound
for decoding reads, per step, all weights once and every cached key and value once, those of a prompt once for all its
completions. Greedy tokens are compared first. The last line is ``speedup: RATIO``, the median time of a whole rollout
by ``generate`` divided by that of this package's first engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

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
from benchmarks.engines import forbid_stopping
from benchmarks.floors import architecture_of
from benchmarks.models import prepared
from benchmarks.step import PRESETS
from medvqa_rl.config import RolloutConfig
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.core.types import EncodedPrompt, Sample
from medvqa_rl.learning.estimate.cost import decode_bytes, decode_flops
from medvqa_rl.models.dimensions import Architecture
from medvqa_rl.models.families.parts import backbone
from medvqa_rl.models.loading import Policy, load_policy
from medvqa_rl.rollout.decode import RolloutEngine

Engine = Literal["eager", "graph"]
Roll = Callable[[int], Any]
"""Samples all completions of this many tokens."""


def decode_floor(model: Architecture, workload: Workload, prompts: Sequence[int]) -> tuple[int, int]:
    """Bytes read and FLOPs of decoding all tokens except the first, which comes from the prefill.

    Args:
        prompts: number of tokens of each of the P prompts.
    """
    size = 2 if workload.dtype == "bfloat16" else 4
    rows = workload.generations * len(prompts)
    moved = flops = 0
    for position in range(1, workload.length):
        moved += decode_bytes(model, sum(prompts) + rows * position, size)
        seen = sum(prompts) * workload.generations + rows * position
        flops += int(decode_flops(model, rows, 0)) + 4 * model.hidden * model.layers * seen
    return moved, flops


def stock_inputs(policy: Policy, prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
    """Inputs of ``generate`` for prompts padded on the left."""
    width = max(len(prompt.input_ids) for prompt in prompts)
    missing = [width - len(prompt.input_ids) for prompt in prompts]
    rows = [np.pad(prompt.input_ids, (count, 0)) for prompt, count in zip(prompts, missing)]
    ids = torch.from_numpy(np.stack(rows)).to(policy.device)
    mask = torch.arange(width, device=policy.device) >= torch.tensor(missing, device=policy.device)[:, None]
    is_image = (ids == policy.processor.image_token_id) & mask
    pixels = [prompt.image_inputs["pixel_values"] for prompt in prompts if prompt.image_inputs]
    grids = [prompt.image_inputs["image_grid_thw"] for prompt in prompts if prompt.image_inputs]
    return {
        "input_ids": ids.masked_fill(~mask, policy.processor.pad_id),
        "attention_mask": mask.long(),
        "mm_token_type_ids": is_image.int(),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)).to(policy.device),
        "image_grid_thw": torch.from_numpy(np.concatenate(grids)).to(policy.device),
    }


def generate(policy: Policy, prompts: Sequence[EncodedPrompt], length: int, **settings: Any) -> list[tuple[int, ...]]:
    """Generate completions of exactly ``length`` tokens with transformers."""
    words = backbone(policy.model).config.text_config.vocab_size
    model: Any = policy.model
    with torch.no_grad():
        ids = model.generate(
            **stock_inputs(policy, prompts),
            max_new_tokens=length,
            min_new_tokens=length,
            suppress_tokens=sorted({*policy.processor.suppressed_ids, *range(len(policy.processor.tokenizer), words)}),
            pad_token_id=policy.processor.pad_id,
            **settings,
        )
    return [tuple(row) for row in ids[:, -length:].tolist()]


def same_greedy(policy: Policy, engine: RolloutEngine, samples: Sequence[Sample], length: int) -> float:
    """Share of prompts for which both engines give the same greedy completion."""
    prompts = [engine.encode(sample) for sample in samples]
    groups = engine.greedy(samples, max_completion_length=length, batch_size=len(samples), prompts=prompts)
    ours = [group.completions[0].token_ids for group in groups]
    theirs = generate(policy, prompts, length, do_sample=False)
    return sum(one == other for one, other in zip(ours, theirs, strict=True)) / len(samples)


def measure(rolls: dict[str, Roll], length: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of rollouts of one and of ``length`` tokens, alternating, after one warmup round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "whole": []} for name in rolls}
    for turn in range(rounds + 1):
        for name, roll in rolls.items():
            for part, tokens in (("prefill", 1), ("whole", length)):
                began = now()
                roll(tokens)
                if turn:
                    seconds[name][part].append(now() - began)
    return seconds


def run(
    workload: Workload, rounds: int, names: Sequence[Engine], rates: Rates, **folders: Path | None
) -> dict[str, Any]:
    """Compare engines of this package with ``generate`` on a workload.

    Args:
        names: the engines; the speedups are those of the first.
        folders: ``tokenizer`` and ``models`` of :func:`benchmarks.models.prepared`.
    """
    with prepared(workload, **folders) as path:
        model = architecture_of(path)
        policy = load_policy(make_config(workload, path).model)
    forbid_stopping(policy.processor)
    policy.model.eval()
    engines = {name: RolloutEngine(policy, engine=name) for name in names}
    samples = make_data(workload.prompts, workload.side).samples
    prompts = [engines[names[0]].encode(sample) for sample in samples]
    agreed = {name: same_greedy(policy, engine, samples, workload.length) for name, engine in engines.items()}
    rows = workload.prompts * workload.generations

    def ours(engine: RolloutEngine, length: int) -> None:
        config = RolloutConfig(num_generations=workload.generations, max_completion_length=length)
        groups = engine.rollout(samples, config, seed=0, stream="train", step=0, prompts=prompts)
        assert all(len(c.token_ids) == length for group in groups for c in group.completions)

    def theirs(length: int) -> None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        assert len(generate(policy, prompts, length, num_return_sequences=workload.generations, **sampling)) == rows

    rolls: dict[str, Roll] = {name: partial(ours, engine) for name, engine in engines.items()}
    seconds = measure(rolls | {"generate": theirs}, workload.length, rounds)
    moved, flops = decode_floor(model, workload, [len(prompt.input_ids) for prompt in prompts])
    tokens = rows * (workload.length - 1)
    found: dict[str, Any] = {}
    for name, measured in seconds.items():
        whole, prefill = (statistics.median(measured[part]) for part in ("whole", "prefill"))
        decode = whole - prefill
        found[name] = {
            "whole_seconds": whole,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "decode_tokens_per_second": tokens / decode,
            "share_of_bandwidth": moved / rates.bytes / decode,
            "share_of_flops": flops / rates.flops / decode,
            "all": measured,
        }
    return {
        "prompt_tokens": [len(prompt.input_ids) for prompt in prompts],
        "bytes_per_token": moved / tokens,
        "operations_per_token": flops / tokens,
        "same_greedy": agreed,
        "engines": found,
        "speedup": found["generate"]["whole_seconds"] / found[names[0]]["whole_seconds"],
        "decode_speedup": found["generate"]["decode_seconds"] / found[names[0]]["decode_seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if greedy tokens differ in float32 on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="embedded")
    parser.add_argument(
        "--engine", choices=("eager", "graph"), nargs="+", default=["eager"], help="rollout.engine of this package"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one warmup round")
    parser.add_argument("--tokenizer", type=Path, help="folder of a Qwen2-VL checkpoint's tokenizer")
    parser.add_argument("--models", type=Path, help="folder that keeps random models for other benchmarks")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--output", type=Path, help="result file")
    given = parser.parse_args(arguments)
    use_clock(given.clock)
    keep_freed_memory()
    workload = PRESETS[given.preset]
    rates = measure_rates(getattr(torch, workload.dtype), seconds=0.2 if given.preset == "smoke" else 2.0)
    result = run(workload, given.rounds, given.engine, rates, tokenizer=given.tokenizer, models=given.models)
    rows = [["", "whole s", "prefill s", "decode s", "tokens/s", "of bandwidth", "of matrix rate"]]
    for name, one in result["engines"].items():
        parts = [f"{one[part]:.3f}" for part in ("whole_seconds", "prefill_seconds", "decode_seconds")]
        shares = [f"{one[share]:.1%}" for share in ("share_of_bandwidth", "share_of_flops")]
        rows.append([name, *parts, f"{one['decode_tokens_per_second']:.0f}", *shares])
    print(table(rows))
    print(
        f"Decoding a token reads {result['bytes_per_token'] / 1e6:.3f} MB and takes "
        f"{result['operations_per_token'] / 1e6:.2f} MFLOP; copying moves {rates.bytes / 1e9:.1f} GB/s, "
        f"matrix products do {rates.flops / 1e9:.1f} GFLOP/s. Greedy completions equal to "
        f"generate's: {', '.join(f'{name} {share:.0%}' for name, share in result['same_greedy'].items())}."
    )
    if {"eager", "graph"} <= result["engines"].keys():
        on, off = (result["engines"][name]["decode_seconds"] for name in ("graph", "eager"))
        print(f"decoding with CUDA graphs against without: {off / on:.2f} times as fast")
    machine = hardware()
    print(load_line(machine, given.clock))
    settings = {"preset": given.preset, "engine": given.engine, "rounds": given.rounds, "clock": given.clock}
    found = {"benchmark": "decode", "settings": settings, "hardware": machine, "rates": vars(rates), **result}
    write_result(given.output, found)
    print(f"speedup of decoding alone: {result['decode_speedup']:.2f}")
    print(f"speedup: {result['speedup']:.2f}")
    is_exact = workload.dtype == "float32" and not torch.cuda.is_available()
    return int(is_exact and min(result["same_greedy"].values()) < 1)


if __name__ == "__main__":
    sys.exit(main())
