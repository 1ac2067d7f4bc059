"""Rates of loading: a large table, its index, and decoding images ahead.

    python -m benchmarks.data                 # 200,000 rows, 400 images
    python -m benchmarks.data --rows 2000 --images 20

Writes a table in PMC-VQA's form and its image files into a temporary folder, then loads it in fresh processes: the
first reads the table, the second the index. Then decodes JPEGs of 1024 x 768 pixels one after the other and ahead of
a consumer that takes its time, each in a fresh process, its memory set up as the command does it. Prints seconds and
peak memory; exits with 1 where a limit is missed.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from medvqa_rl.config import DataConfig
from medvqa_rl.core.memory import keep_freed_memory
from medvqa_rl.core.types import Sample
from medvqa_rl.data import load_dataset
from medvqa_rl.data.images.files import FileImage
from medvqa_rl.data.images.prefetch import BYTES_PER_PIXEL, prefetch

MAX_SECONDS_FIRST = 20.0
MAX_SECONDS_SECOND = 2.0
MAX_GB = 1.5
PREFETCH_BYTES = 64 * 2**20
ONE_IMAGE_MIB = 2 * BYTES_PER_PIXEL * 1024 * 768 / 2**20
"""While it is decoded, and once more for its copy: what may go ahead beyond the bound."""
HOLES_MIB = 4.0
"""What the allocator may lose to holes between images."""
CONSUMER_SECONDS = 0.01
"""What a step of the consumer takes; it sleeps, as a CPU does that waits for a GPU."""

COLUMNS = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label")


def write_table(root: Path, rows: int) -> None:
    """``rows`` questions about as many images, three to an article."""
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


def write_images(root: Path, count: int) -> list[Sample]:
    """Photographs of noise, which compress badly, as medical images do."""
    generator = np.random.default_rng(0)
    samples = []
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (96, 128, 3), dtype=np.uint8))
        coarse.resize((1024, 768)).save(root / f"{index}.jpg", quality=90)
        samples.append(Sample(str(index), "Q?", "yes", "closed", (FileImage(f"{index}.jpg", root),)))
    return samples


def decode(root: Path, count: int, workers: int) -> dict[str, float]:
    """Use every image once; with no workers each is decoded when it is needed."""
    samples = [Sample(str(i), "Q?", "yes", "closed", (FileImage(f"{i}.jpg", root),)) for i in range(count)]
    keep_freed_memory()
    samples[0].images[0].load()
    before = peak_bytes()
    began = time.perf_counter()
    for sample in prefetch(samples, workers=workers, max_bytes=PREFETCH_BYTES) if workers else samples:
        sample.images[0].load()
        time.sleep(CONSUMER_SECONDS)
    return {"seconds": time.perf_counter() - began, "mib": (peak_bytes() - before) / 2**20}


def peak_bytes() -> int:
    """The most memory that this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_a_new_process(*arguments: object) -> dict[str, float]:
    """The numbers that this program prints when started with these arguments."""
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
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    children: list[tuple[Path | None, Callable[[Path], dict[str, float]]]] = [
        (options.load, load),
        (options.decode, lambda root: decode(root, options.images, options.workers)),
    ]
    for root, measure in children:
        if root is not None:
            print(json.dumps(measure(root)))
            return 0
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_table(root, options.rows)
        size = (root / "train.csv").stat().st_size / 1e6
        print(f"table of {options.rows:,} rows, {size:.0f} MB, as many image files")
        for name, limit in (("first load", MAX_SECONDS_FIRST), ("second load", MAX_SECONDS_SECOND)):
            found = in_a_new_process("--load", root)
            seconds = f"{found['seconds']:6.2f} s (limit {limit:g}; {found['cpu']:.2f} s of the processor)"
            print(f"  {name:<12} {seconds}, peak {found['gb']:.2f} GB (limit {MAX_GB:g})")
            if found["seconds"] > limit or found["gb"] > MAX_GB:
                missed.append(name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        print(f"{options.images} JPEGs of 1024 x 768, a consumer of {1000 * CONSUMER_SECONDS:g} ms each")
        without = 0.0
        for workers in (0, options.workers):
            found = in_a_new_process("--decode", root, "--images", options.images, "--workers", workers)
            rate = options.images / found["seconds"]
            what = f"{workers} workers, at most {PREFETCH_BYTES // 2**20} MiB waiting" if workers else "without"
            print(f"  prefetch {what:<34} {rate:6.1f} images/s, memory grew by {found['mib']:.0f} MiB")
            if not workers:
                without = found["mib"]
            elif found["mib"] - without > PREFETCH_BYTES / 2**20 + ONE_IMAGE_MIB + HOLES_MIB:
                missed.append("memory of prefetching")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
