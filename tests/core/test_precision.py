"""The dtype policy: what it casts, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.precision import LossScaling, Policy


def test_default_is_float32_throughout():
    policy = Policy()
    assert (policy.params, policy.compute, policy.output) == ("float32", "float32", "float32")
    params = {"w": jnp.ones(3), "count": jnp.int32(2)}
    cast = policy.cast_to_compute(params)
    jax.tree.map(np.testing.assert_array_equal, cast, params)
    assert {name: leaf.dtype.name for name, leaf in cast.items()} == {"w": "float32", "count": "int32"}


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
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
    """The reason for float32 parameters in the state."""
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
        ({"params": "float16"}, "Policy.params is float16; it can be float32"),
        ({"compute": "int8"}, "Policy.compute is int8"),
        ({"output": "bfloat16"}, "Policy.output is bfloat16; it can be float32"),
    ],
)
def test_refused_dtypes(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**fields)


def test_dtypes_may_be_given_as_dtypes():
    assert Policy(compute=jnp.bfloat16).cast_to_compute(jnp.ones(2)).dtype == jnp.bfloat16


def scales_of(scaling, finite):
    """The scale before each step, and after the last."""
    state, update = scaling.init(), jax.jit(scaling.update)
    scales = [float(state.scale)]
    for step in finite:
        state = update(state, jnp.bool_(step))
        scales.append(float(state.scale))
    return scales


def test_the_scale_grows_after_an_interval_without_overflow_and_is_halved_by_one():
    scaling = LossScaling(initial=8.0, growth_interval=3, ceiling=64.0)
    assert scales_of(scaling, [1, 1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1]) == [8, 8, 8, 16, 16, 16, 8, 8, 8, 4, 4, 4, 8]


def test_the_scale_stays_between_floor_and_ceiling():
    """A scale without a ceiling would reach infinity."""
    scaling = LossScaling(initial=4.0, growth_interval=1, floor=2.0, ceiling=16.0)
    assert scales_of(scaling, [1] * 5) == [4, 8, 16, 16, 16, 16]
    assert scales_of(scaling, [0] * 4) == [4, 2, 2, 2, 2]
    assert scales_of(scaling, [0] * 4 + [1]) == [4, 2, 2, 2, 2, 4]


def test_the_factor_is_the_scale_over_the_divisor():
    scaling = LossScaling(initial=2.0**10, divisor=2.0**14)
    factor = scaling.factor(scaling.init())
    assert (float(factor), factor.dtype) == (2.0**-4, jnp.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"floor": 0.0}, "needs 0 < floor <= initial <= ceiling, got floor 0.0"),
        ({"initial": 2.0**25}, "initial 33554432.0, ceiling 16777216.0"),
        ({"ceiling": float("inf")}, "ceiling inf"),
        ({"initial": float("nan")}, "initial nan"),
        ({"growth_interval": 0}, "growth_interval must be a whole number from 1 .* got 0"),
        ({"divisor": 0.0}, "divisor must be above 0, got 0.0"),
    ],
)
def test_refused_scalings(fields, message):
    with pytest.raises(ValueError, match=message):
        LossScaling(**fields)
