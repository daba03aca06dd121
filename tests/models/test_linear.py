"""The linear layer against x @ kernel + bias in float64, for both forms of its gradient."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.kernels.linear import (
    _concatenated,
    _merge,
    _merge_flat,
    _separate,
    linear,
    merge_heads,
    project_heads,
)

SHAPES = {"widening": (24, 96), "square": (48, 48), "narrowing": (96, 24)}


def arguments_of(num_inputs, num_outputs, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(num_inputs), 4)
    shapes = [(3, 5, num_inputs), (num_inputs, num_outputs), (num_outputs,), (3, 5, num_outputs)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(function, x, kernel, bias, gradient):
    output, derivative = jax.vjp(function, x, kernel, bias)
    return output, *derivative(gradient)


def in_float64(arguments):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        return [np.asarray(x) for x in with_gradients(lambda x, kernel, bias: x @ kernel + bias[None, None], *wide)]


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape, dtype, bound):
    """bfloat16: the output is rounded twice, once before the bias is added."""
    arguments = arguments_of(*SHAPES[shape], dtype)
    found = jax.jit(lambda *a: with_gradients(lambda x, k, b: linear(x, (k, b)), *a))(*arguments)
    for ours, exact in zip(found, in_float64(arguments), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=bound * np.abs(exact).max())


@pytest.mark.parametrize(("platform", "turned"), [("cpu", {"narrowing"}), ("tpu", set()), ("cuda", set())])
def test_only_a_cpu_turns_the_gradient_of_a_narrowing_kernel(platform, turned):
    """Elsewhere it would cost a copy of the kernel."""

    def lowered(shape):
        traced = jax.jit(lambda *a: with_gradients(lambda x, k, b: linear(x, (k, b)), *a)).trace(*arguments_of(*shape))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert {name for name, shape in SHAPES.items() if "optimization_barrier" in lowered(shape)} == turned


def parts_of(use_bias):
    keys = jax.random.split(jax.random.key(0), 7)
    sizes = (8, 4, 4)
    kernels = [jax.random.normal(key, (6, size)) for key, size in zip(keys, sizes, strict=False)]
    biases = [jax.random.normal(key, (size,)) if use_bias else None for key, size in zip(keys[3:], sizes, strict=False)]
    return jax.random.normal(keys[6], (2, 5, 6)), list(zip(kernels, biases, strict=True))


def plain(x, kernel, bias):
    y = jnp.tensordot(x, kernel, 1)
    return y if bias is None else y + bias[None, None]


@pytest.mark.parametrize("use_bias", [True, False])
def test_projected_heads_equal_separate_layers_in_every_form(use_bias):
    x, parts = parts_of(use_bias)

    def run(function):
        loss = lambda x, parts: sum(jnp.sum(jnp.sin(y)) for y in function(x, parts))  # noqa: E731
        return jax.jit(function)(x, parts), jax.jit(jax.grad(loss, (0, 1)))(x, parts)

    expected = run(lambda x, parts: [plain(x, *weights).reshape(2, 5, -1, 2) for weights in parts])
    for form in (project_heads, _separate, _concatenated):
        for actual, wanted in zip(*map(jax.tree.leaves, (run(partial(form, width=2)), expected)), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_merged_heads_equal_a_layer_of_all_channels_in_every_form():
    x = jax.random.normal(jax.random.key(1), (2, 5, 3, 4))
    kernel, bias = jax.random.normal(jax.random.key(2), (12, 8)), jax.random.normal(jax.random.key(3), (8,))

    def run(function, bias):
        loss = lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, bias)))  # noqa: E731
        return jax.jit(function)(x, kernel, bias), *jax.jit(jax.grad(loss, (0, 1)))(x, kernel)

    expected = {use: run(lambda x, *w: plain(x.reshape(2, 5, 12), *w), bias if use else None) for use in (True, False)}
    forms = [(lambda x, *weights: merge_heads(x, weights), use) for use in (True, False)]
    forms += [(lambda x, kernel, _, form=form: form(x, kernel), False) for form in (_merge, _merge_flat)]
    for form, use in forms:
        for actual, wanted in zip(run(form, bias if use else None), expected[use], strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("cuda", 1), ("tpu", 3)])
def test_the_kernels_are_concatenated_except_on_tpus(platform, products):
    x, parts = parts_of(True)
    text = jax.jit(partial(project_heads, width=2)).trace(x, parts).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("dot_general") == products


@pytest.mark.parametrize(("platform", "stored"), [("cpu", 0), ("cuda", 1)])
def test_a_gpu_concatenates_the_gradient_of_the_heads_once(platform, stored):
    x, parts = parts_of(True)
    loss = lambda x, parts: sum(jnp.sum(jnp.sin(y)) for y in project_heads(x, parts, 2))  # noqa: E731
    text = jax.jit(jax.grad(loss, (0, 1))).trace(x, parts).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"optimization_barrier .*tensor<2x5x16xf32>", text)) == stored
