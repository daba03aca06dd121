"""Attention by XLA against plain float64, on one device and in parts; which kernel is chosen, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import distance, inputs, output_and_gradients, run, segments_of
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig
from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.attention import (
    _rotate_halves,
    _rotate_heads,
    attend,
    choose_kernel,
    rope_tables,
    rotate,
)
from jaxtrain.models.remat import rematerialize
from jaxtrain.runtime.mesh import make_mesh

T, S = 7, 12
POSITIONS = np.array([[0, 3, 4, 5, 9, 10, 11], [2, 2, 1, 0, 11, 7, 8]], np.int32)
OPTIONS = list(itertools.product([None, 3], [None, 0.7], [False, True], [False, True]))


@pytest.mark.parametrize(
    ("num_groups", "window", "softcap", "segments", "positions"),
    [
        *((4 if all(case[:2]) == all(case[2:]) else 2, *case) for case in OPTIONS),
        (4, None, None, False, True),
        (1, None, None, False, False),
    ],
)
def test_xla_agrees_with_float64(num_groups, window, softcap, segments, positions):
    """Output and gradients over all combinations of arguments; with positions there are fewer queries than keys."""
    arguments = inputs(T if positions else S, 4, num_groups, num_keys=S)
    places = POSITIONS if positions else None
    options = {"window": window, "softcap": softcap, "segment_ids": segments_of(2, S) if segments else None}
    actual = run(functools.partial(attend, positions_BT=places, kernel="xla", **options), *arguments)
    expected = output_and_gradients(*arguments, places, **options)
    assert distance(actual, expected) < 1e-6


@pytest.mark.parametrize("option", [{"window": 3}, {"softcap": 0.7}, {"segment_ids": segments_of(2, S)}])
def test_every_option_matters(option):
    query, key, value, _ = inputs(S, 4, 2)
    assert distance([attend(query, key, value, **option)], [np.asarray(attend(query, key, value))]) > 0.1


def test_a_window_of_one_key_is_the_query_s_own_and_one_of_all_is_none():
    query, key, value, _ = inputs(S, 4, 2)
    np.testing.assert_array_equal(attend(query, key, value, window=1), np.repeat(value, 2, axis=2))
    np.testing.assert_array_equal(attend(query, key, value, window=S), attend(query, key, value))
    assert (attend(query, key, value, window=S - 1) != attend(query, key, value)).any()


def test_scores_in_bfloat16_are_added_in_float32():
    """Inputs and output are rounded, and the weights before the product with the values: 2^-9 each."""
    arguments = inputs(S, 4, 2, dtype=jnp.bfloat16)
    actual = run(functools.partial(attend, window=5, softcap=2.0), *arguments)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in actual)
    assert distance(actual, output_and_gradients(*arguments, window=5, softcap=2.0)) < 2**-6


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"segments": True}, {"window": 3, "softcap": 0.7, "segments": True}]
)
def test_rows_and_heads_in_parts_give_the_same(options):
    """Under `shard_map` on eight devices, four parts of the rows by two of the heads, forward and backward."""
    options = dict(options)
    arguments = inputs(S, 4, 2, batch_size=8)
    ids = segments_of(8, S) if options.pop("segments", False) else None
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows, heads = P(("data", "fsdp")), P(("data", "fsdp"), None, "tensor")

    def body(query, key, value, ids):
        return attend(query, key, value, segment_ids=ids, kernel="xla", **options)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    actual = run(mapped, *arguments, ids)
    assert distance(actual, output_and_gradients(*arguments, segment_ids=ids, **options)) < 1e-6


A100, H100 = {"capability": (8, 0)}, {"capability": (9, 0)}


@pytest.mark.parametrize(
    ("platform", "dtype", "seq_len", "head_dim", "more", "kernel"),
    [
        ("cpu", "float32", 4096, 128, {}, "xla"),
        ("cpu", "bfloat16", 4096, 128, {}, "xla"),
        ("tpu", "bfloat16", 4096, 128, {}, "splash"),
        ("tpu", "float32", 128, 64, {}, "splash"),
        ("tpu", "bfloat16", 200, 128, {}, "xla"),
        ("tpu", "bfloat16", 4096, 128, {"segments": True, "softcap": 30.0}, "splash"),
        ("tpu", "bfloat16", 4096, 128, {"positions": True}, "xla"),
        ("gpu", "bfloat16", 4096, 128, A100, "cudnn"),
        ("gpu", "float16", 200, 64, A100, "cudnn"),
        ("gpu", "float32", 4096, 128, H100, "xla"),
        ("gpu", "bfloat16", 4096, 256, A100, "xla"),
        ("gpu", "bfloat16", 4096, 256, H100, "cudnn"),
        ("gpu", "bfloat16", 4096, 264, H100, "xla"),
        ("gpu", "bfloat16", 4096, 100, H100, "xla"),
        ("gpu", "bfloat16", 4096, 128, {"segments": True, **H100}, "xla"),
        ("gpu", "bfloat16", 4096, 128, {"softcap": 30.0, **H100}, "xla"),
        ("gpu", "bfloat16", 4096, 128, {"positions": True, **H100}, "xla"),
        ("gpu", "float16", 4096, 128, {"capability": (7, 5)}, "xla"),  # T4
        ("gpu", "bfloat16", 4096, 128, {}, "xla"),  # AMD
    ],
)
def test_the_fastest_kernel_that_does_it_is_chosen(platform, dtype, seq_len, head_dim, more, kernel):
    for asked in ("auto", kernel):
        assert choose_kernel(asked, platform, dtype, seq_len, head_dim, **more) == kernel


@pytest.mark.parametrize(
    ("kernel", "arguments", "more", "message"),
    [
        ("splash", ("float32", 200, 8), {}, '"splash" needs a multiple of 128 tokens, got 200: use "xla"'),
        ("splash", ("float32", 128, 8), {"positions": True}, '"splash" takes no positions: use "xla"'),
        ("cudnn", ("bfloat16", 128, 8), {"positions": True, **H100}, '"cudnn" takes no positions: use "xla"'),
        ("cudnn", ("bfloat16", 128, 8), {}, "an NVIDIA GPU of compute capability 8.0 or later, and there is none: use"),
        ("cudnn", ("float16", 128, 8), {"capability": (7, 5)}, "8.0 or later, and this one has 7.5: use"),
        ("cudnn", ("float32", 128, 8), H100, 'in bfloat16 or float16, not in float32: use "xla"'),
        ("cudnn", ("float16", 128, 12), H100, "a head dimension that is a multiple of 8 and at most 256, got 12: use"),
        ("cudnn", ("float16", 128, 136), A100, "a multiple of 8 and at most 128, got 136: use"),
        (
            "cudnn",
            ("float16", 128, 8),
            {"segments": True, **H100},
            '"cudnn" takes no segment ids; "xla" does, at 5 times',
        ),
        ("cudnn", ("float16", 128, 8), {"softcap": 30.0, **H100}, '"cudnn" has no soft-cap, got 30: use "xla"'),
        ("flash", ("float32", 128, 8), {}, "unknown attention kernel 'flash': choose auto, xla, splash or cudnn"),
    ],
)
def test_an_unsupported_argument_is_an_error_with_the_remedy(kernel, arguments, more, message):
    with pytest.raises(ValueError, match=message):
        choose_kernel(kernel, "cpu", *arguments, **more)


@pytest.mark.parametrize("shape", [(2, 7, 2, 4), (2, 8, 8), (3, 8, 2, 4)])
def test_values_and_keys_have_one_shape(shape):
    with pytest.raises(AssertionError, match=r"\(2, 8, 2, 4\)|rank"):
        attend(jnp.zeros((2, 8, 4, 4)), jnp.zeros((2, 8, 2, 4)), jnp.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keys": 9}, r"\[2, 9, 8\]"),  # without the queries' positions
        ({"segment_ids": np.zeros((2, 7), np.int32)}, r"\(2, 7\)"),
        ({"kernel": "flash"}, "unknown attention kernel 'flash'"),
        ({"kernel": "cudnn"}, '"cudnn" needs an NVIDIA GPU'),
        ({"kernel": "splash"}, '"splash" needs a multiple of 128 tokens, got 8: use "xla"'),
    ],
)
def test_arguments_that_do_not_fit_are_errors(monkeypatch, change, message):
    monkeypatch.setattr(cudnn, "capability", lambda device: None)  # also where there is a GPU
    change = dict(change)
    query, key, value, _ = inputs(8, 4, 2, num_keys=change.pop("num_keys", 8))
    with pytest.raises((ValueError, AssertionError), match=message):
        attend(query, key, value, **change)


def test_auto_passes_the_arguments(monkeypatch):
    """On a GPU `auto` takes XLA for each argument that cuDNN does not support."""
    gpu = type("Device", (), {"platform": "gpu", "compute_capability": "9.0"})()
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    called = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda query, *_, **options: called.append(options) or query)
    query, key, value, _ = inputs(8, 4, 2, dtype=jnp.bfloat16)
    attend(query, key, value, window=3)
    attend(query, key, value, window=8)
    assert [options["local_window_size"] for options in called] == [(2, 0), None]
    for options in (
        {"softcap": 1.0},
        {"segment_ids": segments_of(2, 8)},
        {"positions_BT": jnp.zeros((2, 8), jnp.int32)},
    ):
        np.testing.assert_array_equal(
            attend(query, key, value, **options), attend(query, key, value, kernel="xla", **options)
        )
    attend(*(x.astype(np.float32) for x in (query, key, value)))
    assert len(called) == 2


@pytest.mark.parametrize("kernel", ["xla", "splash", "cudnn"])
def test_the_mixture_is_a_residual_once(monkeypatch, kernel):
    """A layer's residuals hold queries and mixture once, and the kernel's own residuals."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(cudnn, "capability", lambda device: cudnn.AMPERE)
    query, key = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2))
    matrix = jax.ShapeDtypeStruct((256, 32), jnp.bfloat16)

    def layer(query, key, value, matrix):
        return attend(query, key, value, kernel=kernel).reshape(2, 256, -1) @ matrix

    layer = rematerialize(layer, "minimal", gathered=False, looped=False)
    kept = []

    def watch(*arguments):
        output, pullback = jax.vjp(layer, *arguments)
        kept.extend(leaf.size for leaf in jax.tree.leaves(pullback))
        return output

    jax.eval_shape(watch, query, key, key, matrix)
    assert kept.count(2 * 256 * 4 * 64) == 2
    assert kept.count(2 * 256 * 4) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_forms_of_the_rotation_turn_pairs_and_their_gradients_turn_back(dtype):
    x, weights = (jax.random.normal(jax.random.key(i), (2, 7, 3, 8)).astype(dtype) for i in (1, 2))
    cos, sin = tables = rope_tables(jnp.broadcast_to(jnp.arange(7)[None], (2, 7)), 8, 100.0)
    angle = np.arange(7.0)[:, None] * 100.0 ** (-np.arange(4.0) / 4)
    np.testing.assert_allclose(np.arctan2(sin, cos)[1, :4, 0], angle[:4], rtol=1e-5)
    turn = np.exp(1j * angle)[None, :, None, :]
    pairs, weight_pairs = (np.float64(a)[..., :4] + 1j * np.float64(a)[..., 4:] for a in (x, weights))
    for form in (rotate, _rotate_halves, _rotate_heads):
        loss = lambda x, form=form: jnp.sum((form(x, tables) * weights).astype(jnp.float32))  # noqa: E731
        found = form(x, tables), jax.grad(loss)(x)
        for actual, expected in zip(found, (pairs * turn, weight_pairs * turn.conj()), strict=True):
            assert actual.dtype == x.dtype
            wanted = np.concatenate([expected.real, expected.imag], axis=-1)
            np.testing.assert_allclose(np.float64(actual), wanted, atol=1e-5 if dtype == "float32" else 0.05)
