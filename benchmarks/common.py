"""Workloads, data, machine throughput and result files, shared by the benchmarks.

Legend: P prompts, G completions per prompt, R tokens per completion.
"""

from __future__ import annotations

import io
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from medvqa_rl.config import Config
from medvqa_rl.core.files import write_json
from medvqa_rl.core.machine import LoadMeter
from medvqa_rl.core.types import ImageSource, Sample
from medvqa_rl.data.phantom.questions import draw_sample


@dataclass(frozen=True)
class Workload:
    """One training step, the same for both engines."""

    model: str
    """A key of :data:`benchmarks.models.MODELS` (random weights) or a path as in ``model.path``."""
    prompts: int
    generations: int
    length: int
    """Tokens per completion; stop tokens are never sampled."""
    side: int
    """Side of the square images in pixels."""
    beta: float = 0.04
    lora: int = 0
    """LoRA rank; 0 for full fine-tuning."""
    train_vision: bool = False
    """Also train vision tower and projector."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    prompts_per_micro_batch: int = 8
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class Square:
    """An encoded image in memory; decoding it is part of a step for both engines."""

    key: str
    png: bytes

    def load(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png)).convert("RGB")

    def header_pixels(self) -> None:
        return None


@dataclass(frozen=True)
class Squares:
    """PhantomVQA questions with images of one size, the same for both engines."""

    samples: tuple[Sample, ...]
    name: str = "squares"
    fingerprint: str = "squares"
    is_endless: bool = False

    @property
    def notes(self) -> Mapping[str, int]:
        return {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def make_data(count: int, side: int) -> Squares:
    """The first PhantomVQA questions, each with one resized image."""
    drawn = [draw_sample(seed=0, split="train", index=index) for index in range(count)]
    return Squares(
        tuple(
            Sample(s.id, s.question, s.answer, s.answer_type, tuple(_square(i, side) for i in s.images), s.options)
            for s in drawn
        )
    )


def _square(image: ImageSource, side: int) -> Square:
    """Resize and encode the image."""
    buffer = io.BytesIO()
    image.load().resize((side, side), Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return Square(f"{image.key}@{side}", buffer.getvalue())


def make_config(
    workload: Workload,
    folder: Path,
    *,
    steps: int = 1000,
    attention: str | None = None,
    rollout: str | None = None,
    load_in_4bit: bool = False,
) -> Config:
    """The settings of this package for a workload. The reward function gives every group some variance.

    Args:
        folder: model folder.
        steps: number of steps, for the learning rate schedule.
        attention: ``model.attention``; None uses the default.
        rollout: ``rollout.engine``; None uses the default.
        load_in_4bit: ``model.load_in_4bit``.
    """
    pixels = workload.side**2
    model: dict[str, Any] = {
        "path": str(folder),
        "dtype": workload.dtype,
        "lora": {"rank": workload.lora, "alpha": 2 * workload.lora} if workload.lora else None,
        "train_vision": workload.train_vision,
        "train_projector": workload.train_vision,
        "gradient_checkpointing": workload.checkpointing,
        "min_pixels": pixels,
        "max_pixels": pixels,
        "load_in_4bit": load_in_4bit,
    }
    if attention is not None:
        model["attention"] = attention
    return Config.model_validate(
        {
            "model": model,
            "rollout": {
                "num_generations": workload.generations,
                "max_completion_length": workload.length,
                **({} if rollout is None else {"engine": rollout}),
            },
            "rewards": {"format": 0.0, "correctness": 0.0, "functions": {"benchmarks.common.share_of_vowels": 1.0}},
            "loss": {"type": "grpo", "beta": workload.beta},
            "optimizer": {"learning_rate": workload.learning_rate},
            "train": {
                "steps": steps,
                "prompts_per_step": workload.prompts,
                "prompts_per_micro_batch": workload.prompts_per_micro_batch,
                "self_check": False,  # runs once per run; benchmarks.update makes the same comparison
            },
        }
    )


def share_of_vowels(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
    """A cheap reward with TRL's signature that differs between completions."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter in "aeiou" for letter in text.lower()) / max(1, len(text)) for text in texts]


