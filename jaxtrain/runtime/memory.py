"""Memory of the process: freed blocks that a CPU keeps between steps, and the share of a GPU that JAX reserves."""

import ctypes
import os
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


# What data sheets name, of the memory that the driver reports: 141 of 150.1 GB for an H200. The rest is for CUDA,
# cuDNN and NCCL.
_GPU_SHARE = "0.94"


def keep_freed_memory() -> bool:
    """Makes glibc's malloc retain freed blocks of up to 1 GiB, so that the process keeps its peak memory until it ends.

    XLA allocates the temporary memory of a program in one block and frees it when the program ends. glibc would return
    a block of that size to the system, so that every step faults in all pages again: 129,000 page faults per step for
    six layers of 384 channels, a fifth of the step's time.

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


def reserve_gpu_memory() -> None:
    """Makes JAX reserve the GPU memory that `plan` counts on, of which it would take 75 %. Call it before JAX starts.

    XLA_CLIENT_MEM_FRACTION, or its older name with PYTHON, sets another share.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _GPU_SHARE)
