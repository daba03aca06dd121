"""The product of sorted rows with the matrices of their groups, against JAX's, which multiplies all rows by all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.kernels.grouped import grouped_matmul

SIZES = [[0, 100, 3, 0, 57, 0], [160, 0, 0, 0, 0, 0], [16, 32, 15, 17, 40, 40], [0, 0, 0, 0, 1, 159]]


@pytest.mark.parametrize("num_rows", [160, pytest.param(5, marks=pytest.mark.slow)])
def test_products_and_gradients_equal_ragged_dot(num_rows):
    """Groups that are empty, end within a block or fill several; fewer rows than groups."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (num_rows, 8), (6, 8, 12), (num_rows, 12)
    x, kernel, probe = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))

    def run(function, x, kernel, sizes):
        y, pull = jax.vjp(lambda x, kernel: function(x, kernel, sizes), x, kernel)
        return y, *pull(probe.astype(y.dtype))

    run = jax.jit(run, static_argnums=0)
    for sizes in SIZES if num_rows == 160 else [[0, 2, 1, 0, 2, 0], [0, 0, 0, 0, 0, 5]]:
        sizes = jnp.int32(sizes)
        expected = run(jax.lax.ragged_dot, x, kernel, sizes)
        for a, b in zip(run(grouped_matmul, x, kernel, sizes), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)
        for a, b in zip(run(grouped_matmul, *half((x, kernel)), sizes), expected, strict=True):
            assert a.dtype == jnp.bfloat16
            assert jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) < 2**-7 * jnp.linalg.norm(b.ravel())


def test_vmap_over_any_operands():
    """Evaluation by position maps the mask of the loss alone."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = (jax.random.normal(key, shape) for key, shape in zip(keys, ((3, 6, 4), (2, 4, 5)), strict=True))
    sizes = jnp.int32([2, 4])
    product = jax.jit(jax.value_and_grad(lambda x, factor: jnp.sum(jnp.sin(grouped_matmul(x, kernel, sizes)) * factor)))
    factors = jnp.arange(3.0)
    for mapped in ((None, 0), (0, 0)):
        found = jax.vmap(product, mapped)(x if mapped[0] == 0 else x[1], factors)
        for i in range(3):
            one = product(x[i if mapped[0] == 0 else 1], factors[i])
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5), found, one)


def half(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
