"""Compiler options of a chip: applied, disabled, and dropped one by one where the compiler refuses them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.runtime import compile_options
from jaxtrain.runtime.compile_options import COMPILE_OPTIONS, compile_for_chip


def lower():
    return jax.jit(lambda x: 2 * x).lower(jnp.ones(3))


@pytest.mark.parametrize(
    ("num_devices", "tune", "lines"),
    [(2, True, ["this compiler refuses xla_no_such_option: compiling without"]), (2, False, []), (1, True, [])],
)
def test_refused_options_are_dropped_with_one_line(num_devices, tune, lines, monkeypatch):
    options = {"xla_no_such_option": True, "xla_cpu_enable_fast_math": False}
    monkeypatch.setitem(compile_options.COMPILE_OPTIONS, "cpu", options)
    said = []
    compiled = compile_for_chip(lower(), np.array(jax.devices()[:num_devices]), tune=tune, report=said.append)
    assert said == lines
    np.testing.assert_array_equal(compiled(jnp.ones(3)), 2 * jnp.ones(3))


def test_options_reach_the_compiler_and_its_errors_reach_the_caller(monkeypatch):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED with {compiler_options}")

    monkeypatch.setitem(compile_options.COMPILE_OPTIONS, "cpu", {})
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED with None"):
        compile_for_chip(Lowered(), np.array(jax.devices()[:2]), tune=True, report=pytest.fail)


@pytest.mark.parametrize(
    ("platform", "traced", "has"), [("gpu", True, True), ("gpu", False, False), ("cpu", True, False)]
)
def test_a_gpu_starts_the_kernels_of_a_traced_program_one_by_one(platform, traced, has):
    """A trace of a CUDA graph does not name the instructions: `report` would count the whole step as "other"."""
    lowered = SimpleNamespace(compile=lambda compiler_options: compiler_options or {})
    devices = np.array([SimpleNamespace(platform=platform, device_kind="")])
    options = compile_for_chip(lowered, devices, tune=True, report=pytest.fail, traced=traced)
    assert options == ({"xla_gpu_enable_command_buffer": ""} if has else {})


def test_no_chip_reduces_gradients_on_its_sparse_cores():
    """All-reduces there are said to spoil models."""
    assert COMPILE_OPTIONS
    for options in COMPILE_OPTIONS.values():
        assert not any("all_reduce" in name for name in options)
