"""The linear layer against x @ kernel + bias in float64, for both forms of its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.kernels.linear import _concatenated, _separate, linear, linear_parts

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


@pytest.mark.parametrize("use_bias", [True, False])
def test_parts_equal_separate_layers(use_bias):
    x, parts = parts_of(use_bias)

    def run(function):
        loss = lambda x, parts: sum(jnp.sum(jnp.sin(y)) for y in function(x, parts))  # noqa: E731
        return jax.jit(function)(x, parts), jax.jit(jax.grad(loss, (0, 1)))(x, parts)

    expected = run(_separate)
    for function in (linear_parts, _concatenated):
        for actual, wanted in zip(*map(jax.tree.leaves, (run(function), expected)), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("cuda", 1), ("tpu", 3)])
def test_the_kernels_are_concatenated_except_on_tpus(platform, products):
    x, parts = parts_of(True)
    text = jax.jit(linear_parts).trace(x, parts).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("dot_general") == products
