"""The TPU's attention kernel, its Python run on the CPU: the same function as the plain one; it lowers for a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models import splash
from jaxtrain.models.attention import attend, choose_kernel


def inputs(length, num_heads, num_groups, batch_size=2, width=8):
    rng = np.random.default_rng(length)
    heads = (num_heads, num_groups, num_groups, num_heads)  # queries, keys, values and a cotangent
    return [rng.normal(size=(batch_size, length, n, width)).astype(np.float32) for n in heads]


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, query, key, value, cotangent):
    output, pullback = jax.vjp(function, query, key, value)
    return output, *pullback(cotangent)


@pytest.mark.parametrize(
    ("length", "num_heads", "num_groups", "batch_size"),
    [(128, 4, 2, 2), (256, 2, 2, 1), (384, 4, 1, 1), (1024, 2, 1, 1)],
)
def test_kernel_agrees_with_plain_attention(length, num_heads, num_groups, batch_size):
    """Output and gradients in float32; lengths of one block, of several, and with longer blocks of keys."""
    arguments = inputs(length, num_heads, num_groups, batch_size)
    actual = output_and_gradients(functools.partial(splash.attend, interpret=True), *arguments)
    expected = output_and_gradients(functools.partial(attend, kernel="xla"), *arguments)
    for a, b in zip(actual, expected, strict=True):
        assert np.abs(a - b).max() < 3e-6 * np.abs(b).max()


def test_a_query_sees_no_later_key():
    query, key, value, _ = inputs(256, 2, 1, 1)
    attention = jax.jit(functools.partial(splash.attend, interpret=True))
    before = attention(query, key, value)
    after = attention(query, *(np.concatenate([x[:, :200], 1 + x[:, 200:]], axis=1) for x in (key, value)))
    np.testing.assert_array_equal(before[:, :200], after[:, :200])
    assert (before[:, 200:] != after[:, 200:]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize("length", [64, 200])
def test_a_length_that_is_no_multiple_of_the_blocks_is_an_error(length):
    query, key, value, _ = inputs(length, 2, 1)
    with pytest.raises(ValueError, match=f'"splash" wants a multiple of 128 tokens, got {length}: use "xla"'):
        attend(query, key, value, kernel="splash")


def test_cached_keys_are_an_error():
    query, key, value, _ = inputs(128, 2, 1)
    with pytest.raises(ValueError, match='"splash" takes no positions: use "xla"'):
        attend(query, key, value, jnp.zeros((2, 128), jnp.int32), kernel="splash")


@pytest.mark.parametrize("width", [64, 128])
def test_it_lowers_for_a_tpu_from_here(width):
    """Forward and backward are one kernel each, and no scores [T, T] are left."""
    query, key = (jax.ShapeDtypeStruct((2, 1024, n, width), jnp.bfloat16) for n in (4, 2))

    def loss(query, key, value):
        return jnp.sum(attend(query, key, value, kernel="splash").astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert "1024x1024" not in text


@pytest.mark.parametrize(
    ("platform", "seq_len", "kernel"),
    [("tpu", 4096, "splash"), ("tpu", 128, "splash"), ("tpu", 200, "xla"), ("cpu", 4096, "xla"), ("gpu", 4096, "xla")],
)
def test_the_kernel_is_chosen_by_platform_and_length(platform, seq_len, kernel):
    assert choose_kernel(platform, seq_len) == kernel
