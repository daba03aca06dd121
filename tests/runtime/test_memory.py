"""The allocator keeps freed memory; tested in a process of its own, because the setting is permanent. A GPU's share."""

import os
import sys
import types

import pytest
from helpers import run

from jaxtrain.runtime import memory

CODE = """
import resource, sys, threading
import numpy as np
from jaxtrain.runtime.memory import keep_freed_memory, share_arena

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def again():
    np.ones(100 * 2**20, np.uint8)
    before = faults()
    np.ones(100 * 2**20, np.uint8)
    print(faults() - before)

if "share" in sys.argv:
    assert share_arena()
if "keep" in sys.argv:
    assert keep_freed_memory()
if "thread" in sys.argv:
    thread = threading.Thread(target=again)
    thread.start()
    thread.join()
else:
    again()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize(
    ("words", "faults"),
    [("", True), ("keep", False), ("thread keep", True), ("thread keep share", False), ("thread share", True)],
)
def test_a_second_array_of_the_same_size_meets_no_new_pages(words, faults):
    # Huge pages would hide what this is about: NumPy asks for them.
    environment = {**os.environ, "NUMPY_MADVISE_HUGEPAGE": "0", "JAX_PLATFORMS": "cpu"}
    share = int(run([sys.executable, "-c", CODE, *words.split()], environment=environment)) / 2**20 / 100
    pages = share * os.sysconf("SC_PAGE_SIZE")
    assert pages > 0.9 if faults else pages < 0.01


PROGRAM = """
import resource, statistics
import jax, jax.numpy as jnp
from jaxtrain.runtime.cluster import session

with session(lambda error: 1):
    x, weights = jnp.ones((5000, 5000)), jnp.ones(5000)
    program = jax.jit(lambda x, weights: jnp.sin(x) @ weights).lower(x, weights).compile()
    faults = []
    for _ in range(30):
        weights, last = program(x, weights), weights
        last.block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
new = [after - before for before, after in zip(faults[-11:], faults[-10:])]
print(program.memory_analysis().temp_size_in_bytes, int(statistics.median(new)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_in_a_session_a_program_finds_its_temporary_memory_again():
    size, faults = map(int, run([sys.executable, "-c", PROGRAM], environment=dict(os.environ)).split())
    assert size > 64 * 2**20  # more than any arena but the main one holds
    assert faults < 0.01 * size / os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("given", [None, "true", "false"])
def test_a_cpu_executes_inline_unless_the_user_decides(given, monkeypatch):
    settings = {}
    monkeypatch.setattr(memory.jax, "config", types.SimpleNamespace(update=settings.__setitem__))
    monkeypatch.delenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", raising=False)
    if given:
        monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", given)
    memory.execute_inline()
    assert settings == ({} if given else {"jax_cpu_enable_async_dispatch": False})


@pytest.mark.parametrize(
    ("platforms", "installed", "shared"),
    [
        (None, (), True),
        ("", (), True),
        ("cpu", ("jax_plugins", "libtpu"), True),
        ("cpu,cuda", ("jax_plugins",), True),
        ("cuda,cpu", (), False),
        (None, ("jax_plugins",), False),
        (None, ("libtpu",), False),
    ],
)
def test_threads_share_an_arena_where_a_cpu_is_named_or_alone(platforms, installed, shared, monkeypatch):
    settings = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(memory.jax, "config", types.SimpleNamespace(jax_platforms=platforms))
    library = types.SimpleNamespace(mallopt=lambda *setting: settings.append(setting) or 1)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: library)
    assert memory.share_arena() is shared
    assert bool(settings) is shared


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
