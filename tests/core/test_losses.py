"""Cross-entropy against float64 numpy; the oracle's gradients are complex steps, so no formula is written twice."""

import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P

from jaxtrain import losses
from jaxtrain.losses import LossSums, cross_entropy, linear_cross_entropy

TOKENS, WIDTH, VOCAB = 15, 6, 11
TERMS = [
    {"z_loss": z_loss, "label_smoothing": smoothing, "logit_softcap": softcap}
    for z_loss in (0.0, 0.01)
    for smoothing in (0.0, 0.1)
    for softcap in (None, 3.0)
]
few_examples = hypothesis.settings(deadline=None, max_examples=30, database=None, derandomize=True)


def oracle_terms(logits, labels, z_loss=0.0, label_smoothing=0.0, logit_softcap=None):
    """Per-token nll, z-loss and smoothing of complex128 logits [N, V]."""
    x = logit_softcap * np.tanh(logits / logit_softcap) if logit_softcap else logits
    shift = x.real.max(-1)
    lse = shift + np.log(np.exp(x - shift[:, None]).sum(-1))
    nll = lse - x[np.arange(len(labels)), labels]
    return np.stack([nll, z_loss * lse**2, label_smoothing * (lse - x.mean(-1) - nll)])


def oracle(logits, labels, weights, scales=(1.0, 1.0, 1.0), **terms):
    """Returns float64 sums (nll, z_loss, smoothing) and the gradient of `scales . sums` with respect to the logits."""
    logits = np.asarray(logits, np.float64)
    sums = (oracle_terms(logits + 0j, labels, **terms).real * weights).sum(-1)
    gradient = np.zeros_like(logits)
    for column in range(logits.shape[1]):
        step = np.zeros_like(logits)
        step[:, column] = 1e-30
        gradient[:, column] = np.asarray(scales) @ oracle_terms(logits + 1j * step, labels, **terms).imag / 1e-30
    return sums, gradient * np.asarray(weights)[:, None]


def logsumexp(x):
    return x.max(-1) + np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))


def softmax(x):
    return np.exp(x - logsumexp(x)[:, None])


def parts(sums: LossSums):
    return jnp.stack([sums.nll, sums.z_loss, sums.smoothing])


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def linear_nll(hidden, kernel, labels):
    return linear_cross_entropy(hidden, kernel, labels).nll


@jax.jit
@jax.value_and_grad
def dense_nll(logits, labels):
    return cross_entropy(logits, labels).nll


