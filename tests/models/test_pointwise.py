"""The pointwise functions against jax.nn in float64, and their residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.kernels.pointwise import gelu, norm, swiglu

EPS = 1e-5


def plain_gelu(x, bias=None):
    return jax.nn.gelu(x if bias is None else x + bias[None, None], approximate=True)


def plain_swiglu(x, gate):
    return x * jax.nn.silu(gate)


def plain_layernorm(x, scale, bias=None):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    y = centred / jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPS) * scale[None, None]
    return y if bias is None else y + bias[None, None]


def plain_rmsnorm(x, scale):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS) * scale[None, None]


FORMS = {
    "gelu": (gelu, plain_gelu, 1, 0),
    "gelu with bias": (gelu, plain_gelu, 1, 1),
    "swiglu": (swiglu, plain_swiglu, 2, 0),
    "layernorm": (lambda x, s, b: norm(x, s, b, EPS, True), plain_layernorm, 1, 2),
    "layernorm without bias": (lambda x, s: norm(x, s, None, EPS, True), plain_layernorm, 1, 1),
    "rmsnorm": (lambda x, s: norm(x, s, None, EPS, False), plain_rmsnorm, 1, 1),
}


def arguments_of(name, dtype=jnp.float32):
    """Arrays `[3, 5, 64]` and vectors `[64]`, and the gradient of the result; the arrays are not centred."""
    _, _, num_arrays, num_vectors = FORMS[name]
    keys = jax.random.split(jax.random.key(num_arrays + 7 * num_vectors), 5)
    shapes = [(3, 5, 64)] * num_arrays + [(64,)] * num_vectors + [(3, 5, 64)]
    made = [jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=False)]
    return [(x * 2 + 0.5).astype(dtype) for x in made]


def with_gradients(function, arguments, gradient):
    output, derivative = jax.vjp(function, *arguments)
    return output, *derivative(gradient)


def in_float64(name, arguments):
    with jax.enable_x64(True):
        *inputs, gradient = (jnp.asarray(np.asarray(x, np.float64)) for x in arguments)
        return [np.asarray(x) for x in with_gradients(FORMS[name][1], inputs, gradient)]


@pytest.mark.parametrize("name", FORMS)
def test_is_the_plain_form_and_its_derivative(name):
    *inputs, gradient = arguments_of(name)
    got = jax.jit(lambda inputs, gradient: with_gradients(FORMS[name][0], inputs, gradient))(inputs, gradient)
    for x, want in zip(got, in_float64(name, [*inputs, gradient]), strict=True):
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("name", FORMS)
def test_in_bfloat16_only_operands_and_results_are_rounded(name):
    """One rounding of the result, 2^-9 relative, on exactly the bfloat16 operands; sums over tokens are float32."""
    *inputs, gradient = arguments_of(name, jnp.bfloat16)
    got, wanted = with_gradients(FORMS[name][0], inputs, gradient), in_float64(name, [*inputs, gradient])
    if name == "gelu with bias":  # the bias takes the sum of the rounded gradient, like that of a linear layer
        wanted[2] = np.asarray(got[1], np.float64).sum(axis=(0, 1))
    for x, want in zip(got, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(x, np.float64), want, rtol=1.01 * 2.0**-8, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", FORMS)
def test_residuals_are_the_inputs_and_numbers_of_rows(name):
    *inputs, gradient = arguments_of(name)
    _, derivative = jax.vjp(FORMS[name][0], *inputs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(derivative))
    assert kept <= sum(x.size for x in inputs) + 2 * gradient.size // gradient.shape[-1]


@pytest.mark.parametrize("name", FORMS)
def test_the_compiler_may_not_merge_both_computations(name):
    *inputs, gradient = arguments_of(name)
    lowered = jax.jit(lambda inputs, gradient: with_gradients(FORMS[name][0], inputs, gradient)).lower(inputs, gradient)
    assert lowered.as_text().count("optimization_barrier") == 1


def test_far_out_gelu_is_flat_or_straight():
    x = jnp.array([-1e4, -50.0, 50.0, 1e4])
    output, slope = with_gradients(gelu, [x], jnp.ones(4))
    np.testing.assert_array_equal(output, [0.0, 0.0, 50.0, 1e4])
    np.testing.assert_array_equal(slope, [0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 1), ("cuda", 2)])
def test_a_gpu_stores_the_gradient_of_gelu_in_its_own_dtype(platform, barriers):
    """For the sum over the tokens too, which XLA would form from a float32 copy; one barrier is the recomputation's."""
    loss = lambda x, bias: jnp.sum(gelu(x, bias).astype(jnp.float32))  # noqa: E731
    traced = jax.jit(jax.grad(loss, (0, 1))).trace(jnp.ones((2, 4), jnp.bfloat16), jnp.ones(4, jnp.bfloat16))
    assert traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier") == barriers
