"""Speedup over ranks: the same training steps on one and on several processes, on a CPU with gloo.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --engine fsdp2 --ranks 1 2 --output result.json
    OMP_NUM_THREADS=1 python -m benchmarks.scaling --smoke

Measures the CPU time of each process, including threads and communication, so it also works with more processes than
cores; waiting for another rank or for the network takes no CPU time. A step has two phases that end with a barrier,
rollout with rewards and update. A phase lasts as long as its slowest rank, and the other ranks wait for it:

    step = sum over phases of the slowest rank's seconds
    waiting of a rank = step - its own seconds
    efficiency of N ranks = step on one rank / (N * step) = 1 - share of waiting - share of extra work

Network latency and waiting within a phase are not included. Exits with 1 if the runs did not sample the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    Workload,
    hardware,
    load_line,
    make_config,
    make_data,
    now,
    table,
    use_clock,
    write_result,
)
from benchmarks.models import PHANTOM, prepare_model
from medvqa_rl.core.machine import keep_freed_memory
from medvqa_rl.learning.batching.feed import make_feed
from medvqa_rl.learning.collector import roll_out
from medvqa_rl.learning.objective.advantages import group_advantages
from medvqa_rl.learning.setup import make_accelerator, make_reference, set_up, wrap
from medvqa_rl.learning.update import Learner
from medvqa_rl.rewards import Rewards

EMBEDDED = Workload(PHANTOM, prompts=8, generations=8, length=64, side=112, prompts_per_micro_batch=4)
SMOKE = Workload("tiny", prompts=2, generations=2, length=4, side=56, prompts_per_micro_batch=1)
ENGINES = {
    "ddp": {},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
}
"""Environment variables that ``accelerate launch`` sets for each engine."""
PHASES = ("rollout", "update")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class RankStep:
    """The share of one rank in one step."""

    rollout: float
    """CPU time for preparing prompts, sampling and rewards."""
    update: float
    """CPU time for everything else."""
    wall: float
    """Wall time."""
    tokens: dict[str, list[int]]
    """Sampled tokens of each prompt's completions, concatenated, by sample id."""


def run_rank(workload: Workload, folder: Path, steps: int) -> list[RankStep]:
    """Run training steps in this process, alone or as the rank given by the environment."""
    use_clock("processor")
    keep_freed_memory()  # as the command does
    config = make_config(workload, folder, steps=steps)
    accelerator = make_accelerator(config, workload.prompts)
    setup = set_up(config, make_data(workload.prompts * steps, workload.side), None, with_validation=False)
    reference = make_reference(config, setup.policy)
    rewards = Rewards(config.rewards)
    trained = wrap(config, accelerator, setup.policy)
    learner = Learner(config, accelerator, setup.policy, reference, trained)
    done = []
    with make_feed(config, accelerator, setup, range(steps), workload.prompts) as feed:
        for step in range(steps):
            accelerator.wait_for_everyone()
            passed, began = time.perf_counter(), now()
            with trained.gathered():
                groups = roll_out(config, setup, step, feed.prompts(step))
            total = torch.from_numpy(rewards.score(groups, step=step).total)
            rolled_out = now()
            accelerator.wait_for_everyone()  # a run gathers the sampled completions here
            updating = now()
            learner.update(groups, group_advantages(total, scale=config.advantage.scale), ~total.isnan(), step)
            ended = now()
            accelerator.wait_for_everyone()
            tokens = {group.sample.id: [t for c in group.completions for t in c.token_ids] for group in groups}
            done.append(RankStep(rolled_out - began, ended - updating, time.perf_counter() - passed, tokens))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return done


