"""Layer diagnostics against plain arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.guard import skip_bad_steps
from jaxtrain.monitoring.layers import DIAGNOSTICS, drop_unsampled, layer_diagnostics
from jaxtrain.optim import clipped_adamw


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(scale * random.normal(size=shape), jnp.float32)  # noqa: E731
    return {"embedding": array(5, 4), "layers": {"up": {"kernel": array(3, 4, 2)}, "norm": {"scale": array(3, 4)}}}


def measure(params, grads, updates, state, b2=0.95, eps=1e-8):
    diagnose = jax.jit(functools.partial(layer_diagnostics, b2=b2, eps=eps))
    return jax.tree.map(np.asarray, diagnose(params, grads, updates, state))


def norm_of_layer(values, layer):
    return np.sqrt(sum(np.sum(np.square(np.float64(leaf[layer]))) for leaf in jax.tree.leaves(values["layers"])))


def test_norms_of_each_layer():
    params, grads, updates = tree(0), tree(1, 3.0), tree(2, 0.1)
    out = measure(params, grads, updates, optax.EmptyState())
    assert set(out) == set(DIAGNOSTICS) - {"adam_frozen_share"}  # there is no Adam
    for layer in range(3):
        np.testing.assert_allclose(out["layer_grad_norm"][layer], norm_of_layer(grads, layer), rtol=1e-6)
        ratio = norm_of_layer(updates, layer) / norm_of_layer(params, layer)
        np.testing.assert_allclose(out["layer_update_ratio"][layer], ratio, rtol=1e-6)


def test_layers_in_a_list_or_under_another_axis_and_parts_that_are_no_layers():
    one, two = jnp.full((2, 3), 2.0), jnp.full((3, 4), 3.0)
    listed = [{"w": one, "gain": jnp.ones(())}, {"w": two}]
    cases = {
        "list": ({"layers": listed}, [np.sqrt(25), np.sqrt(108)]),
        "blocks by number": ({"blocks": {0: {"w": one}, 1: {"w": two}}}, [np.sqrt(24), np.sqrt(108)]),
        "axis 1": ({"layers": {"w": jnp.ones((3, 2, 5)), "norm": jnp.ones((4, 2))}}, [np.sqrt(19)] * 2),
        "other sizes": ({"layers": {"up": one, "down": two}}, []),
        "matrices or vectors": ({"layers": {"wq": one, "wk": one}}, []),
        "an array": ({"layers": one}, []),
    }
    for name, (params, norms) in cases.items():
        grads = jax.tree.map(lambda x: 2 * x, params)
        out = jax.eval_shape(lambda p, g: layer_diagnostics(p, g, p, (), b2=0.9, eps=1e-8), params, grads)
        assert out["layer_grad_norm"].shape == (len(norms),), name
        out = layer_diagnostics(params, grads, params, (), b2=0.9, eps=1e-8)
        np.testing.assert_allclose(out["layer_grad_norm"], [2 * norm for norm in norms], rtol=1e-6, err_msg=name)


def test_a_model_without_layers_has_none():
    out = measure({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, optax.EmptyState())
    assert out["layer_grad_norm"].shape == out["layer_update_ratio"].shape == (0,)


@pytest.mark.parametrize(
    "make",
    [
        lambda b2, eps: clipped_adamw(1e-3, b2=b2, eps=eps, clip_norm=None),
        lambda b2, eps: skip_bad_steps(clipped_adamw(1e-3, b2=b2, eps=eps, clip_norm=None)),
        lambda b2, eps: optax.adam(1e-3, b2=b2, eps=eps),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_frozen_parameters_are_dominated_by_eps(make, num_steps):
    """8 numbers with sqrt(nu_hat) = 9.9 eps, 12 with 10.1 eps, and 4 without a gradient, which do not count."""
    eps, b2 = 1e-4, 0.9
    grads = jnp.asarray([9.9e-4] * 8 + [10.1e-4] * 12 + [0.0] * 4, jnp.float32).reshape(4, 6)
    params, grads = {"w": jnp.ones((4, 6))}, {"w": grads}
    optimizer = optax.with_extra_args_support(make(b2, eps))
    state = optimizer.init(params)
    assert np.isnan(measure(params, grads, params, state, b2, eps)["adam_frozen_share"])  # it has not yet moved
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for _ in range(num_steps):
            updates, state = jax.jit(optimizer.update)(grads, state, params)
    np.testing.assert_allclose(measure(params, grads, updates, state, b2, eps)["adam_frozen_share"], 8 / 20, rtol=1e-6)


def test_a_gradient_so_small_that_its_square_underflows_is_frozen():
    params, grads = {"w": jnp.ones(2)}, {"w": jnp.full(2, 1e-30)}
    optimizer = clipped_adamw(1e-3, clip_norm=None)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    assert measure(params, grads, params, state)["adam_frozen_share"] == 1


def test_only_sampled_steps_have_diagnostics():
    measured = dict.fromkeys(DIAGNOSTICS, 1.0)
    for done in range(1, 7):
        kept = drop_unsampled({"loss": 2.0, **measured}, done, 3)
        assert kept == ({"loss": 2.0, **measured} if done in (3, 6) else {"loss": 2.0})
    assert drop_unsampled({"loss": 2.0, **measured}, 5, 0) == {"loss": 2.0}


OTHERS = {
    "sgd": (lambda: optax.sgd(1e-2, momentum=0.9), False),
    "lion": (lambda: optax.lion(1e-3), False),
    "adafactor": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2), False),
    "rmsprop": (lambda: optax.rmsprop(1e-3), False),
    "novograd": (lambda: optax.novograd(1e-3), True),  # one second moment per array
    "partition": (
        lambda: optax.partition(
            {"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-2)}, {"embedding": "sgd", "layers": "adam"}
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_optimizer_gets_the_diagnostics_that_apply(name):
    make, has_second_moments = OTHERS[name]
    params, grads, optimizer = tree(0), tree(1), optax.with_extra_args_support(make())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax needs them
        updates, state = jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params))()
    out = measure(params, grads, updates, state)
    assert np.isfinite(out["layer_update_ratio"]).all()
    assert ("adam_frozen_share" in out) == has_second_moments
