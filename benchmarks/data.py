"""Data loading: parsing a large table, reading its index, and prefetching prompts for training and evaluation.

    python -m benchmarks.data                 # 200,000 rows, 400 images
    python -m benchmarks.data --rows 2000 --images 32

Writes a table in PMC-VQA's format with its image files to a temporary folder and loads it in fresh processes: the
first parses the table, the second reads the index. Then prepares prompts with JPEGs of 1024 x 768 pixels as training
and evaluation do, without and with prefetching, each in a fresh process; instead of running a model, a consumer sleeps
for 10 ms per prompt. Prints seconds and peak memory; exits with 1 if a limit is exceeded.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvqa_rl.config import DataConfig, EvalConfig, ModelConfig, PrefetchConfig
from medvqa_rl.core.machine import LoadMeter, keep_freed_memory
from medvqa_rl.core.types import Completion, EncodedPrompt, Group, Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.stored import StoredDataset

MAX_SECONDS_FIRST = 20.0
MAX_SECONDS_SECOND = 2.0
MAX_GB = 1.5
PROMPTS = 16
"""Prompts per training step and per evaluation batch."""
MAX_PIXELS = 401_408
"""512 image tokens, as in the configs for PMC-VQA."""
PREFETCH_MIB = 128
HOLES_MIB = 16.0
"""Allowance for memory fragmentation."""
CONSUMER_SECONDS = 0.01
"""Time that the consumer sleeps per prompt, as a CPU that waits for a GPU does."""

COLUMNS = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label")


def write_table(root: Path, rows: int) -> None:
    """Write ``rows`` questions, each with its own image, three images per article."""
    (root / "images").mkdir()
    with (root / "train.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for index in range(rows):
            name = f"PMC{index // 3}_F{index % 3}.jpg"
            options = ("Computed tomography", f"Magnetic resonance imaging, {index % 7}", "X-ray", f"Scan {index}")
            cells = [f" {letter}:{text} " for letter, text in zip("ABCD", options)]
            question = f" Which imaging technique was used for figure {index}, and what does the arrow point at? "
            writer.writerow([name, question, options[1], *cells, "B"])
            handle = os.open(root / "images" / name, os.O_CREAT | os.O_WRONLY)
            os.write(handle, b"x")
            os.close(handle)


def load(root: Path) -> dict[str, float]:
    """Load the training split in this process."""
    config = DataConfig(name="pmc_vqa", path=str(root), cache_dir=str(root / "cache"))
    began, cpu = time.perf_counter(), time.process_time()
    load_dataset(config, "train")
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "gb": peak_bytes() / 1e9}


def write_images(root: Path, count: int) -> None:
    """Write JPEGs of noise, which compress as poorly as medical images."""
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        coarse.resize((1024, 768)).save(root / f"{index}.jpg", quality=90)


def prepare(root: Path, count: int, workers: int) -> dict[str, float]:
    """Prepare the prompts of all images with the training feed, then with the evaluation code."""
    from medvqa_rl.evaluation.answering import answer_all
    from medvqa_rl.evaluation.scoring import AnswerSettings
    from medvqa_rl.learning.batching.feed import Feed
    from medvqa_rl.models.loading import load_policy
    from medvqa_rl.rollout.decode import RolloutEngine

    class SleepingEngine(RolloutEngine):
        """Encodes prompts, and sleeps instead of generating."""

        def greedy(
            self, samples: Sequence[Sample], *, prompts: Sequence[EncodedPrompt] | None = None, **_: Any
        ) -> Iterator[Group]:
            for sample, prompt in zip(samples, prompts or ()):
                time.sleep(CONSUMER_SECONDS)
                yield Group(sample, prompt, [Completion((0,), "", False)])

    keep_freed_memory()
    samples = [Sample(str(i), "Q?", "yes", "closed", (FileImage(f"{i}.jpg", root),)) for i in range(count)]
    policy = load_policy(ModelConfig(path="phantom:instruct", device="cpu", max_pixels=MAX_PIXELS))
    engine = SleepingEngine(policy)
    prefetch = PrefetchConfig(workers=workers, max_mib=PREFETCH_MIB)
    held = [engine.encode(samples[0]) for _ in range(PROMPTS)]  # the caller holds one batch in any case
    before = peak_bytes()
    del held

    began = time.perf_counter()
    steps = range(-(-count // PROMPTS))
    with Feed(StoredDataset("images", samples), engine, prefetch, steps=steps, num_prompts=PROMPTS, seed=0) as feed:
        for step in steps:
            time.sleep(CONSUMER_SECONDS * len(feed.prompts(step)))
    training = len(steps) * PROMPTS / (time.perf_counter() - began)

    began = time.perf_counter()
    settings = AnswerSettings(EvalConfig(batch_size=PROMPTS), max_completion_length=1, prefetch=prefetch)
    answer_all(lambda: engine, samples, settings, save=lambda records: None)
    evaluation = count / (time.perf_counter() - began)
    return {
        "training": training,
        "evaluation": evaluation,
        "mib": (peak_bytes() - before) / 2**20,
        "one_prompt_mib": policy.processor.encoding_bytes(samples[0]) / 2**20,
    }


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_a_new_process(*arguments: object) -> dict[str, float]:
    """Run this program with these arguments in a fresh process and return the numbers it prints."""
    command = [sys.executable, "-m", "benchmarks.data", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if result.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{result.stderr}")
    numbers: dict[str, float] = json.loads(result.stdout)
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    children: list[tuple[Path | None, Callable[[Path], dict[str, float]]]] = [
        (options.load, load),
        (options.prepare, lambda root: prepare(root, options.images, options.workers)),
    ]
    for root, measure in children:
        if root is not None:
            print(json.dumps(measure(root)))
            return 0
    missed, meter = [], LoadMeter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_table(root, options.rows)
        size = (root / "train.csv").stat().st_size / 1e6
        print(f"table of {options.rows:,} rows, {size:.0f} MB, as many image files")
        for name, limit in (("first load", MAX_SECONDS_FIRST), ("second load", MAX_SECONDS_SECOND)):
            found = in_a_new_process("--load", root)
            seconds = f"{found['seconds']:6.2f} s (limit {limit:g}; CPU {found['cpu']:.2f} s)"
            print(f"  {name:<12} {seconds}, peak {found['gb']:.2f} GB (limit {MAX_GB:g})")
            if found["seconds"] > limit or found["gb"] > MAX_GB:
                missed.append(name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        print(f"prompts with JPEGs of 1024 x 768 pixels, a consumer of {1000 * CONSUMER_SECONDS:g} ms each")
        without, found = (
            in_a_new_process("--prepare", root, "--images", options.images, "--workers", workers)
            for workers in (0, options.workers)
        )
        for workers, rates in ((0, without), (options.workers, found)):
            what = f"{workers} workers, at most {PREFETCH_MIB} MiB" if workers else "no prefetching"
            print(
                f"  {what:<30} {rates['training']:6.1f} prompts/s in training, {rates['evaluation']:6.1f} in "
                f"evaluation, memory grew by {rates['mib']:.0f} MiB"
            )
        if found["mib"] - without["mib"] > PREFETCH_MIB + found["one_prompt_mib"] + HOLES_MIB:
            missed.append("memory of prefetching")
    from benchmarks.common import describe_load, load_line  # imports torch, which the measured processes do without

    print(load_line(describe_load(meter) | {"threads": 1 + options.workers}, "wall"))
    if missed:
        print(f"limits exceeded: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