def run_ranks(workload: Workload, folder: Path, steps: int, *, ranks: int, engine: str) -> list[list[RankStep]]:
    """Run each rank in a new process and return the steps of all ranks.

    Raises:
        ValueError: a rank failed; the message ends with its last output.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    shared = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **ENGINES[engine]}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as scratch:
        children = []
        for rank in range(ranks):
            output = Path(scratch, str(rank))
            request = {"workload": asdict(workload), "folder": str(folder), "steps": steps, "output": str(output)}
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            command = [sys.executable, "-m", "benchmarks.scaling", "--child", json.dumps(request)]
            with output.with_suffix(".log").open("w") as log:
                children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        try:
            while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
                time.sleep(0.1)
            failed = [rank for rank, child in enumerate(children) if child.poll()]
        finally:
            for child in children:
                child.kill()  # no effect on processes that have ended
                child.wait()
        if failed:
            log_text = Path(scratch, f"{failed[0]}.log").read_text(encoding="utf-8", errors="replace")
            raise ValueError(f"Rank {failed[0]} of {ranks} failed:\n{log_text[-3000:]}")
        found = [json.loads(Path(scratch, str(rank)).read_text(encoding="utf-8")) for rank in range(ranks)]
    return [[RankStep(**step) for step in steps_of_rank] for steps_of_rank in found]


def tokens_of(ranks: Sequence[Sequence[RankStep]]) -> list[dict[str, list[int]]]:
    """Merge the sampled tokens of all ranks, for each step."""
    return [{name: ids for part in parts for name, ids in part.tokens.items()} for parts in zip(*ranks, strict=True)]


def summary(ranks: Sequence[Sequence[RankStep]], alone: float | None) -> dict[str, Any]:
    """Means over the measured steps.

    Args:
        ranks: (ranks, steps)
        alone: seconds per step on one rank; None if this is the run on one rank.
    """
    steps = list(zip(*ranks, strict=True))
    longest = {phase: _mean([max(step, key=attrgetter(phase)) for step in steps], phase) for phase in PHASES}
    seconds = sum(longest.values())
    own = [sum(part.rollout + part.update for part in rank) / len(rank) for rank in ranks]
    waiting = [sum(longest[phase] - _mean(rank, phase) for phase in PHASES) for rank in ranks]
    room = len(ranks) * seconds
    efficiency = (seconds if alone is None else alone) / room
    waiting_share = sum(waiting) / room
    return {
        "ranks": len(ranks),
        "seconds": seconds,
        "steps_per_second": 1 / seconds,
        "phases": longest,
        "own_seconds": own,
        "waiting_seconds": waiting,
        "efficiency": efficiency,
        "waiting_share": waiting_share,
        "extra_work_share": 1 - efficiency - waiting_share,
        "wall_seconds": sum(max(part.wall for part in step) for step in steps) / len(steps),
    }


def measure(
    workload: Workload, counts: Sequence[int], *, engine: str, steps: int, warmup: int, rounds: int
) -> dict[str, Any]:
    """Run each number of ranks in turn and compare.

    Args:
        counts: numbers of ranks, starting with 1.
        steps: number of measured steps per process.
        warmup: number of unmeasured steps before them.
        rounds: number of runs with each number of ranks; their measured steps are pooled.

    Returns:
        The content of the result file; ``differences`` lists the steps at which the runs sampled different tokens.
    """
    use_clock("processor")
    measured: dict[int, list[list[RankStep]]] = {count: [[] for _ in range(count)] for count in counts}
    differences: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare_model(workload, Path(scratch))
        for _ in range(rounds):
            expected: list[dict[str, list[int]]] = []
            for count in counts:
                found = run_ranks(workload, folder, warmup + steps, ranks=count, engine=engine)
                expected = expected or tokens_of(found)
                for step, (first, other) in enumerate(zip(expected, tokens_of(found), strict=True), start=1):
                    if first != other:
                        differences.append(
                            f"{count} ranks, step {step}: the sampled tokens differ from those on one rank"
                        )
                for rank, done in zip(measured[count], found, strict=True):
                    rank += done[warmup:]
    alone = summary(measured[counts[0]], None)
    return {
        "benchmark": "scaling",
        "engine": engine,
        "workload": asdict(workload),
        "hardware": hardware(),
        "clock": "processor",
        "steps": steps,
        "warmup": warmup,
        "rounds": rounds,
        "runs": [alone, *(summary(measured[count], alone["seconds"]) for count in counts[1:])],
        "differences": differences,
    }


def _mean(steps: Sequence[RankStep], phase: str) -> float:
    """Mean seconds of a phase."""
    return sum(getattr(step, phase) for step in steps) / len(steps)


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format the table of runs."""

    def each(values: Sequence[float]) -> str:
        return ", ".join(f"{value:.3f}" for value in values)

    rows = [["ranks", *(str(run["ranks"]) for run in runs)]]
    rows.append(["steps per second", *(f"{run['steps_per_second']:.2f}" for run in runs)])
    rows.append(["seconds per step", *(f"{run['seconds']:.3f}" for run in runs)])
    for phase in PHASES:
        rows.append([f"  {phase}", *(f"{run['phases'][phase]:.3f}" for run in runs)])
    rows.append(["CPU seconds of each rank", *(each(run["own_seconds"]) for run in runs)])
    rows.append(["waiting of each rank", *(each(run["waiting_seconds"]) for run in runs)])
    for name in ("efficiency", "waiting_share", "extra_work_share"):
        rows.append([name.replace("_", " "), *(f"{run[name]:.1%}" for run in runs)])
    rows.append(["wall seconds per step", *(f"{run['wall_seconds']:.3f}" for run in runs)])
    return table(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if the runs sampled different tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2), help="numbers of ranks, starting with 1")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per process")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps before them")
    parser.add_argument("--rounds", type=int, default=2, help="runs with each number of ranks, alternating")
    parser.add_argument("--smoke", action="store_true", help="quick test with tiny sizes and one step")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child is not None:
        request = json.loads(options.child)
        steps = run_rank(Workload(**request["workload"]), Path(request["folder"]), request["steps"])
        Path(request["output"]).write_text(json.dumps([asdict(step) for step in steps]), encoding="utf-8")
        return 0
    workload = SMOKE if options.smoke else EMBEDDED
    if options.ranks[0] != 1 or any(count < 1 or workload.prompts % count for count in options.ranks):
        raise ValueError(
            f"--ranks is {' '.join(map(str, options.ranks))}: start with 1, the baseline, and give only "
            f"divisors of the {workload.prompts} prompts per step."
        )
    result = measure(
        workload,
        options.ranks,
        engine=options.engine,
        steps=1 if options.smoke else options.steps,
        warmup=0 if options.smoke else options.warmup,
        rounds=1 if options.smoke else options.rounds,
    )
    write_result(options.output, result)
    machine = result["hardware"]
    print(
        f"{machine['cpu']}, one thread per rank, {options.engine}, processor clock, "
        f"{result['steps'] * result['rounds']} steps"
    )
    print(load_line(machine, "processor"))
    print(report(result["runs"]))
    for difference in result["differences"]:
        print(f"NOT COMPARABLE: {difference}")
    return bool(result["differences"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
