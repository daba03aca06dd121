"""AdamW and clipping against float64 numpy and hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optim_reference import assert_close, random_tree

from jaxtrain.optim import clip_by_global_norm, clipped_adamw, global_norm, scale_by_adam


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_bits_equal(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(np.asarray(a).tobytes(), np.asarray(b).tobytes()), actual, expected
    )


def reference_adamw(params, gradients, lr, b1, b2, eps, decay, clip_norm):
    """Yields the float64 parameters after each step; decay on the kernel alone."""
    zeros = jax.tree.map(np.zeros_like, params)
    mu, nu = zeros, zeros
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        factor = min(1, clip_norm / norm)
        grads = jax.tree.map(lambda g, factor=factor: g * factor, grads)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, nu, grads)
        on = {"dense": {"kernel": decay, "bias": 0.0}, "norm": {"scale": 0.0}}
        params = jax.tree.map(
            lambda p, m, v, wd, t=t: p - lr * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * p),
            params, mu, nu, on,
        )  # fmt: skip
        yield params


@pytest.mark.parametrize("b2", [0.95, 0.99, 0.999, 0.9999])
def test_first_steps_match_float64(b2):
    """The textbook's bias correction is off by 1.3e-5 at b2 = .999; steps 2 and 5 are clipped."""
    optimizer = clipped_adamw(0.1, b1=0.9, b2=b2, eps=1e-3, weight_decay=0.2, clip_norm=5.0)
    params = random_tree(0)
    gradients = [
        jax.tree.map(lambda g, s=scale: g * s, random_tree(i)) for i, scale in enumerate((0.1, 3, 0.5, 0.2, 9))
    ]
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    expected = reference_adamw(to_float64(params), map(to_float64, gradients), 0.1, 0.9, b2, 1e-3, 0.2, 5.0)
    before = to_float64(params)
    for grads, after in zip(gradients, expected, strict=True):
        updates, state = update(grads, state, params)
        # From the same float64 parameters, so that only the step itself is judged.
        assert_close(updates, jax.tree.map(np.subtract, after, before))
        params, before = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), after), after


@pytest.mark.parametrize("b2", [0.95, 0.99, 0.999])
def test_after_100_000_steps(b2):
    """Neither the moments nor the bias correction drift; the moments' closed form is summed in float64."""
    num_steps, b1, eps = 100_000, 0.9, 1e-8
    gradients = (np.random.default_rng(5).normal(size=(num_steps, 4)) + 0.3).astype(np.float32)
    transform = scale_by_adam(b1, b2, eps)

    @jax.jit
    def run(gradients):
        def body(carry, grads):
            updates, state = transform.update(grads, carry[1])
            return (updates, state), None

        return jax.lax.scan(body, (jnp.zeros(4), transform.init(jnp.zeros(4))), gradients)[0]

    updates, state = run(gradients)
    gradients = np.float64(gradients)
    age = np.arange(num_steps)[::-1, None]
    mu = ((1 - b1) * b1**age * gradients).sum(0)
    nu = ((1 - b2) * b2**age * gradients**2).sum(0)
    assert state.count == num_steps
    assert_close(state.mu, mu)
    assert_close(state.nu, nu, rtol=2e-6)  # a random walk of roundings, 1 / (1 - b2) steps long; halved by the root
    assert_close(updates, mu / (np.sqrt(nu) + eps))


def test_epsilon_is_outside_the_root():
    """With g = eps = 1e-8 gives 1/2; inside the root it would give 1e-4."""
    optimizer = clipped_adamw(1.0, eps=1e-8, weight_decay=0.0, clip_norm=None)
    params = jnp.ones(2)
    updates, _ = optimizer.update(jnp.array([1e-8, -1e-8]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.5, 0.5], rtol=1e-6)


