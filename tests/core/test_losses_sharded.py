"""The work of the loss head: in chunks of tokens, in blocks of the vocabulary, and over devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from losses_reference import TOKENS, VOCAB, WIDTH, assert_close, chunked, dense, linear_nll, oracle, parts

from jaxtrain import losses
from jaxtrain.losses import cross_entropy, linear_cross_entropy


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


def test_training_never_holds_all_logits():
    """No array is larger than the inputs or one chunk, before and after compilation."""
    arguments = big_problem()
    tokens, vocab = arguments[0].shape[0], arguments[1].shape[1]
    assert max(tensor_sizes(jax.value_and_grad(chunked, (0, 1)), *arguments)[0]) == 64 * vocab
    assert max(tensor_sizes(jax.value_and_grad(dense, (0, 1)), *arguments)[0]) == tokens * vocab
    compiled = jax.jit(jax.value_and_grad(chunked, (0, 1))).lower(*arguments).compile()
    assert (
        compiled.memory_analysis().temp_size_in_bytes < 3.5 * 4 * 64 * vocab
    )  # a chunk of logits, its gradient, copies


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


@pytest.mark.parametrize(("kind", "vocab_block"), [("Auto", 128), ("Explicit", 0)])
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


@pytest.mark.parametrize("head", [P("data"), P("data", "model")], ids=str)
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


@pytest.mark.parametrize(("terms", "vocab_block"), [({}, 0), (ALL_TERMS, 0), (ALL_TERMS, 4)], ids=str)
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


@pytest.mark.parametrize(
    ("vocab_block", "scales"),
    [(1, (1.0, 1.0, 1.0)), (VOCAB - 1, (1.0, 1.0, 1.0)), (VOCAB - 1, (2.0, -3.0, 0.5)), (100, (1.0, 1.0, 1.0))],
    ids=str,
)
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


@pytest.mark.parametrize(
    ("devices", "columns", "num_classes", "terms", "vocab_block"),
    [
        (2, 12, 12, {}, 0),
        pytest.param(2, 12, VOCAB, ALL_TERMS, 0, marks=pytest.mark.slow),
        (4, 12, VOCAB, ALL_TERMS, 2),
        (4, 16, VOCAB, ALL_TERMS, 0),
        (4, 12, 9, ALL_TERMS, 2),
        pytest.param(4, 12, 9, {}, 2, marks=pytest.mark.slow),
    ],
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


@pytest.mark.parametrize("vocab_block", [0, 5])
def test_a_kernel_with_sharded_rows_is_gathered_and_its_gradient_scattered(vocab_block):
    """Tokens and rows of the kernel over one axis, its columns over another; the blocks overlap or not."""
    rng = np.random.default_rng(6)
    hidden = rng.normal(size=(2 * TOKENS, WIDTH)).astype(np.float32)
    kernel = rng.normal(size=(WIDTH, 24)).astype(np.float32)
    labels = rng.integers(0, 23, 2 * TOKENS).astype(np.int32)
    weights = rng.choice([0.0, 0.5, 2.0], 2 * TOKENS).astype(np.float32)
    scales = (2.0, -3.0, 0.5)
    options = {"num_classes": 23, "vocab_axis": "tensor", "gather_axis": "fsdp", "vocab_block": vocab_block}

    def body(hidden, kernel, labels, weights):
        loss = weighed(labels, weights, scales, **options, **ALL_TERMS)
        gradients, sums = jax.grad(loss, (0, 1), has_aux=True)(hidden, kernel)
        return jax.lax.psum(jnp.stack(parts(sums)), "fsdp"), *gradients

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=auto, devices=jax.devices()[:4])
    rows, both = P("fsdp"), P("fsdp", "tensor")
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(rows, both, rows, rows), out_specs=(P(), rows, both), check_vma=False
    )
    sums, on_hidden, on_kernel = jax.jit(mapped)(hidden, kernel, labels, weights)
    hidden, kernel = np.float64(hidden), np.float64(kernel[:, :23])
    expected_sums, on_logits = oracle(hidden @ kernel, labels, weights, scales, **ALL_TERMS)
    assert_close(sums, np.stack(expected_sums))
    assert_close(on_hidden, on_logits @ kernel.T)
    assert_close(on_kernel[:, :23], hidden.T @ on_logits)
    assert (on_kernel[:, 23:] == 0).all()
