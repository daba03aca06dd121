"""Memory of the process: freed blocks that a CPU keeps between steps, and the share of a GPU that JAX reserves."""

import ctypes
import importlib.util
import os
import sys

import jax

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

ARENA_BYTES = 64 * 2**20  # what an arena of malloc holds in one block, except the main thread's

# What data sheets name, of the memory that the driver reports: 141 of 150.1 GB for an H200. The rest is for CUDA,
# cuDNN and NCCL.
_GPU_SHARE = "0.94"


def execute_inline() -> None:
    """Makes a CPU execute each program in the thread that calls it. Call it before JAX starts.

    JAX would hand the program to a thread of its own, which takes longer, and whose arena of malloc keeps no large
    block (`keep_freed_memory`). JAX_CPU_ENABLE_ASYNC_DISPATCH decides instead if it is set. Several devices of one
    process, and other platforms, execute as before.
    """
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def share_arena() -> bool:
    """Makes all threads allocate from malloc's main arena if JAX will run on a CPU. Call it before JAX starts.

    For products with a matrix of over `ARENA_BYTES`: XLA's threads allocate blocks of that size to reorder it, which
    only the main arena keeps (`keep_freed_memory`). The threads then wait for each other, which slows compilation.
    Returns False on another platform and with another C library, where nothing changes.
    """
    names = jax.config.jax_platforms
    alone = not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return (names.startswith("cpu") if names else alone) and _set_malloc({_M_ARENA_MAX: 1})


def keep_freed_memory() -> bool:
    """Makes glibc's malloc retain freed blocks, so that the process keeps its peak memory until it ends.

    XLA allocates the temporary memory of a program in one block and frees it when the program ends. glibc would return
    a large block to the system, so that every step faults in all pages again. The main thread's arena keeps blocks of
    any size, those of other threads up to `ARENA_BYTES`. Fragments between them make the peak larger than it would be.
    Returns False with other C libraries (macOS, musl), where nothing changes.
    """
    return _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def _set_malloc(settings: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and all([mallopt(*setting) == 1 for setting in settings.items()])


def reserve_gpu_memory() -> None:
    """Makes JAX reserve the GPU memory that `plan` counts on, of which it would take 75 %. Call it before JAX starts.

    XLA_CLIENT_MEM_FRACTION, or its older name with PYTHON, sets another share.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _GPU_SHARE)