def test_updates_do_not_depend_on_the_loss_scale():
    """Bit for bit, for a power of two and a negligible eps."""
    optimizer = clipped_adamw(1.0, eps=1e-30, weight_decay=0.0, clip_norm=None)
    params, grads = random_tree(0), random_tree(1)
    large = jax.tree.map(lambda g: g * 1024, grads)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    assert_bits_equal(update(large, state, params)[0], update(grads, state, params)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_dtypes_of_the_state(dtype, mu_dtype):
    """The moments of narrow parameters are float32; `mu_dtype` changes the first."""
    optimizer = clipped_adamw(0.1, mu_dtype=mu_dtype)
    params = random_tree(0, dtype=dtype)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(random_tree(1, dtype=dtype), state, params)

    def dtypes(tree):
        return {jnp.dtype(leaf.dtype).name for leaf in jax.tree.leaves(tree)}

    for each in (state, after):
        assert dtypes(optax.tree_utils.tree_get(each, "mu")) == {"bfloat16" if mu_dtype else "float32"}
        assert dtypes(optax.tree_utils.tree_get(each, "nu")) == {"float32"}
        assert dtypes(optax.tree_utils.tree_get(each, "learning_rate")) == {"float32"}
    assert dtypes(updates) == {jnp.dtype(dtype).name}
    assert jax.tree.structure(after) == jax.tree.structure(optimizer.init(params))


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_bfloat16_parameters_get_the_float32_step(b2):
    """With b2 rounded to bfloat16, .999 is 1 and the step is NaN."""
    optimizer = clipped_adamw(0.1, b2=b2, weight_decay=0.2, clip_norm=1.0)
    narrow, grads = random_tree(0, dtype=jnp.bfloat16), random_tree(1, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (narrow, grads))
    updates, _ = optimizer.update(grads, optimizer.init(narrow), narrow)
    expected = next(iter(reference_adamw(*map(to_float64, (wide[0], [wide[1]])), 0.1, 0.9, b2, 1e-8, 0.2, 1.0)))
    assert_close(updates, jax.tree.map(np.subtract, expected, to_float64(narrow)), rtol=2**-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_zero_gradients_in_narrow_dtypes(dtype):
    """1e-8 is 0 in float16, and 0/0 is NaN."""
    optimizer = clipped_adamw(0.1, weight_decay=0.0)
    params = random_tree(0, dtype=dtype)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert all((u == 0).all() for u in jax.tree.leaves(updates))


def test_decay_alone():
    """A parameter p becomes p * (1 - lr * decay); it is not clipped and never enters the moments."""
    optimizer = clipped_adamw(0.03, weight_decay=0.5, clip_norm=1e-9)
    params = random_tree(0)
    state = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    after = optax.apply_updates(params, updates)
    expected = np.float32(np.float64(params["dense"]["kernel"]) * (1 - 0.03 * 0.5))
    np.testing.assert_array_max_ulp(np.asarray(after["dense"]["kernel"]), expected, maxulp=1)
    assert_bits_equal(after["dense"]["bias"], params["dense"]["bias"])
    assert_bits_equal(after["norm"], params["norm"])
    for name in ("mu", "nu"):
        assert all((x == 0).all() for x in jax.tree.leaves(optax.tree_utils.tree_get(state, name)))


def test_decoupled_decay_is_not_l2():
    """optax#494: a step from p = 1, g = 1 with lr = .1 and decay = .5 ends at .85; L2 in the gradient at .9."""
    params, grads = {"w": jnp.ones((1, 1))}, {"w": jnp.ones((1, 1))}
    ours = clipped_adamw(0.1, weight_decay=0.5, clip_norm=None)
    l2 = optax.chain(optax.add_decayed_weights(0.5), optax.scale_by_adam(0.9, 0.95), optax.scale(-0.1))

    def step(optimizer):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return float(optax.apply_updates(params, updates)["w"][0, 0])

    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose([step(ours), step(l2)], [0.85, 0.9], rtol=1e-6)


def test_float32_parameters_keep_small_updates():
    """One step of 1e-6 moves a float32 parameter by 1e-6, and a bfloat16 one not at all."""
    optimizer = clipped_adamw(1e-6, weight_decay=0.0)
    for dtype, moved in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.0)):
        params = jnp.ones((2, 2), dtype)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        after = optax.apply_updates(params, updates)
        np.testing.assert_allclose(1 - np.float64(after), moved, rtol=0.05)


EDGES = [0.0, -0.0, 1e-40, -1e-45, 1.0, -2.5, 3.3895314e38]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("compile_with", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_below_the_threshold_nothing_changes(dtype, compile_with):
    """Bit for bit, subnormal numbers and the sign of zero included."""
    grads = {"a": np.array(EDGES[:6]).astype(dtype), "b": np.array([[6e-8, -6e-8, 1e-39]]).astype(dtype)}
    transform = clip_by_global_norm(10.0)
    clipped, state = compile_with(transform.update)(jax.tree.map(jnp.asarray, grads), transform.init(grads))
    assert_bits_equal(clipped, grads)
    assert state.clip_factor == 1
    exactly = clip_by_global_norm(5.0)
    clipped, _ = compile_with(exactly.update)(jnp.array([3.0, -4.0]), exactly.init(None))
    assert_bits_equal(clipped, jnp.array([3.0, -4.0]))


def test_above_the_threshold():
    """The norm becomes max_norm and one factor scales all leaves."""
    grads = random_tree(1)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(to_float64(grads))))
    clipped, state = jax.jit(clip_by_global_norm(0.5).update)(grads, None)
    assert norm > 1
    assert_close(clipped, jax.tree.map(lambda g: g * 0.5 / norm, to_float64(grads)))
    np.testing.assert_allclose(global_norm(clipped), 0.5, rtol=1e-6)
    np.testing.assert_allclose([state.grad_norm, state.clip_factor], [norm, 0.5 / norm], rtol=1e-6)


