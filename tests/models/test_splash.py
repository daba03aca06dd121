"""The TPU's attention kernel, interpreted on the CPU, against the plain form; it lowers for a TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import distance, inputs, output_and_gradients, run, segments_of

from jaxtrain.config import Config, DataConfig, MeshConfig, TrainConfig, llama
from jaxtrain.models.kernels import splash
from jaxtrain.models.kernels.attention import attend
from jaxtrain.runtime.mesh import by_rows, make_mesh
from jaxtrain.training.program import make_program


@pytest.mark.parametrize(
    ("length", "num_heads", "num_groups", "batch_size"),
    [(128, 4, 2, 2), (256, 2, 2, 1), (384, 4, 1, 1), (1024, 2, 1, 1)],
)
def test_kernel_agrees_with_plain_attention(length, num_heads, num_groups, batch_size):
    """Output and gradients in float32; lengths of one block, of several, and with longer blocks of keys."""
    arguments = inputs(length, num_heads, num_groups, batch_size=batch_size)
    actual = run(functools.partial(splash.splash_attention, interpret=True), *arguments)
    expected = run(functools.partial(attend, kernel="xla"), *arguments)
    assert distance(actual, expected) < 3e-6


@pytest.mark.parametrize(
    ("options", "num_groups"),
    [
        ({"window": 2}, 2),
        ({"window": 100}, 1),
        ({"softcap": 0.7}, 2),
        ({"segments": True}, 1),
        ({"window": 100, "softcap": 0.7, "segments": True}, 2),
        ({"window": 100, "softcap": 0.7, "segments": True}, 1),
    ],
)
def test_window_soft_cap_and_segments_agree_with_plain_attention(options, num_groups):
    """Windows and segments that end inside a block of 128, and windows that skip a block."""
    options = dict(options)
    arguments = inputs(384, 2, num_groups)
    if options.pop("segments", False):
        options["segment_ids"] = segments_of(2, 384)
    actual = run(functools.partial(splash.splash_attention, interpret=True, **options), *arguments)
    expected = run(functools.partial(attend, kernel="xla", **options), *arguments)
    assert distance(actual, expected) < 3e-6


def test_kernel_agrees_with_float64():
    arguments = inputs(128, 2, 1, batch_size=1)
    options = {"window": 50, "softcap": 2.0, "segment_ids": segments_of(1, 128)}
    actual = run(functools.partial(splash.splash_attention, interpret=True, **options), *arguments)
    assert distance(actual, output_and_gradients(*arguments, **options)) < 3e-6


def test_a_query_sees_no_later_key():
    query, key, value, _ = inputs(256, 2, 1, batch_size=1)
    attention = jax.jit(functools.partial(splash.splash_attention, interpret=True))
    before = attention(query, key, value)
    after = attention(query, *(np.concatenate([x[:, :200], 1 + x[:, 200:]], axis=1) for x in (key, value)))
    np.testing.assert_array_equal(before[:, :200], after[:, :200])
    assert (before[:, 200:] != after[:, 200:]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize("length", [64, 200])
def test_a_length_that_is_no_multiple_of_the_blocks_is_an_error(length):
    query, key, value, _ = inputs(length, 2, 1)
    with pytest.raises(ValueError, match=f'"splash" needs a multiple of 128 tokens, got {length}: use "xla"'):
        attend(query, key, value, kernel="splash")


def test_cached_keys_are_an_error():
    query, key, value, _ = inputs(128, 2, 1)
    with pytest.raises(ValueError, match='"splash" takes no positions: use "xla"'):
        attend(query, key, value, jnp.zeros((2, 128), jnp.int32), kernel="splash")


@pytest.mark.parametrize("options", [{}, {"window": 300, "softcap": 30.0, "segments": True}])
@pytest.mark.parametrize("width", [64, 128])
def test_kernel_lowers_for_a_tpu(width, options):
    """Forward and backward are one kernel each, and no scores [T, T] are left."""
    options = dict(options)
    query, key = (jax.ShapeDtypeStruct((2, 1024, n, width), jnp.bfloat16) for n in (4, 2))
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32) if options.pop("segments", False) else None

    def loss(query, key, value, ids):
        mixed = attend(query, key, value, segment_ids=ids, kernel="splash", **options)
        return jnp.sum(mixed.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(query, key, key, ids)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 2
    assert "1024x1024" not in text


@pytest.mark.parametrize(("sizes", "segments"), [((1, 1, 1), False), ((2, 2, 2), True)])
def test_the_whole_train_step_lowers_for_a_tpu(sizes, segments):
    model = llama(2, 4, 64, 96, 256, num_kv_heads=2, attention="splash", attention_window=100, attention_softcap=30.0)
    config = Config(
        data=DataConfig(store="unused"),
        model=dataclasses.replace(model, vocab_multiple=8),
        train=TrainConfig(batch_size=8, seq_len=256, precision="bfloat16"),
        mesh=MeshConfig(*sizes),
    )
    mesh = make_mesh(config.mesh)
    program = make_program(config, mesh, 257)
    batch = program.abstract_batch
    if segments:
        batch = batch | {"segment_ids": jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=by_rows(mesh))}
    text = program.train_step.trace(program.abstract_state, batch).lower(lowering_platforms=("tpu",)).as_text()
    # One forward, in a loop over layers, and one backward; the parts of weights are gathered again, attention is not.
    assert text.count("@tpu_custom_call") == 2
    assert "256x256xf32" not in text
