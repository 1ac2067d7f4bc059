"""Memory allocation of the process."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the kernel. Does nothing on other systems.

    Training on a CPU frees and allocates the same large tensors at every step. By default glibc returns each one to
    the kernel and gets it back page by page, which can take most of a step. The cost: the process keeps its peak
    memory.

    All threads also share one heap. With glibc's heap per thread, images that one thread allocates and another frees
    fragment every heap and take half as much memory again.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)
    mallopt(_M_ARENA_MAX, 1)
