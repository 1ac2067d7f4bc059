"""The machine to estimate for: a card from the table, rates given by the user, or this machine, benchmarked.

Imports torch only to benchmark.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from medvqa_rl.config import Config
from medvqa_rl.core.text import number_of
from medvqa_rl.models.dimensions import uses_bfloat16

GIB = 2**30


class Rates(NamedTuple):
    """Peak throughput of a machine."""

    flops: float
    """FLOP/s of matrix products in the dtype of the weights."""
    bandwidth: float
    """Bytes per second, reads and writes added up."""


@dataclass(frozen=True)
class Machine:
    """A device that trains."""

    name: str
    rates: Rates
    memory: float
    """Bytes."""
    is_gpu: bool
    source: str
    """Where the rates come from, as a phrase."""


CARDS = {
    # name: (full name, dense bfloat16 TFLOP/s with float32 accumulation, GB/s, GB)
    "h200": ("NVIDIA H200 SXM", 989, 4800, 141),
    "h100": ("NVIDIA H100 SXM", 989, 3350, 80),
    "h100-pcie": ("NVIDIA H100 PCIe", 756, 2000, 80),
    "a100-80": ("NVIDIA A100 SXM 80 GB", 312, 2039, 80),
    "a100-40": ("NVIDIA A100 40 GB", 312, 1555, 40),
    "l40s": ("NVIDIA L40S", 362, 864, 48),
    "a6000": ("NVIDIA RTX A6000", 155, 768, 48),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 165, 1008, 24),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 71, 936, 24),
    "a10": ("NVIDIA A10", 125, 600, 24),
    "l4": ("NVIDIA L4", 121, 300, 24),
}
"""From the vendor's data sheets, without sparsity. A card sold with N GB has N GiB minus the driver's share."""


def find_machine(
    config: Config,
    *,
    device: str,
    card_name: str | None,
    tflops: float | None,
    bandwidth: float | None,
    memory_gib: float | None,
) -> Machine:
    """Choose the machine to estimate for; values that are given replace those of a card or a benchmark.

    Raises:
        ValueError: the card is unknown, or there is no GPU to benchmark.
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
        machine = benchmark(wanted, is_bfloat16=uses_bfloat16(config.model.dtype, wanted))
    rates = Rates(
        machine.rates.flops if tflops is None else tflops * 1e12,
        machine.rates.bandwidth if bandwidth is None else bandwidth * 1e9,
    )
    source = machine.source if given == (None, None, None) or machine.source == "as given" else "partly as given"
    memory = machine.memory if memory_gib is None else memory_gib * GIB
    return Machine(machine.name, rates, memory, machine.is_gpu, source)


def card(name: str) -> Machine:
    """Look up a card by its short name.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in CARDS:
        raise ValueError(
            f"There is no card {name!r} in the table: choose one of {', '.join(CARDS)}, or give --matmul-tflops, "
            "--bandwidth-gbs and --memory-gib of yours."
        )
    full_name, tflops, bandwidth, memory = CARDS[name]
    rates = Rates(tflops * 1e12, bandwidth * 1e9)
    return Machine(full_name, rates, memory * GIB, True, "the vendor's figures for dense bfloat16, not measured")


def benchmark(device: str, *, is_bfloat16: bool) -> Machine:
    """Measure this machine: the best of several products of square matrices, and copies of a large tensor.

    Args:
        device: ``cpu`` or ``cuda``.

    Raises:
        ValueError: there is no CUDA device.
    """
    import torch

    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(
            "This torch sees no CUDA device to measure: name a card with --card (such as --card a100-40), or give "
            "--matmul-tflops, --bandwidth-gbs and --memory-gib."
        )
    size, length = (8192, 2**28) if on_gpu else (1024, 2**24)
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in "ab")
    product = torch.empty_like(a)
    source = torch.ones(length, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def best_time(run: Callable[[], object]) -> float:
        times: list[float] = []
        until = time.perf_counter() + 1.0
        while len(times) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    rates = Rates(
        flops=2 * size**3 / best_time(lambda: torch.mm(a, b, out=product)),
        bandwidth=2 * 4 * length / best_time(lambda: target.copy_(source)),
    )
    if on_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Machine(properties.name, rates, properties.total_memory, True, "measured just now")
    name = f"CPU with {number_of(torch.get_num_threads(), 'thread')}"
    return Machine(name, rates, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False, "measured just now")
