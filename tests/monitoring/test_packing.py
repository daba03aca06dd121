"""Metrics in one array and out of it again."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.monitoring.packing import pack

METRICS = {"loss": np.float32(2.5), "layer_grad_norm": np.arange(3, dtype=np.float32), "skipped": np.float32(np.nan)}


def test_what_was_packed_under_jit_comes_out_as_it_was():
    packed = jax.jit(lambda metrics: pack(dict(sorted(metrics.items(), reverse=True))))(METRICS)
    assert packed.metrics.shape == (5,)
    out = packed.unpack()
    assert list(out) == ["skipped", "loss", "layer_grad_norm"]
    for name, value in METRICS.items():
        assert (out[name].shape, out[name].dtype) == (np.shape(value), np.float32)
        np.testing.assert_array_equal(out[name], value)


def test_it_is_one_leaf_of_a_pytree():
    packed = pack({name: jnp.asarray(value) for name, value in METRICS.items()})
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(5,)]
    doubled = jax.tree.map(lambda x: 2 * x, packed).unpack()
    np.testing.assert_array_equal(doubled["layer_grad_norm"], [0, 2, 4])
