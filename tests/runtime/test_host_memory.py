"""The allocator keeps freed memory; tested in a process of its own, because the setting is permanent."""

import os
import sys

import pytest
from helpers import run

from jaxtrain.runtime import host_memory as hostmem

CODE = """
import resource, sys, threading
import numpy as np
from jaxtrain.runtime.host_memory import keep_freed_memory

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
    assert not hostmem.keep_freed_memory()


def test_a_c_library_without_mallopt_is_ignored(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hostmem.ctypes, "CDLL", lambda name: object())
    assert not hostmem.keep_freed_memory()
