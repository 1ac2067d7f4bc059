"""What machines can do: figures that vendors publish for common cards, and a few seconds' measurement of this one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from medvqa_rl.learning.estimate.pace import Rates

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A device that trains."""

    name: str
    rates: Rates
    memory: float
    """Bytes."""
    is_gpu: bool
    source: str
    """Where the rates are known from, as a phrase."""


CARDS = {
    # name: (what it is, dense bfloat16 TFLOP/s with float32 accumulation, GB/s, GB)
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
"""From the vendor's data sheets, without sparsity. Memory is sold in GB that are GiB up to the driver's share."""


def card(name: str) -> Machine:
    """A card by its short name.

    Raises:
        ValueError: it is not in the table.
    """
    if name not in CARDS:
        raise ValueError(
            f"There is no card {name!r} in the table: choose one of {', '.join(CARDS)}, or give --matmul-tflops, "
            "--bandwidth-gbs and --memory-gib of yours."
        )
    what, tflops, bandwidth, memory = CARDS[name]
    rates = Rates(tflops * 1e12, bandwidth * 1e9)
    return Machine(what, rates, memory * GIB, True, "the vendor's figures for dense bfloat16, not measured")


def measure(device: str, *, use_bfloat16: bool) -> Machine:
    """Measure this machine's rates: products of square matrices and copies of a large tensor, the best of some runs.

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
    a, b = (
        torch.ones(size, size, dtype=torch.bfloat16 if use_bfloat16 else torch.float32, device=device) for _ in "ab"
    )
    product = torch.empty_like(a)
    source = torch.ones(length, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)

    def best(run: Callable[[], object]) -> float:
        times: list[float] = []
        until = time.perf_counter() + 1.0
        while len(times) < 3 or time.perf_counter() < until:
            began = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    rates = Rates(
        2 * size**3 / best(lambda: torch.mm(a, b, out=product)), 2 * 4 * length / best(lambda: target.copy_(source))
    )
    if on_gpu:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Machine(properties.name, rates, properties.total_memory, True, "measured just now")
    name = f"CPU with {torch.get_num_threads()} threads"
    return Machine(name, rates, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False, "measured just now")
