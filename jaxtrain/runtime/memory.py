"""Memory of the process: freed blocks that a CPU keeps between steps, and the share of a GPU that JAX reserves."""

import ctypes
import os
import sys

import jax

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

# What data sheets name, of the memory that the driver reports: 141 of 150.1 GB for an H200. The rest is for CUDA,
# cuDNN and NCCL.
_GPU_SHARE = "0.94"


def execute_inline() -> None:
    """Makes a CPU execute each program in the thread that calls it. Call it before JAX starts.

    JAX would hand the program to a thread of its own, which costs a step time, and whose malloc arena holds no block
    of more than 64 MiB (`keep_freed_memory`). JAX_CPU_ENABLE_ASYNC_DISPATCH decides instead if it is set. Several
    devices of one process, and other platforms, execute as before.
    """
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> bool:
    """Makes glibc's malloc retain freed blocks of up to 1 GiB, so that the process keeps its peak memory until it ends.

    XLA allocates the temporary memory of a program in one block and frees it when the program ends. glibc would return
    a large block to the system, so that every step faults in all pages again. The main thread's arena holds blocks of
    any size, those of other threads up to 64 MiB: see `execute_inline`. Returns False with other C libraries (macOS,
    musl), where nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(name, value) == 1 for name, value in ((_M_MMAP_THRESHOLD, 2**30), (_M_TRIM_THRESHOLD, -1))])


def reserve_gpu_memory() -> None:
    """Makes JAX reserve the GPU memory that `plan` counts on, of which it would take 75 %. Call it before JAX starts.

    XLA_CLIENT_MEM_FRACTION, or its older name with PYTHON, sets another share.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _GPU_SHARE)
