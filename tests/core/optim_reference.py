"""Random trees of parameters, and comparisons of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPES = {"dense": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}}


def random_tree(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) + 0.3, dtype)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def assert_close(actual, expected, rtol=1e-6):
    """The largest difference in a leaf is at most rtol of its largest number."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(initial=0))

    jax.tree.map(check, actual, expected)


def run(optimizer, params, gradients):
    """The parameters after some steps of any optax transformation, and its state."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = jax.jit(optimizer.init)(params)

        @jax.jit
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for grads in gradients:
            params, state = step(params, state, grads)
    return params, state
