"""Runs toy training on one or several processes: ``python ranks.py JOBS_JSON``.

Importing takes longest, so it is done once and the ranks of all jobs are forked from here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import toy
from toy import ToyData

from medvqa_rl.config import Config
from medvqa_rl.core.types import Completion, Group, Sample
from medvqa_rl.evaluation import answering
from medvqa_rl.learning import collector, grpo
from medvqa_rl.learning.distributed.trained import TrainedPolicy
from medvqa_rl.learning.grpo import train
from medvqa_rl.learning.run.run import Run
from medvqa_rl.learning.update import Learner

ENVIRONMENT = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
OFFLOAD = {
    "zero2_offload": {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
    "zero3_offload": {
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    },
}
ENVIRONMENT |= {name: ENVIRONMENT[name.removesuffix("_offload")] | more for name, more in OFFLOAD.items()}
"""The environment variables that ``accelerate launch`` sets for each engine."""


@dataclass(frozen=True)
class MixedData(ToyData):
    """Every other question has no image."""

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample if index % 2 else replace(sample, images=())


def rare(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward that is zero except for questions about organs, so that ranks have unequal numbers of groups."""
    rewards = toy.vowels(prompts, completions, completion_ids, trainer_state)
    return [reward if "organ" in str(prompt) else 0.0 for reward, prompt in zip(rewards, prompts)]


def gradient(trained: TrainedPolicy, parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """The full gradient of a parameter."""
    if parameter.grad is not None:
        grad = parameter.grad
        return grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    if type(trained).__name__ != "ZeroPolicy":
        return None
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def placement(trained: Any) -> str:
    """The optimizer that DeepSpeed steps with, and where sharded weights are offloaded to."""
    weights = trained._engine.zero_offload_param()
    return f"{type(trained._zero.optimizer).__name__}, weights offloaded to {weights.device if weights else 'none'}"


def keep_first_gradient(path: Path) -> None:
    """Write the gradient of the first step to a file, before it is clipped."""
    accumulate = Learner.accumulate

    def watched(learner: Learner, *args: Any) -> Any:
        finish = learner.trained.clip_gradients

        def keep(*, fill_missing: bool) -> float:
            trained = learner.trained
            found = {name: gradient(trained, parameter) for name, parameter in trained.parameters.items()}
            if type(trained).__name__ == "ZeroPolicy":
                sys.stderr.write(f"stepped by {placement(trained)}\n")  # in one piece
            if trained.accelerator.is_main_process:
                torch.save({name: grad for name, grad in found.items() if grad is not None}, path)
            return finish(fill_missing=fill_missing)

        learner.trained.clip_gradients = keep
        try:
            return accumulate(learner, *args)
        finally:
            learner.trained.clip_gradients = finish
            Learner.accumulate = accumulate

    Learner.accumulate = watched


def share_completions(path: Path, *, write: bool) -> None:
    """Write a run's completions to a file, or train on those in the file instead of the sampled ones.

    Sums over other batch shapes round differently, so later steps now and then sample another token. Differences are
    printed to standard error, except in bfloat16, where half of the completions soon differ. The first step has the
    same weights and must sample the same tokens.
    """
    exact = collector.roll_out
    stored: dict[str, Any] = {} if write else json.loads(path.read_text())

    def shared(config: Any, setup: Any, step: int, prompts: Any) -> list[Group]:
        groups = exact(config, setup, step, prompts)
        is_exact = config.model.dtype != "bfloat16"
        for group in groups:
            key, own = f"{step} {group.sample.id}", [asdict(completion) for completion in group.completions]
            if write:
                stored[key] = own
                continue
            other = [row | {"token_ids": tuple(row["token_ids"])} for row in stored[key]]
            flipped = sum(one["token_ids"] != two["token_ids"] for one, two in zip(own, other, strict=True))
            if is_exact:
                print(f"flipped {flipped} of {len(own)} in step {step}", file=sys.stderr)
                assert step > 0 or not flipped, "the first step sampled other tokens"
            group.completions = tuple(Completion(**row) for row in other)
        if write:
            path.write_text(json.dumps(stored))
        return groups

    collector.roll_out = shared


def count_answers(path: Path) -> None:
    """Write the number of questions that this rank answers in evaluations to a file."""
    exact, count = answering.answer, 0

    def counted(engine: Any, questions: Any, settings: Any) -> Any:
        nonlocal count
        for record in exact(engine, questions, settings):
            count += 1
            path.write_text(str(count))
            yield record

    answering.answer = counted


def work(job: dict[str, Any]) -> None:
    """Run one rank of a job."""
    config = Config.model_validate(job["config"])
    count_answers(Path(config.output_dir) / f"answered-{os.environ.get('RANK', 0)}")
    if "gradient" in job:
        keep_first_gradient(Path(job["gradient"]))
    is_dry = job.get("dry_run", False)
    if "lost" not in job and not job.get("perturb") and not is_dry:
        share_completions(Path(job["completions"]), write=job["ranks"] == 1 and not job.get("resume"))
    if job.get("perturb"):
        exact = grpo.group_advantages
        grpo.group_advantages = lambda total, **how: exact(total, **how) + 0.1 * (total > total.mean())
    data = MixedData(8) if job.get("mixed") else ToyData(8)
    train(config, train_set=data, val_set=ToyData(3), resume=job.get("resume", False), dry_run=is_dry)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def lose(step: int, phase: str, how: int | str) -> None:
    """Send this process a signal at a phase of a step, or block its main thread there."""
    set_phase = Run.set_phase

    def struck(run: Run, current: str) -> None:
        set_phase(run, current)
        if (run.state.step + 1, current) != (step, phase):
            return
        if isinstance(how, int):
            os.kill(os.getpid(), how)
        while True:  # its heartbeat continues
            time.sleep(0.01)

    Run.set_phase = struck


def launch(job: dict[str, Any]) -> list[int]:
    """Run a job and return the exit codes of its ranks. Like a launcher, kill the others once one has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_fork(job, rank, port) for rank in range(job["ranks"])]
    lost = children[job["lost"]["rank"]] if "lost" in job else None
    print(f"== {job['name']} ==", file=sys.stderr, flush=True)
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] and child != lost:
                deadline = time.monotonic() + 5
        elif deadline is not None and time.monotonic() > deadline:
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.05)
    return [codes[child] for child in children]


def _fork(job: dict[str, Any], rank: int, port: int) -> int:
    """Start one rank and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if job["ranks"] > 1:
            world = str(job["ranks"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
            os.environ |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= ENVIRONMENT[job["engine"]] | job.get("environment", {})
        lost = job.get("lost")
        if lost is not None and lost["rank"] == rank:
            lose(lost["step"], lost["phase"], lost["how"])
        work(job)
        code = 0
    except BaseException:  # noqa: BLE001  # the parent reports it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    work_to_do = json.loads(Path(sys.argv[1]).read_text())
    if any(job["engine"].startswith("zero") for job in work_to_do):
        os.environ["DS_ACCELERATOR"] = "cpu"
    print(json.dumps({job["name"]: launch(job) for job in work_to_do}))
