"""The dtype policy: what it casts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.precision import Policy


def test_default_is_float32_throughout():
    policy = Policy()
    assert (policy.params, policy.compute, policy.output) == ("float32", "float32", "float32")
    params = {"w": jnp.ones(3), "count": jnp.int32(2)}
    cast = policy.cast_to_compute(params)
    jax.tree.map(np.testing.assert_array_equal, cast, params)
    assert {name: leaf.dtype.name for name, leaf in cast.items()} == {"w": "float32", "count": "int32"}


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_casts_floating_leaves_alone(compute):
    tree = {
        "w": jnp.array([1.0, 1 - 6e-4]),
        "half": jnp.ones(2, jnp.bfloat16),
        "n": jnp.int32(3),
        "on": jnp.array(True),
    }
    cast = Policy(compute=compute).cast_to_compute(tree)
    assert {name: leaf.dtype.name for name, leaf in cast.items()} == {
        "w": compute,
        "half": compute,
        "n": "int32",
        "on": "bool",
    }
    np.testing.assert_array_equal(cast["w"], np.array([1.0, 1 - 6e-4]).astype(compute))


def test_bfloat16_loses_small_updates():
    """R-B19: why the parameters of the state are float32."""
    one = Policy(compute="bfloat16").cast_to_compute(jnp.ones(()))
    assert one - jnp.bfloat16(6e-4) == 1
    assert jnp.ones(()) - 6e-4 < 1


def test_gradients_flow_through_the_cast():
    """The gradient of the float32 master is float32."""
    policy = Policy(compute="bfloat16")
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(policy.cast_to_compute(p))).astype(jnp.float32))(jnp.ones(3))
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": "bfloat16"}, "Policy.params is bfloat16; it can be float32"),
        ({"compute": "float16"}, "Policy.compute is float16; it can be float32 or bfloat16"),
        ({"compute": "int8"}, "Policy.compute is int8"),
        ({"output": "bfloat16"}, "Policy.output is bfloat16; it can be float32"),
    ],
)
def test_refused_dtypes(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**fields)


def test_dtypes_may_be_given_as_dtypes():
    assert Policy(compute=jnp.bfloat16).cast_to_compute(jnp.ones(2)).dtype == jnp.bfloat16