NEGLIGIBLE = 0.1
"""Cores that other processes may use in addition to those that a benchmark leaves free."""

Clock = Literal["wall", "processor"]
"""wall: wall time. processor: CPU time of this process, for a busy machine; with one thread it equals the wall time on
a dedicated core."""

_clock: Callable[[], float] = time.perf_counter


def use_clock(clock: Clock) -> None:
    """Choose the clock of :func:`now`.

    Raises:
        ValueError: the processor clock was requested on a GPU or with several threads, which it cannot measure.
    """
    global _clock
    if clock == "processor" and (torch.cuda.is_available() or torch.get_num_threads() > 1):
        raise ValueError(
            f"--clock processor is for one thread on a CPU, but there are {torch.get_num_threads()} threads and "
            f"{torch.cuda.device_count()} GPUs: set OMP_NUM_THREADS=1, or use --clock wall."
        )
    _clock = time.process_time if clock == "processor" else time.perf_counter


def now() -> float:
    """Seconds on the chosen clock, after synchronising the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return _clock()


def peak_bytes() -> int:
    """Peak memory so far, of the GPU if there is one, otherwise of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Rates:
    """Peak throughput of the machine."""

    flops: float
    """FLOP/s of a large matrix product in the workload's dtype."""
    bytes: float
    """Bytes per second read and written by copying a large tensor."""


def measure_rates(dtype: torch.dtype, *, seconds: float = 2.0, size: int | None = None) -> Rates:
    """Measure the best of repeated large matrix products and copies.

    Args:
        seconds: how long each is repeated.
        size: side of the matrices; defaults to 8192 on a GPU and 1024 elsewhere.
    """
    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if is_gpu else "cpu")
    side = size or (8192 if is_gpu else 1024)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros((2**30 if is_gpu else 2**26) if size is None else size, device=device)  # float32
    target = torch.empty_like(source)
    best = []
    for run in (lambda: torch.mm(left, right), lambda: target.copy_(source)):
        run()
        shortest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or shortest == float("inf"):
            began = now()
            run()
            shortest = min(shortest, now() - began)
        best.append(shortest)
    return Rates(flops=2 * side**3 / best[0], bytes=2 * source.numel() * source.element_size() / best[1])


_meter = LoadMeter()
"""Measures other processes from the start of a benchmark."""


def hardware() -> dict[str, Any]:
    """Describe hardware, load and library versions, without host or folder names. Call it after measuring."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        **describe_load(_meter),
        "python": platform.python_version(),
        **{name: version(name).split("+")[0] for name in ("torch", "transformers", "peft")},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def describe_load(meter: LoadMeter) -> dict[str, float]:
    """The load of the machine: ``load``, the mean of the last minute; ``cores``, the cores that this process may use;
    ``busy``, how many of them other processes kept busy while it measured."""
    cores, busy = meter.read()
    return {"load": round(os.getloadavg()[0], 2), "cores": cores, "busy": round(busy, 2)}


def load_line(machine: Mapping[str, Any], clock: Clock) -> str:
    """Format the load that :func:`hardware` found, with a warning if it makes the numbers worthless."""
    cores, busy, threads = machine["cores"], machine["busy"], machine["threads"]
    line = f"load {machine['load']}, other processes kept {busy:.2f} of {cores} cores busy"
    if clock == "processor" or busy <= max(cores - threads, 0) + NEGLIGIBLE:
        return line
    return (
        f"{line}\nWORTHLESS: these are wall times on cores shared with other processes. Measure again on an idle "
        "machine, or the CPU time of one thread (OMP_NUM_THREADS=1 and --clock processor)."
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def write_result(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as indented JSON, if a path is given."""
    if path is not None:
        write_json(path, result)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format a table. The first row is the heading; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