def test_a_factor_below_float16():
    """The factor 1e-9 would be 0 in float16."""
    grads = {"a": jnp.full(1, 6e4, jnp.float16), "b": jnp.full((1000, 1000), 6e4, jnp.float16)}
    clipped, _ = clip_by_global_norm(0.06).update(grads, None)
    np.testing.assert_allclose(np.float64(clipped["a"]), 6e-5, rtol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
@pytest.mark.parametrize("max_norm", [1.0, 1e30])
def test_a_norm_that_is_not_finite_makes_every_leaf_nan(bad, max_norm):
    """Optax turns the finite leaves of an infinite gradient into zeros instead."""
    grads = {"good": jnp.ones(3), "bad": jnp.array([1.0, bad])}
    clipped, state = clip_by_global_norm(max_norm).update(grads, None)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
    assert not np.isfinite(state.grad_norm)
    assert np.isnan(state.clip_factor)
    theirs, _ = optax.clip_by_global_norm(1.0).update({"good": jnp.ones(3), "bad": jnp.array([1.0, np.inf])}, None)
    assert (theirs["good"] == 0).all()


def test_no_clipping_still_measures():
    grads = random_tree(1)
    clipped, state = clip_by_global_norm(None).update(grads, None)
    assert_bits_equal(clipped, grads)
    np.testing.assert_allclose(state.grad_norm, global_norm(grads))
    assert state.clip_factor == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_global_norm_is_float32(dtype):
    """300 squared overflows float16, and bfloat16 sums stop growing at 256 ones."""
    tree = {"large": jnp.full(2, 300, dtype), "many": jnp.ones(10_000, dtype)}
    norm = global_norm(tree)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.sqrt(2 * 300**2 + 10_000), rtol=1e-6)


def test_global_norm_does_not_depend_on_grouping():
    x = np.random.default_rng(0).normal(size=(10, 64)).astype(np.float32)
    expected = np.linalg.norm(np.float64(x))
    for tree in (x, list(x), {str(i): row for i, row in enumerate(x[::-1])}, x.reshape(-1), (x[:3], [x[3:]])):
        np.testing.assert_allclose(global_norm(tree), expected, rtol=1e-6)
    assert global_norm({}) == 0


@pytest.mark.parametrize("mesh_shape", [(1,), (8,), (2, 4)], ids=str)
def test_shardings_agree(mesh_shape):
    """Sharded and replicated leaves count once; the clipped update is the same everywhere."""
    shapes = {"split": (8, 16), "columns": (3, 8), "replicated": (5, 5)}
    specs = {"split": P("a", "b"), "columns": P(None, "b"), "replicated": P()}
    if len(mesh_shape) == 1:
        specs = {"split": P("a"), "columns": P(None, "a"), "replicated": P()}
    params, grads = random_tree(0, shapes), random_tree(1, shapes)
    names = ("a", "b")[: len(mesh_shape)]
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(mesh_shape, names, axis_types=auto, devices=jax.devices()[: np.prod(mesh_shape)])
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    optimizer = clipped_adamw(0.1, clip_norm=0.5)

    @jax.jit
    def step(params, grads):
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return updates, optax.tree_utils.tree_get(state, "grad_norm")

    updates, norm = step(*jax.device_put((params, grads), (shardings, shardings)))
    np.testing.assert_allclose(
        norm, np.linalg.norm(np.concatenate([np.ravel(g) for g in jax.tree.leaves(to_float64(grads))])), rtol=1e-6
    )
    assert_close(updates, step(params, grads)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b1": -0.1}, "b1"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"b2": np.nan}, "b2"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"learning_rate": True}, "learning_rate .* got True"),
        ({"weight_decay": True}, "weight_decay .* got True"),
        ({"eps": np.inf}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0, or None for no clipping, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"clip_norm": np.nan}, "clip_norm"),
        ({"learning_rate": -1e-3}, "learning_rate must be 0 or more, or a schedule, got -0.001"),
        ({"learning_rate": np.inf}, "learning_rate"),
        ({"mu_dtype": jnp.int8}, "mu_dtype must be a float dtype"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        clipped_adamw(**{"learning_rate": 0.1, **arguments})
