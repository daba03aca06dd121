"""Arguments of the losses: masks, wrong labels, any shape and value, `vmap`, and errors."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from losses_reference import (
    TOKENS,
    VOCAB,
    WIDTH,
    assert_close,
    dense_nll,
    linear_nll,
    logsumexp,
    softmax,
)

from jaxtrain.losses import LossSums, cross_entropy, linear_cross_entropy

few_examples = hypothesis.settings(deadline=None, max_examples=30, database=None, derandomize=True)


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


@pytest.mark.parametrize("weight", [1e-3, 0.25, 40.0])
def test_the_mean_does_not_depend_on_the_scale_of_the_weights(example, weight):
    """Also where the weights sum to less than 1."""
    hidden, kernel, labels, _ = example
    full, scaled = (
        linear_cross_entropy(hidden, kernel, labels, where=np.full(TOKENS, w)) for w in (1.0, weight / TOKENS)
    )
    np.testing.assert_allclose(scaled.mean(), full.mean(), rtol=1e-5)


def test_lists_are_arrays(example):
    hidden, kernel, labels, _ = (np.asarray(value) for value in example)
    lists = [value.tolist() for value in (hidden, kernel, labels)]
    assert linear_cross_entropy(*lists, where=[1] * TOKENS).nll == linear_cross_entropy(hidden, kernel, labels).nll


def test_weights_are_constants(example):
    hidden, kernel, labels, weights = example
    for loss in (
        lambda w: linear_cross_entropy(hidden, kernel, labels, where=w).total(),
        lambda w: cross_entropy(hidden @ kernel, labels, where=w).total(),
    ):
        assert (jax.jit(jax.grad(loss))(weights) == 0).all()


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


def test_vmap_over_any_subset_of_the_arguments():
    """The gradient equals that of the dense loss, in `scan` and `checkpoint` too; a constant output once had none."""
    rng, terms = np.random.default_rng(3), {"z_loss": 1e-2, "label_smoothing": 0.1}
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

    def gradients(loss, step=1):
        found = []
        for subset in subsets[::step]:
            values = [batched[name] if name in subset else single[name] for name in single]
            axes = tuple(0 if name in subset else None for name in single)
            total = lambda h, k, v=values, a=axes: jnp.sum(jax.vmap(loss, in_axes=a)(h, k, *v[2:]))  # noqa: E731
            found.append(jax.grad(total, (0, 1))(*map(jnp.asarray, values[:2])))
        return found

    expected = jax.jit(lambda: gradients(dense))()
    for loss, step in ((chunked, 1), (scanned, 4)):
        actual = jax.jit(lambda loss=loss, step=step: gradients(loss, step))()
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), actual, expected[::step])