def assert_close(actual, expected, rtol=1e-6):
    """The largest difference is at most rtol of the largest number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    difference = np.abs(actual - expected).max(initial=0)
    assert difference <= rtol * np.abs(expected).max(initial=0), (
        f"off by {difference}, largest {np.abs(expected).max()}"
    )


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, TOKENS)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], TOKENS).astype(np.float32)
    weights[-1] = 2.0  # what a wrong padding of the last chunk would repeat
    return hidden, kernel, labels.astype(np.int32), weights


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
    [(terms, 4) for terms in TERMS] + [(TERMS[-1], size) for size in (1, 7, TOKENS, 1000, None)],
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


BAD_LABELS = [-100, -1, VOCAB, 2 * VOCAB, 2**31 - 1]


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf], ids=str)
def test_masked_places_add_exactly_nothing(example, poison):
    """Masked positions may have any label and NaN logits."""
    hidden, kernel, labels, _ = example
    bad = len(BAD_LABELS)
    padded = np.concatenate([np.full((bad, WIDTH), poison, np.float32), hidden])
    padded_labels = np.concatenate([BAD_LABELS, labels]).astype(np.int32)
    where = np.arange(bad + TOKENS) >= bad
    terms = {"z_loss": 0.01, "label_smoothing": 0.1, "logit_softcap": 3.0}

    def linear(hidden, kernel, labels, where):
        return linear_cross_entropy(hidden, kernel, labels, where=where, chunk_size=4, **terms).total()

    def dense(logits, labels, where):
        return cross_entropy(logits, labels, where=where, **terms).total()

    linear = jax.jit(jax.value_and_grad(linear, (0, 1)))
    loss, (on_hidden, on_kernel) = linear(padded, kernel, padded_labels, where)
    reference, (_, kernel_reference) = linear(hidden, kernel, labels, None)
    assert_close(loss, reference)
    assert_close(on_kernel, kernel_reference)
    assert (on_hidden[:bad] == 0).all()

    logits = np.concatenate([np.full((bad, VOCAB), poison, np.float32), hidden @ kernel])
    loss, on_logits = jax.jit(jax.value_and_grad(dense))(logits, padded_labels, where)
    assert_close(loss, reference)
    assert (on_logits[:bad] == 0).all()
    assert np.isfinite(on_logits).all()


@pytest.mark.parametrize("label", BAD_LABELS)
def test_wrong_label_is_nan_never_another_class(example, label):
    """JAX would wrap -1 to the last class and clamp a label above V - 1."""
    hidden, kernel, labels, _ = example
    labels = np.where(np.arange(TOKENS) == 3, label, labels).astype(np.int32)
    loss, (on_hidden, on_kernel) = linear_nll(hidden, kernel, labels)
    assert np.isnan(loss)
    assert np.isnan(on_hidden[3]).all()
    assert np.isnan(on_kernel).all()
    loss, on_logits = dense_nll(hidden @ kernel, labels)
    assert np.isnan(loss)
    assert np.isnan(on_logits[3]).all()
    assert np.isfinite(np.delete(on_logits, 3, axis=0)).all()


@pytest.mark.parametrize("label", [-100, VOCAB])
def test_checkify_names_a_wrong_label(example, label):
    hidden, kernel, labels, _ = example
    bad = np.where(np.arange(TOKENS) == 3, label, labels).astype(np.int32)
    for loss in (
        jax.jit(lambda labels: linear_cross_entropy(hidden, kernel, labels).nll),
        jax.jit(lambda labels: cross_entropy(hidden @ kernel, labels).nll),
    ):
        checked = checkify.checkify(loss, errors=checkify.user_checks)
        assert checked(labels)[0].get() is None
        assert f"label {label} " in checked(bad)[0].get()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint16, jnp.uint32])
def test_label_dtypes(dtype):
    """The vocabulary may have more classes than the dtype of the labels can count (65,536 in a uint16 token store)."""
    logits = jnp.arange(2 * 65536, dtype=jnp.float32).reshape(2, 65536) / 65536
    labels = jnp.array([7, 200])
    assert cross_entropy(logits, labels.astype(dtype)).nll == cross_entropy(logits, labels).nll


def test_all_masked(example):
    hidden, kernel, labels, _ = example
    where = np.zeros(TOKENS, bool)
    for loss, arguments in (
        (lambda h, k: linear_cross_entropy(h, k, labels, where=where, z_loss=0.1), (hidden, kernel)),
        (lambda h, k: cross_entropy(h @ k, labels, where=where, z_loss=0.1), (hidden, kernel)),
    ):
        sums, pull_back = jax.vjp(jax.jit(loss), *arguments)
        assert (float(sums.mean()), float(sums.perplexity()), float(sums.bits_per_byte(9))) == (0, 1, 0)
        gradients = pull_back(jax.grad(LossSums.mean)(sums))
        assert all((g == 0).all() for g in gradients)


def test_weights_are_constants(example):
    hidden, kernel, labels, weights = example
    for loss in (
        lambda w: linear_cross_entropy(hidden, kernel, labels, where=w).total(),
        lambda w: cross_entropy(hidden @ kernel, labels, where=w).total(),
    ):
        assert (jax.jit(jax.grad(loss))(weights) == 0).all()


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


def tensor_sizes(function, *arguments):
    """Number of elements of every array in the lowered program, subfunctions and loops included."""
    text = jax.jit(function).lower(*arguments).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    return {np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in shapes}, text


def big_problem(tokens=4096, width=16, vocab=1024):
    return jnp.ones((tokens, width)), jnp.ones((width, vocab)), jnp.zeros(tokens, jnp.int32)


def random_problem(shape, width, vocab):
    rng = np.random.default_rng(4)
    hidden, kernel = rng.normal(size=(*shape, width)), rng.normal(size=(width, vocab))
    return jnp.float32(hidden), jnp.float32(kernel), jnp.int32(rng.integers(0, vocab, shape))


def chunked(hidden, kernel, labels):
    return linear_cross_entropy(hidden, kernel, labels, chunk_size=64, z_loss=1e-4, logit_softcap=30.0).mean()


def dense(hidden, kernel, labels):
    return cross_entropy(hidden @ kernel, labels, z_loss=1e-4, logit_softcap=30.0).mean()


def test_training_never_holds_all_logits():
    """No array is larger than the inputs or one chunk, before and after compilation."""
    arguments = big_problem()
    tokens, vocab = arguments[0].shape[0], arguments[1].shape[1]
    assert max(tensor_sizes(jax.value_and_grad(chunked, (0, 1)), *arguments)[0]) == 64 * vocab
    assert max(tensor_sizes(jax.value_and_grad(dense, (0, 1)), *arguments)[0]) == tokens * vocab
    compiled = jax.jit(jax.value_and_grad(chunked, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * tokens * vocab / 8


@pytest.mark.parametrize(
    ("tokens", "chunk_size", "rows"),
    [
        (1025, 1024, [640] * 2),  # not [1024] * 2: one token more is not twice the work
        (1024, 1024, [1024]),
        (600, 1024, [600]),
        (3000, 1000, [1000] * 3),
        (2100, 1000, [768] * 3),
        (100, 64, [56] * 2),  # short ones are multiples of 8
        (129, 128, [72] * 2),
    ],
)
def test_chunks_are_about_equally_long(tokens, chunk_size, rows):
    """The loop goes over chunks of this many rows, and its product makes as many rows of logits."""

    def loss(hidden, kernel, labels):
        return linear_cross_entropy(hidden, kernel, labels, chunk_size=chunk_size).nll

    text = tensor_sizes(loss, *big_problem(tokens=tokens, width=16, vocab=321))[1]
    assert re.search(rf"dot_general.*-> tensor<{rows[0]}x321xf32>", text)
    assert f"tensor<{len(rows)}x{rows[0]}x16xf32>" in text


def test_evaluation_does_no_gradient_work():
    """Without differentiation one product, and nothing of the kernel's size but the kernel."""
    arguments = big_problem()
    _, evaluation = tensor_sizes(chunked, *arguments)
    _, training = tensor_sizes(jax.grad(chunked, (0, 1)), *arguments)
    assert evaluation.count("dot_general") == 1
    assert training.count("dot_general") >= 3
    zeros = r"constant dense<0\.0+e\+00> : tensor<16x1024xf32>|broadcast_in_dim.*-> tensor<16x1024xf32>"
    assert not re.search(zeros, evaluation)
    assert re.search(zeros, training)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(example, check_vma):
    """Tokens over 8 devices, the kernel replicated; its gradient is summed once, as make_train_step does."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(24, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCAB, 24).astype(np.int32)
    weights = rng.choice([0.0, 1.0, 3.0], 24).astype(np.float32)
    kernel = example[1]

    def loss(hidden, kernel, labels, weights):
        sums = linear_cross_entropy(hidden, kernel, labels, where=weights, chunk_size=2, z_loss=0.01)
        return sums.total(), sums

    def body(hidden, kernel, labels, weights):
        kernel = jax.lax.pcast(kernel, "data", to="varying")
        (on_hidden, on_kernel), sums = jax.grad(loss, (0, 1), has_aux=True)(hidden, kernel, labels, weights)
        return (on_hidden, jax.lax.psum(on_kernel, "data")), jax.lax.psum(sums, "data")

    rows, whole = P("data"), P()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(rows, whole, rows, rows), out_specs=((rows, whole), whole), check_vma=check_vma
    )
    (on_hidden, on_kernel), sums = jax.jit(mapped)(hidden, kernel, labels, weights)
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    expected_sums, on_logits = oracle(hidden @ kernel, labels, weights, z_loss=0.01)
    np.testing.assert_allclose(parts(sums), expected_sums, rtol=1e-6)
    assert sums.weight == weights.sum()
    assert_close(on_hidden, on_logits @ kernel.T)
    assert_close(on_kernel, hidden.T @ on_logits)


def test_shard_map_reduces_a_replicated_kernel_by_itself(example):
    """Under check_vma, a gradient computed outside the loss needs no psum."""
    hidden, kernel, labels, _ = example
    hidden, labels = hidden[:8], labels[:8]

    def body(hidden, kernel, labels):
        return jax.grad(lambda k: linear_cross_entropy(hidden, k, labels).nll)(kernel)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())
    assert_close(jax.jit(mapped)(hidden, kernel, labels), linear_nll(hidden, kernel, labels)[1][1])


@pytest.mark.parametrize("vocab_block", [0, 128])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_under_jit_each_device_works_on_its_tokens(kind, vocab_block):
    """Without `shard_map`, on axes of every type: an eighth of the work, and the numbers of one device."""

    def loss(hidden, kernel, labels):
        options = {"where": labels % 5 != 0, "chunk_size": 64, "vocab_block": vocab_block, "label_smoothing": 0.1}
        return linear_cross_entropy(hidden, kernel, labels, **options).mean()

    arguments = random_problem((16, 32), width=16, vocab=512)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[kind],))
    rows = jax.NamedSharding(mesh, P("data"))
    sharded = jax.device_put(arguments, (rows, jax.NamedSharding(mesh, P()), rows))
    for actual, expected in zip(jax.tree.leaves(step(*sharded)), jax.tree.leaves(step(*arguments)), strict=True):
        assert_close(actual, expected)
    one, eight = (step.lower(*each).compile() for each in (arguments, sharded))
    assert eight.cost_analysis()["flops"] < one.cost_analysis()["flops"] / 6
    assert "all-gather" not in eight.as_text()


@pytest.mark.parametrize("head", [P(), P("data"), P("data", "model")], ids=str)
def test_explicit_axes_ask_for_nothing(head):
    """Both losses accept a mesh of `jax.make_mesh`; gradients have the shardings of their arguments."""

    def both(hidden, kernel, labels):
        where = labels != 3
        dense = cross_entropy(hidden @ kernel, labels, where=where, z_loss=1e-3)
        return (linear_cross_entropy(hidden, kernel, labels, where=where, chunk_size=24, z_loss=1e-3) + dense).mean()

    arguments = random_problem((8, 12), width=16, vocab=64)
    expected = jax.jit(jax.value_and_grad(both, (0, 1)))(*arguments)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    specs = P("data"), head, P("data")
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
        actual = jax.jit(jax.value_and_grad(both, (0, 1)))(*sharded)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(x, y)
    for x, y in zip(actual[1], sharded, strict=False):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


ALL_TERMS = {"z_loss": 0.01, "label_smoothing": 0.1, "logit_softcap": 3.0}


def weighed(example_labels, weights, scales=(1.0, 1.0, 1.0), **options):
    """`(hidden, kernel) -> (scales . sums, sums)`."""

    def loss(hidden, kernel):
        sums = linear_cross_entropy(hidden, kernel, example_labels, where=weights, chunk_size=4, **options)
        return jnp.dot(jnp.array(scales, jnp.float32), parts(sums)), sums

    return loss


def sums_and_gradients(loss, hidden, kernel):
    gradients, sums = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
    return parts(sums), *gradients


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("vocab_block", [0, 4])
def test_padding_of_the_vocabulary_takes_no_part(example, terms, vocab_block):
    """Three padding columns with the largest logits change no number; their gradient is exactly 0.

    11 columns and 14 are summed in another order, which depends on the machine's vectors, so the numbers may differ in
    their last bits.
    """
    hidden, kernel, labels, weights = example
    padding = np.full((WIDTH, 3), 7.0, np.float32)
    padded = np.concatenate([kernel, padding], axis=1)
    loss = weighed(labels, weights, num_classes=VOCAB, vocab_block=vocab_block, **terms)
    actual = sums_and_gradients(loss, hidden, padded)
    expected = sums_and_gradients(weighed(labels, weights, **terms), hidden, kernel)
    assert (actual[2][:, VOCAB:] == 0).all()
    for a, b in zip((*actual[:2], actual[2][:, :VOCAB]), expected, strict=True):
        assert_close(a, b)


def test_a_label_among_the_padding_is_wrong(example):
    hidden, kernel, labels, weights = example
    labels = np.where(np.arange(TOKENS) == TOKENS - 1, VOCAB - 1, 0).astype(np.int32)
    assert np.isfinite(linear_cross_entropy(hidden, kernel, labels, where=weights, num_classes=VOCAB).nll)
    assert np.isnan(linear_cross_entropy(hidden, kernel, labels, where=weights, num_classes=VOCAB - 1).nll)


@pytest.mark.parametrize("vocab_block", [1, VOCAB - 1, 100])
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (2.0, -3.0, 0.5)], ids=str)
def test_a_second_pass_over_blocks_of_the_vocabulary(example, vocab_block, scales):
    """The same gradient, whether the blocks divide the columns or not, also with unequal cotangents."""
    hidden, kernel, labels, weights = example
    actual = sums_and_gradients(weighed(labels, weights, scales, vocab_block=vocab_block, **ALL_TERMS), hidden, kernel)
    one_pass = sums_and_gradients(weighed(labels, weights, scales, vocab_block=0, **ALL_TERMS), hidden, kernel)
    for a, b in zip(actual, one_pass, strict=True):
        assert_close(a, b)
    hidden, kernel = np.float64(hidden), np.float64(kernel)
    _, on_logits = oracle(hidden @ kernel, labels, weights, scales, **ALL_TERMS)
    assert_close(actual[1], on_logits @ kernel.T)
    assert_close(actual[2], hidden.T @ on_logits)


def test_large_heads_take_the_second_pass_by_themselves():
    """A head whose float32 gradient is above the limit has one more product, a block of the vocabulary at a time."""

    def num_products(columns, dtype=jnp.float32):
        shapes = [((128, 16), dtype), ((16, columns), dtype), ((128,), jnp.int32)]
        function = jax.grad(lambda h, k, labels: linear_cross_entropy(h, k, labels).nll, (0, 1))
        jaxpr = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        return str(jaxpr).count("dot_general[")

    limit = losses.CARRY_LIMIT // (4 * 16)
    assert num_products(limit) == 3
    assert num_products(limit + 1) == 4
    assert num_products(limit + 1, jnp.float16) == 3  # whose sums over all tokens would overflow


@pytest.mark.parametrize("vocab_block", [0, 2])
@pytest.mark.parametrize("terms", [{}, ALL_TERMS], ids=["nll", "all"])
@pytest.mark.parametrize(
    ("devices", "columns", "num_classes"),
    [(2, 12, 12), (2, 12, VOCAB), (4, 12, VOCAB), (4, 16, VOCAB), (4, 12, 9)],
)
def test_vocabulary_in_parts_over_an_axis(devices, columns, num_classes, terms, vocab_block):
    """Against float64 numpy on the classes alone; the last shard has some padding, or padding only."""
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, columns)).astype(np.float32) + 2 * (np.arange(columns) >= num_classes)
    kernel = kernel.astype(np.float32)
    labels = rng.integers(0, num_classes, TOKENS).astype(np.int32)
    labels[0] = num_classes - 1
    weights = rng.choice([0.0, 0.5, 2.0], TOKENS).astype(np.float32)
    scales = (2.0, -3.0, 0.5)
    options = {"num_classes": num_classes, "vocab_axis": "tensor", "vocab_block": vocab_block}

    def body(hidden, kernel):
        gradients, sums = jax.grad(weighed(labels, weights, scales, **options, **terms), (0, 1), has_aux=True)(
            hidden, kernel
        )
        return parts(sums)[None], gradients[0][None], gradients[1]

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("tensor",), axis_types=auto, devices=jax.devices()[:devices])
    by_device, by_columns = P("tensor"), P(None, "tensor")
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), by_columns), out_specs=(by_device, by_device, by_columns), check_vma=False
    )
    sums, on_hidden, on_kernel = jax.jit(mapped)(hidden, kernel)
    hidden, kernel = np.float64(hidden), np.float64(kernel[:, :num_classes])
    expected_sums, on_logits = oracle(hidden @ kernel, labels, weights, scales, **terms)
    for device in range(devices):  # the same on all of them
        assert_close(sums[device], expected_sums)
        assert_close(on_hidden[device], on_logits @ kernel.T)
    assert_close(on_kernel[:, :num_classes], hidden.T @ on_logits)
    assert (on_kernel[:, num_classes:] == 0).all()


@pytest.mark.parametrize("leading", [(), (5,), (5, 3), (5, 1, 3), (0,), (0, 4)], ids=str)
def test_leading_dimensions(leading):
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(*leading, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    labels = rng.integers(0, VOCAB, leading).astype(np.int32)
    sums = jax.jit(functools.partial(linear_cross_entropy, chunk_size=4))(hidden, kernel, labels)
    logits = hidden @ kernel
    flat = logits.reshape(-1, VOCAB).astype(np.float64)
    expected = (logsumexp(flat) - flat[np.arange(len(flat)), labels.reshape(-1)]).sum() if len(flat) else 0.0
    assert_close(sums.nll, expected)
    assert_close(dense_nll(logits, labels)[0], expected)
    assert sums.weight == labels.size
    _, (on_hidden, on_kernel) = linear_nll(hidden, kernel, labels)
    assert (on_hidden.shape, on_kernel.shape) == (hidden.shape, kernel.shape)


@few_examples
@hypothesis.given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=3, max_size=3),
    labels=st.lists(st.integers(0, 4), min_size=3, max_size=3),
)
def test_any_logits(rows, labels):
    """The loss of each token is at least 0 and equals float64; its gradient sums to 0 over the classes."""
    logits, labels = np.array(rows, np.float32), np.array(labels, np.int32)
    nll, gradient = dense_nll(logits, labels)
    expected = logsumexp(np.float64(logits)) - np.float64(logits)[np.arange(3), labels]
    np.testing.assert_allclose(nll, expected.sum(), rtol=1e-6, atol=1e-6)
    assert nll >= 0
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


@hypothesis.settings(few_examples, max_examples=6)
@hypothesis.given(
    tokens=st.integers(1, 9), width=st.integers(1, 4), vocab=st.integers(1, 9), chunk_size=st.integers(1, 5)
)
@hypothesis.example(tokens=7, width=3, vocab=5, chunk_size=3)
def test_any_sizes(tokens, width, vocab, chunk_size):
    rng = np.random.default_rng(tokens)
    hidden, kernel = rng.normal(size=(tokens, width)), rng.normal(size=(width, vocab))
    labels = rng.integers(0, vocab, tokens).astype(np.int32)
    gradients = jax.jit(jax.grad(lambda h, k: linear_cross_entropy(h, k, labels, chunk_size=chunk_size).nll, (0, 1)))(
        np.float32(hidden), np.float32(kernel)
    )
    on_logits = softmax(np.float32(hidden).astype(float) @ np.float32(kernel)) - np.eye(vocab)[labels]
    np.testing.assert_allclose(gradients[0], on_logits @ kernel.T, atol=3e-6)
    np.testing.assert_allclose(gradients[1], hidden.T @ on_logits, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": (4, 2)}, r"hidden \(4, 2\), kernel \(3, 5\) and labels \(4,\)"),
        ({"hidden": (5, 3)}, "must be"),
        ({"kernel": (3, 5, 1)}, "must be"),
        ({"labels": jnp.zeros(4)}, "labels must be integers, got float32"),
        ({"where": jnp.ones((4, 1))}, r"where \(4, 1\)"),
        ({"kernel": jnp.zeros((3, 5), jnp.bfloat16)}, "hidden is float32 and kernel is bfloat16"),
        ({"num_classes": 0}, "num_classes must be a whole number from 1 .* got 0"),
        ({"num_classes": 6}, "num_classes 6 must be at most the 5 columns of the kernel"),
        ({"chunk_size": 0}, "chunk_size must be a whole number from 1 .* got 0"),
        ({"chunk_size": 1e2}, "chunk_size must be a whole number .* got 100.0"),
        ({"num_classes": 5.0}, "num_classes must be a whole number .* got 5.0"),
        ({"vocab_block": 2.0}, "vocab_block must be a whole number .* got 2.0"),
        ({"z_loss": -1.0}, "z_loss must be 0 or more, got -1.0"),
        ({"z_loss": np.nan}, "z_loss"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"logit_softcap": -30.0}, "logit_softcap must be 0 or more"),
        ({"logit_softcap": np.inf}, "logit_softcap"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_linear_errors(change, message):
    arguments = {"hidden": (4, 3), "kernel": (3, 5), "labels": jnp.zeros(4, jnp.int32), **change}
    arguments = {name: jnp.zeros(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": jnp.zeros((3, 5))}, r"logits \(3, 5\) must be \[..., V\] for labels \[...\] \(4,\)"),
        ({"labels": jnp.zeros(4)}, "labels must be integers"),
        ({"where": jnp.ones(3)}, "where"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
    ],
)
def test_dense_errors(change, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{"logits": jnp.zeros((4, 5)), "labels": jnp.zeros(4, jnp.int32), **change})


@pytest.mark.parametrize("terms", [{}, {"z_loss": 1e-2}, {"z_loss": 1e-2, "label_smoothing": 0.1}], ids=len)
def test_vmap_over_any_subset_of_the_arguments(terms):
    """The gradient equals that of the dense loss, in `scan` and `checkpoint` too; a constant output once had none."""
    rng = np.random.default_rng(3)
    single = {
        "hidden": np.float32(rng.normal(size=(5, 4))),
        "kernel": np.float32(rng.normal(size=(4, 7))),
        "labels": rng.integers(0, 7, 5).astype(np.int32),
        "where": np.float32(rng.integers(0, 2, 5)),
    }
    batched = {name: np.stack([value, np.roll(value, 1, 0)]) for name, value in single.items()}
    subsets = [subset for size in range(1, 5) for subset in itertools.combinations(single, size)]

    def chunked(hidden, kernel, labels, where):
        return linear_cross_entropy(hidden, kernel, labels, where=where, chunk_size=2, **terms).total()

    def dense(hidden, kernel, labels, where):
        return cross_entropy(hidden @ kernel, labels, where=where, **terms).total()

    def scanned(*arguments):
        loss = jax.checkpoint(chunked)
        return jax.lax.scan(lambda total, _: (total + loss(*arguments), None), jnp.float32(0), None, length=1)[0]

    def gradients(loss):
        found = []
        for subset in subsets:
            values = [batched[name] if name in subset else single[name] for name in single]
            axes = tuple(0 if name in subset else None for name in single)
            total = lambda h, k, v=values, a=axes: jnp.sum(jax.vmap(loss, in_axes=a)(h, k, *v[2:]))  # noqa: E731
            found.append(jax.grad(total, (0, 1))(*map(jnp.asarray, values[:2])))
        return found

    expected = jax.jit(lambda: gradients(dense))()
    for loss in (chunked, scanned):
        actual = jax.jit(lambda loss=loss: gradients(loss))()
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), actual, expected)
