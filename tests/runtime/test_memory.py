"""The allocator keeps freed memory; tested in a process of its own, because the setting is permanent. A GPU's share."""

import os
import sys

import pytest
from helpers import run

from jaxtrain.runtime import memory

CODE = """
import resource, sys, threading
import numpy as np
from jaxtrain.runtime.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def again():
    np.ones(100 * 2**20, np.uint8)
    before = faults()
    np.ones(100 * 2**20, np.uint8)
    print(faults() - before)

if sys.argv[1] == "keep":
    assert keep_freed_memory()
thread = threading.Thread(target=again)  # XLA's allocations come from threads
thread.start()
thread.join()
"""


def faults_of_the_second_array(how):
    # Huge pages would hide what this is about: NumPy asks for them.
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0"}
    return int(run([sys.executable, "-c", CODE, how], environment=environment))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_second_array_of_the_same_size_meets_no_new_pages():
    pages = 100 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert faults_of_the_second_array("leave") > 0.9 * pages
    assert faults_of_the_second_array("keep") < 0.01 * pages


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


def test_a_c_library_without_mallopt_is_ignored(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not memory.keep_freed_memory()


@pytest.mark.parametrize("given", [{}, {"XLA_CLIENT_MEM_FRACTION": ".3"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}])
def test_gpu_memory_is_reserved_unless_the_user_sets_a_share(given, monkeypatch):
    """JAX refuses to start with both names."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, share in given.items():
        monkeypatch.setenv(name, share)
    memory.reserve_gpu_memory()
    assert {name: os.environ[name] for name in names if name in os.environ} == (given or {names[0]: "0.94"})
    monkeypatch.delenv(names[0], raising=False)
