"""Memory of the process: freed blocks that a CPU keeps between steps, and the share of a GPU that JAX reserves."""

import ctypes
import importlib.util
import os
import sys

import jax

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


# What data sheets name, of the memory that the driver reports: 141 of 150.1 GB for an H200. The rest is for CUDA,
# cuDNN and NCCL.
_GPU_SHARE = "0.94"


def expects_cpu() -> bool:
    """Returns True if JAX will run on a CPU: JAX_PLATFORMS says so, or no other platform is installed."""
    if names := jax.config.jax_platforms:
        return names.startswith("cpu")
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))


def keep_freed_memory() -> bool:
    """Makes glibc's malloc retain freed blocks of up to 1 GiB, so that the process keeps its peak memory until it ends.

    XLA allocates the temporary memory of a program in one block and frees it when the program ends. glibc would return
    a block of that size to the system, so that every step faults in all pages again. The process keeps about three
    such blocks: the next step starts before the last one ends, and fragments spoil a block.

    All threads share one arena, because only the main arena holds large blocks; they then wait for each other's small
    allocations, which slows small steps and compilation. Call it before JAX starts: XLA's threads keep an arena that
    they already have. Returns False with other C libraries (macOS, musl), where nothing changes.
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
