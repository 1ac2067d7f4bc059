"""Memory of the process: let glibc keep what is freed, in one heap."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Reuse freed tensors instead of returning them to the system, on Linux with glibc; elsewhere nothing happens.

    Training on a CPU frees and allocates the same large tensors at every step. By default each goes back to the
    kernel and comes again page by page, which can take most of a step. The price is that the process stays at its
    highest use of memory.

    All threads share one heap. By default each has its own, and what one thread allocates and another frees, as
    prefetched images are, leaves holes in all of them: half as much again as the images take.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)
    mallopt(_M_ARENA_MAX, 1)
