"""Cross-entropy against float64 numpy: every combination of terms, extreme logits and narrow dtypes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses_reference import TOKENS, VOCAB, assert_close, dense_nll, logsumexp, oracle, parts, softmax

from jaxtrain.loss_head import _one_pass, _two_passes
from jaxtrain.losses import cross_entropy, linear_cross_entropy

TERMS = [
    {"z_loss": z_loss, "label_smoothing": smoothing, "logit_softcap": softcap}
    for z_loss in (0.0, 0.01)
    for smoothing in (0.0, 0.1)
    for softcap in (None, 3.0)
]


def test_gradient_is_softmax_minus_onehot(example):
    hidden, kernel, labels, _ = example
    logits = hidden @ kernel
    loss, gradient = dense_nll(logits, labels)
    probabilities = softmax(np.float64(logits))
    assert_close(gradient, probabilities - np.eye(VOCAB)[labels])
    assert_close(loss, -np.log(probabilities[np.arange(TOKENS), labels]).sum())


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_dense_matches_float64(example, terms):
    """Every combination of z-loss, smoothing and soft-cap, with float weights."""
    hidden, kernel, labels, weights = example
    logits = hidden @ kernel

    def loss(logits):
        sums = cross_entropy(logits, labels, where=weights, **terms)
        return sums.total(), sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(logits)
    expected_sums, expected_gradient = oracle(logits, labels, weights, **terms)
    np.testing.assert_allclose(parts(sums), expected_sums, rtol=1e-6)
    assert sums.weight == weights.sum()
    assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(
    ("terms", "chunk_size"),
    [(terms, 4) for terms in TERMS] + [(TERMS[-1], size) for size in (7, TOKENS, None)],
    ids=str,
)
def test_linear_matches_float64(example, terms, chunk_size):
    """Values and gradients, with chunks that do and do not divide the tokens."""
    hidden, kernel, labels, weights = example

    def loss(hidden, kernel):
        sums = linear_cross_entropy(hidden, kernel, labels, where=weights, chunk_size=chunk_size, **terms)
        return sums.total(), sums

    gradients, sums = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    expected_sums, on_logits = oracle(hidden @ kernel, labels, weights, **terms)
    np.testing.assert_allclose(parts(sums), expected_sums, rtol=1e-6)
    assert sums.weight == weights.sum()
    assert_close(gradients[0], on_logits @ kernel.T)
    assert_close(gradients[1], hidden.T @ on_logits)


@pytest.mark.parametrize("scales", [(2.0, -3.0, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.25, 0.25, 0.25)], ids=str)
def test_parts_may_be_weighed_differently(example, scales):
    """Unequal cotangents of nll, z-loss and smoothing, for which the precomputed gradients cannot serve."""
    hidden, kernel, labels, weights = example
    terms = {"z_loss": 0.01, "label_smoothing": 0.1}

    def loss(hidden, kernel):
        sums = parts(linear_cross_entropy(hidden, kernel, labels, where=weights, chunk_size=4, **terms))
        return jnp.dot(jnp.array(scales, jnp.float32), sums)

    gradients = jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    _, on_logits = oracle(hidden @ kernel, labels, weights, scales, **terms)
    assert_close(gradients[0], on_logits @ kernel.T)
    assert_close(gradients[1], hidden.T @ on_logits)


def test_dense_has_forward_mode_and_second_derivatives(example):
    hidden, kernel, labels, _ = example
    logits = jnp.asarray((hidden @ kernel)[:1])
    p = np.exp(np.float64(logits[0])) / np.exp(np.float64(logits[0])).sum()
    hessian = jax.jit(jax.hessian(lambda x: cross_entropy(x[None], labels[:1]).nll))(logits[0])
    assert_close(hessian, np.diag(p) - np.outer(p, p))


def test_one_pass_over_the_logits_equals_two():
    """Rows of small and large numbers, of equal ones, of one that dominates, and with masked columns at either end."""
    normal = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    rows = [normal[0], 300 * normal[1], np.full(1000, -7.0), np.arange(1000) - 1e30 * (np.arange(1000) != 400)]
    rows += [np.where(np.arange(1000) < 500, -np.inf, normal[2]), np.where(np.arange(1000) < 500, normal[3], -np.inf)]
    logits, labels = jnp.asarray(np.stack(rows), jnp.float32), jnp.array([0, 999, 3, 400, 700, 20])
    classes = jnp.broadcast_to(jnp.arange(1000), logits.shape)

    changes = jnp.broadcast_to(normal[0], logits.shape)

    def run(form):
        def terms(logits):
            found = form(logits, logits, labels, classes, None)
            return found.shift + jnp.log(found.total), found.at_label

        return jax.jit(
            lambda: (jax.jvp(terms, (logits,), (changes,)), form(logits, logits, labels, classes, None).shift)
        )()

    for actual, expected in zip(*(jax.tree.leaves(run(form)) for form in (_one_pass, _two_passes)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("platform", "reductions"), [("cpu", 2), ("cuda", 1), ("tpu", 3)])
def test_a_gpu_reads_the_logits_of_the_head_once(example, platform, reductions):
    """Elsewhere once for the maximum and once for the sum; a TPU also sums the selected logits."""
    traced = jax.jit(lambda *a: linear_cross_entropy(*a, chunk_size=TOKENS).nll).trace(*example[:3])
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(rf"stablehlo.reduce\(.*tensor<{TOKENS}x{VOCAB}xf32>", text)) == reductions


def test_uniform_logits_cost_log_vocab():
    sums = cross_entropy(jnp.full((3, 50304), 0.7), jnp.array([0, 5, 50303]))
    np.testing.assert_allclose(sums.mean(), np.log(50304), rtol=1e-6)


@pytest.mark.parametrize("value", [1.0, -1e4, 1e8])
def test_two_equal_logits_cost_log_two(value):
    sums = cross_entropy(jnp.full((1, 2), value), jnp.array([1]))
    np.testing.assert_allclose(sums.nll, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e6])
def test_shift_invariance(offset):
    """Adding a constant to all logits changes the loss by less than its rounding."""
    logits = jnp.array([[2.0, -1.0, 0.5]]) + offset  # all representable in float32
    nll, gradient = dense_nll(logits, jnp.array([0]))
    expected, expected_gradient = oracle([[2.0, -1.0, 0.5]], np.array([0]), [1.0])
    np.testing.assert_allclose(nll, expected[0], rtol=1e-6)
    assert_close(gradient, expected_gradient)


def test_optax_loses_digits_under_a_shift():
    """The reason for the test above: unshifted lse - logit is wrong by percents at an offset of 1e6."""
    logits, labels = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([0])
    exact = oracle(logits, np.array([0]), [1.0])[0][0]
    theirs = optax.softmax_cross_entropy_with_integer_labels(logits + 1e6, labels)[0]
    assert abs(theirs / exact - 1) > 0.01
    assert abs(cross_entropy(logits + 1e6, labels).nll / exact - 1) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_equal_the_same_values_in_float32(example, dtype):
    hidden, kernel, labels, weights = example
    logits = jnp.asarray(hidden @ kernel).astype(dtype)

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        return cross_entropy(x, labels, where=weights, z_loss=0.01).total()

    narrow, wide = loss(logits), loss(logits.astype(jnp.float32))
    assert narrow[0] == wide[0]
    assert narrow[0].dtype == jnp.float32
    np.testing.assert_array_equal(narrow[1], wide[1].astype(dtype))


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        ([1e4, -1e4, 0.0], jnp.float32),
        ([6e4, -6e4, 0.0], jnp.float16),
        ([6e4, 6e4, -6e4], jnp.bfloat16),
        ([0.5, -np.inf, 0.25], jnp.float32),
        ([0.5, -np.inf, 0.25], jnp.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("label", [0, 2])
def test_extreme_logits(row, dtype, label):
    """Finite, and the gradient at -inf is exactly 0."""
    logits = jnp.array([row], dtype)
    nll, gradient = dense_nll(logits, jnp.array([label]))
    x = np.asarray(logits, np.float64)
    np.testing.assert_allclose(nll, logsumexp(x)[0] - x[0, label], rtol=1e-6)
    rtol = 1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    assert_close(gradient, softmax(x) - np.eye(3)[[label]], rtol)
    assert (gradient[np.isneginf(x)] == 0).all()


def test_loss_sums(example):
    """Sums of parts are the sums of the whole; perplexity and bits are of the pure nll."""
    hidden, kernel, labels, weights = example

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def sums(first, last):
        rows = slice(first, last)
        return cross_entropy(
            (hidden @ kernel)[rows], labels[rows], where=weights[rows], z_loss=0.5, label_smoothing=0.1
        )

    whole, added = sums(0, TOKENS), sums(0, 4) + sums(4, TOKENS)
    jax.tree.map(assert_close, added, whole)
    (nll, z_loss, smoothing), _ = oracle(hidden @ kernel, labels, weights, z_loss=0.5, label_smoothing=0.1)
    weight = np.float64(weights).sum()
    assert_close(whole.total(), nll + z_loss + smoothing)
    assert_close(whole.mean(), (nll + z_loss + smoothing) / weight)
    assert_close(whole.mean_nll(), nll / weight)
    assert_close(whole.perplexity(), np.exp(nll / weight))
    assert_close(whole.bits_per_token(), nll / weight / np.log(2))
    assert_close(whole.bits_per_byte(40), nll / 40 / np.log(2))
    assert all(leaf.dtype == jnp.float32 and leaf.shape == () for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("scale", [5, 640])
def test_bfloat16_operands(scale):
    """marin#8217: the backward pass sees the float32 logits, not their bfloat16 rounding.

    Token i has only channel i, so the kernel's gradient shows that of each logit: it is rounded to bfloat16 before the
    product and after it, 2**-8 each, whatever the size of the logits. Rounded logits are off by up to 2**-8 * |logit|.
    """
    rng = np.random.default_rng(scale)
    hidden = jnp.diag(jnp.asarray(rng.uniform(1, 2, 16), jnp.bfloat16))
    kernel = jnp.asarray(rng.uniform(-scale / 2, scale / 2, (16, 256)), jnp.bfloat16)
    labels = rng.integers(0, 256, 16).astype(np.int32)

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=6).nll

    nll, gradient = jax.jit(jax.value_and_grad(loss, 1))(hidden, kernel)
    assert gradient.dtype == jnp.bfloat16
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    logits = hidden @ kernel
    rounded_logits = np.float64(logits.astype(jnp.bfloat16))
    onehot = np.eye(256)[labels]
    expected = hidden.T @ (softmax(logits) - onehot)
    rounded = hidden.T @ (softmax(rounded_logits) - onehot)
    np.testing.assert_allclose(nll, (logsumexp(logits) - (logits * onehot).sum(-1)).sum(), rtol=1e-6)
    np.testing.assert_allclose(np.float64(gradient), expected, rtol=2**-7, atol=1e-6)
    assert not np.allclose(rounded, expected, rtol=1.5 * 2**-7, atol=1e-6)


@pytest.mark.parametrize("scale", [5, 640])
def test_bfloat16_gradients_of_a_dense_problem(scale):
    """The error of both gradients, relative to their norm, is below one bfloat16 rounding."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(128, 256)) * scale / 50, jnp.bfloat16)
    labels = rng.integers(0, 256, 64).astype(np.int32)

    def loss(hidden, kernel):
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=24).nll

    gradients = jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    on_logits = softmax(hidden @ kernel) - np.eye(256)[labels]
    for gradient, expected in zip(gradients, (on_logits @ kernel.T, hidden.T @ on_logits), strict=True):
        assert np.linalg.norm(np.float64(gradient) - expected) < 2**-8 * np.linalg.norm(expected)
