"""Reuse of freed host memory between train steps on CPUs.

XLA allocates the temporary memory of a program in one block and frees it when the program ends. glibc returns a block
of that size to the system, so every step faults in all pages again: 129,000 page faults per step for six layers of 384
channels, a fifth of the step's time.
"""

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory() -> bool:
    """Makes glibc's malloc retain freed blocks of up to 1 GiB, so that the process keeps its peak memory until it ends.

    All threads share one arena, because only the main arena holds large blocks. Returns False with other C libraries
    (macOS, musl), where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])
