"""The optimizer inside optax's wrappers, and its state and schedule as optax has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_reference import assert_close, random_tree, run

from jaxtrain.optim import clipped_adamw


def test_update_needs_the_parameters():
    optimizer = clipped_adamw(0.1)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


STATIC = ("mask", "b1", "b2", "eps", "weight_decay", "clip_norm")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), tx, optax.scale(1.0)),
        lambda tx: optax.masked(tx, {"dense": {"kernel": True, "bias": True}, "norm": {"scale": True}}),
        lambda tx: optax.multi_transform({"x": tx}, {"dense": {"kernel": "x", "bias": "x"}, "norm": {"scale": "x"}}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax.inject_hyperparams(clipped_adamw, static_args=STATIC)(0.1),
    ],
    ids=["chain", "masked", "multi_transform", "apply_if_finite", "MultiSteps", "inject_hyperparams"],
)
def test_inside_optax(wrap):
    """Under jit, inside optax's wrappers, the same three steps."""
    params, gradients = random_tree(0), [random_tree(i) for i in (1, 2, 3)]
    expected, _ = run(clipped_adamw(0.1), params, gradients)
    actual, _ = run(wrap(clipped_adamw(0.1)), params, gradients)
    assert_close(actual, expected)


def test_wrappers_of_optax_do_their_part():
    params, grads = random_tree(0), random_tree(1)
    kernel, rest = params["dense"]["kernel"], {"dense": {"kernel": False, "bias": True}, "norm": {"scale": True}}
    masked, _ = run(optax.masked(clipped_adamw(0.1, clip_norm=None), rest), params, [grads])
    alone, _ = run(clipped_adamw(0.1, clip_norm=None), params, [grads])
    assert_close(masked["norm"], alone["norm"])
    assert_close(masked["dense"]["kernel"], kernel + grads["dense"]["kernel"])  # optax.masked passes it through

    labels = jax.tree.map(lambda flag: "adam" if flag else "sgd", rest)
    mixed, _ = run(
        optax.multi_transform({"adam": clipped_adamw(0.1, clip_norm=None), "sgd": optax.sgd(1.0)}, labels),
        params,
        [grads],
    )
    assert_close(mixed["dense"], {"kernel": kernel - grads["dense"]["kernel"], "bias": alone["dense"]["bias"]})

    halves = [jax.tree.map(lambda g, s=s: g * s, grads) for s in (0.5, 1.5)]
    twice, _ = run(optax.MultiSteps(clipped_adamw(0.1), 2).gradient_transformation(), params, halves)
    assert_close(twice, run(clipped_adamw(0.1), params, [grads])[0])

    poisoned = {**grads, "norm": {"scale": jnp.full(4, jnp.nan)}}
    survived, state = run(optax.apply_if_finite(clipped_adamw(0.1), 3), params, [poisoned, grads])
    assert_close(survived, run(clipped_adamw(0.1), params, [grads])[0])
    assert optax.tree_utils.tree_get(state, "total_notfinite") == 1


def test_injected_learning_rate_may_be_changed():
    optimizer = optax.inject_hyperparams(clipped_adamw, static_args=STATIC)(0.1, weight_decay=0.0)
    params = jnp.ones((2, 2))
    state = optimizer.init(params)
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    updates, _ = jax.jit(optimizer.update)(params, state, params)
    np.testing.assert_allclose(updates, -0.25, rtol=1e-6)


def test_state_is_a_plain_pytree():
    """Abstract initialisation has the structure, shapes and dtypes of the real one, and no Python leaves."""
    params, optimizer = random_tree(0), clipped_adamw(lambda step: 0.1)
    state = optimizer.init(params)
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.weak_type))
    assert describe(jax.eval_shape(optimizer.init, params)) == describe(state)
    assert describe(jax.eval_shape(optimizer.update, params, state, params)[1]) == describe(state)


def test_the_schedule_counts_its_steps_or_receives_them():
    """The schedule receives 0, 1, 2, ... or the argument `step=`; the state holds the applied rate."""
    optimizer = clipped_adamw(lambda step: 0.5 ** step.astype(jnp.float32), weight_decay=0.0, clip_norm=None)
    params = jnp.ones((2, 2))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step, told, rate in ((0, None, 1.0), (1, None, 0.5), (2, 7, 2**-7), (3, None, 2**-3), (4, 0, 1.0)):
        extra = {} if told is None else {"step": jnp.int32(told)}
        updates, state = update(params, state, params, **extra)
        assert optax.tree_utils.tree_get(state, "learning_rate") == rate, step
        np.testing.assert_allclose(updates, -rate, rtol=1e-5)
