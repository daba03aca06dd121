"""Attention in blocks with its derivative written out, against the textbook's form in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.kernels import causal


def reference(query, key, value, gradient):
    """Output and the gradients of `sum(output * gradient)`, in float64."""
    query, key, value, gradient = (np.asarray(x, np.float64) for x in (query, key, value, gradient))
    per_group = query.shape[2] // key.shape[2]
    keys, values = (np.repeat(x, per_group, axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5
    scores = np.einsum("bthk,bshk->bhts", query, keys) * scale
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    output = np.einsum("bhts,bshk->bthk", weights, values)
    on_weights = np.einsum("bthk,bshk->bhts", gradient, values)
    on_scores = weights * (on_weights - (weights * on_weights).sum(-1, keepdims=True)) * scale
    on_keys = np.einsum("bhts,bthk->bshk", on_scores, query)
    on_values = np.einsum("bhts,bthk->bshk", weights, gradient)
    by_group = [x.reshape(*key.shape[:3], per_group, -1).sum(3) for x in (on_keys, on_values)]
    return output, np.einsum("bhts,bshk->bthk", on_scores, keys), *by_group


def inputs(length, num_heads, num_groups, dtype=jnp.float32, batch=2, width=16):
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(batch, length, heads, width) for heads in (num_heads, num_groups, num_groups, num_heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@jax.jit
def with_gradients(query, key, value, gradient):
    output, derivative = jax.vjp(causal.causal_attention, query, key, value)
    return output, *derivative(gradient)


# One block; one with a ragged second; several; more than _SHORT tokens; more than _MAX_BLOCKS x _BLOCK tokens.
LENGTHS = [1, 7, 128, 200, 384, 600, 1100]


@pytest.mark.parametrize(
    ("length", "num_heads", "num_groups"),
    [*((length, 4, 2) for length in LENGTHS), (LENGTHS[-2], 2, 2), (LENGTHS[-2], 3, 1)],
)
def test_is_the_textbook_form(length, num_heads, num_groups):
    arguments = inputs(length, num_heads, num_groups, batch=1 if length > 500 else 2)
    for got, want in zip(with_gradients(*arguments), reference(*arguments), strict=True):
        assert got.dtype == jnp.float32
        bound = 1e-6 if length < 1000 else 2e-6  # sums of a thousand terms
        np.testing.assert_allclose(got, want, rtol=0, atol=bound * max(np.abs(want).max(), 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_half_precision(dtype):
    """Within 2^-6 of the largest number for bfloat16, 2^-9 for float16: weights and their gradients are rounded too."""
    arguments = inputs(200, 4, 2, dtype)
    bound = 2.0**-6 if dtype == jnp.bfloat16 else 2.0**-9
    for got, want in zip(with_gradients(*arguments), reference(*arguments), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound * np.abs(want).max())


def with_segments(query, key, value, gradient):
    segment_ids = jnp.arange(query.shape[0] * query.shape[1]).reshape(query.shape[:2]) // 70
    output, derivative = jax.vjp(causal.causal_attention, query, key, value, segment_ids)
    return output, *derivative(gradient)[:3]


def test_on_a_cpu_groups_of_rows_are_independent(monkeypatch):
    """No product has more rows than a group. There are groups for two to four blocks, 5 rows in 3 groups for two."""

    def products(lowered):
        return max(int(rows) for rows in re.findall(r"dot_general.*-> tensor<(\d+)x", lowered.as_text()))

    for length, rows in {128: 5, 500: 3, 640: 5, 200: 2}.items():
        arguments = inputs(length, 4, 2, batch=5)
        in_groups = jax.jit(with_segments).lower(*arguments)
        assert products(in_groups) == rows, length
    monkeypatch.setattr(causal, "_over_rows", lambda function, arrays, _: function(*arrays))
    whole = jax.jit(lambda *arrays: with_segments(*arrays)).lower(*arguments)
    assert products(whole) == 5
    for mine, want in zip(in_groups.compile()(*arguments), whole.compile()(*arguments), strict=True):
        np.testing.assert_allclose(mine, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_large_scores_do_not_overflow():
    query, key, value, gradient = inputs(130, 2, 2)
    for got in with_gradients(1e3 * query, 1e3 * key, value, gradient):
        assert np.isfinite(got).all()


def test_a_later_key_that_is_not_finite_changes_no_query_before_it():
    query, key, value, _ = inputs(200, 2, 2)
    before = causal.causal_attention(query, key, value)
    after = causal.causal_attention(query, key.at[:, 150].set(jnp.nan), value)
    assert (before[:, :128] == after[:, :128]).all()  # the block before never sees it
    assert not np.isnan(after[:, 128:150]).any()
    assert np.isnan(after[:, 150:]).all()


def test_most_of_the_masked_half_is_not_computed():
    """8 blocks cover 36 / 64 of the square, in 2 products of the forward pass and 5 of the backward pass."""
    length, width = 1024, 16
    arguments = inputs(length, 1, 1, batch=1, width=width)
    flops = with_gradients.lower(*arguments).compile().cost_analysis()["flops"]
    square = 2 * length * length * width
    assert flops < 7 * square * 36 / 64 * 1.35  # and what is not a product
    assert flops > 6 * square * 36 / 64


def test_no_square_is_a_residual():
    arguments = inputs(640, 2, 2, batch=1)
    _, derivative = jax.vjp(causal.causal_attention, *arguments[:3])
    kept = [leaf.size for leaf in jax.tree.leaves(derivative)]
    assert max(kept) == arguments[0].size


@pytest.mark.parametrize("length", [256, 640])
def test_a_long_square_is_recomputed(length):
    """A barrier ties the residuals to the gradient, so that the second computation waits for it.

    XLA's CPU compiler heeds it from jaxlib 0.11 on: eight such layers then take 9 MB of temporaries instead of 20.
    """
    arguments = inputs(length, 2, 2, batch=1)
    text = jax.jit(lambda *a: jax.vjp(causal.causal_attention, *a[:3])[1](a[3])).lower(*arguments).as_text()
    assert ("optimization_barrier" in text) == (length > 512)
