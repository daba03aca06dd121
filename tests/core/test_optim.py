"""AdamW, clipping and the decay mask against float64 numpy and hand-computed numbers."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.optim import clip_by_global_norm, clipped_adamw, decay_mask, decay_report, global_norm, scale_by_adam

SHAPES = {"dense": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (4,)}}


def random_tree(seed, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) + 0.3, dtype)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def to_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_close(actual, expected, rtol=1e-6):
    """The largest difference in a leaf is at most rtol of its largest number."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(initial=0))

    jax.tree.map(check, actual, expected)


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


class Block(nn.Module):
    """Leaves of rank 1, 2 and 3 below one layer, a bias of rank 2 among them."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x) * self.param("gain", nn.initializers.ones, (4,))[None]
        x = nn.DenseGeneral((2, 3), name="heads")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, name="out")(x), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x, _ = Block(name=f"layers_{i}")(x, None)
        return nn.Dense(5, name="head")(x)


def test_stacked_model_decays_like_the_unrolled_one():
    """The same paths decay, although a stacked leaf has one more dimension."""

    def table(module):
        params = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 4)))["params"]
        sizes = {}
        for (path, leaf), decays in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(decay_mask(params)), strict=True
        ):
            key = re.sub(r"layers_\d", "layers", jax.tree_util.keystr(path, simple=True, separator="/")), decays
            sizes[key] = sizes.get(key, 0) + leaf.size
        return sizes

    assert table(Stacked()) == table(Unrolled()) == {
        ("head/bias", False): 5,
        ("head/kernel", True): 20,
        ("layers/LayerNorm_0/bias", False): 12,
        ("layers/LayerNorm_0/scale", False): 12,
        ("layers/gain", False): 12,
        ("layers/heads/bias", False): 18,
        ("layers/heads/kernel", True): 72,
        ("layers/out/kernel", True): 72,
    }  # fmt: skip


class Gain(nnx.Module):
    def __init__(self, rngs):
        del rngs
        self.gain = nnx.Param(jnp.ones(4))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.bias = nnx.Param(jnp.zeros((2, 2)))
        self.blocks = nnx.vmap(Gain)(nnx.Rngs(0).split(3))


def test_nnx_state():
    """A list of layers is not stacked, a vmapped layer is; the attribute of the wrapper is not part of the path."""
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    decayed = [name for name, decays in zip(names, jax.tree.leaves(decay_mask(state)), strict=True) if decays]
    assert decayed == ["embed/embedding", "layers/0/kernel", "layers/1/kernel"]
    assert len(names) == 7


@pytest.mark.parametrize(
    ("params", "decayed"),
    [
        ({"a": (2, 3), "b": (3,), "c": ()}, ["a"]),
        ({"bias": (2, 3), "scale": (2, 3, 4), "kernel": (2, 3, 4)}, ["kernel"]),
        ({"layers": [{"w": (2, 2)}, {"w": (3, 3), "g": (2,)}]}, ["layers/0/w", "layers/1/w"]),
        ({"layers": {"w": (2, 3, 3), "scale": (2, 3), "g": (2, 3)}}, ["layers/w"]),
        ({"blocks": {"attention": {"w": (2, 3, 3), "gain": (2, 3), "bias": (2, 3, 3)}}}, ["blocks/attention/w"]),
        ({"model": {"layers": {"norm": {"w": (2, 3)}}, "w": (2, 3)}}, ["model/w"]),
        ({"encoder": {"layers": {"norm1": (2, 3)}}, "decoder": {"layers": {"ln_1": {"g": (4, 3)}}}}, []),
        ({"layers": (7, 3)}, ["layers"]),
        ({"layers": {"w": (3, 5), "scale": (5,), "v": (3, 5)}}, ["layers/v", "layers/w"]),  # a 1-D scale: no stack
        ({"layers": {"w": (3, 5), "v": (4, 5), "t": ()}}, ["layers/v", "layers/w"]),  # unequal sizes: no stack
        ({"layers": {"w": (1, 5, 5), "g": (1, 5)}}, ["layers/w"]),  # one layer: size 1 does not count
        ({"layers": {"w": (6, 3, 7), "ln": {"scale": (5, 3)}, "skip": (4, 3)}}, ["layers/w"]),  # scan axis 1
        ({"gamma": (1, 8), "layer_scale": (1, 1, 8), "g": (8, 1), "offset": (1, 1, 1, 8)}, []),
        ({"cls_token": (1, 1, 8), "mask_token": (1, 1, 8), "pos_embed": (1, 9, 8)}, ["pos_embed"]),
        ({"h": {"mlp": {"w": (4, 3, 3), "b": (4, 3)}, "ln_1": {"weight": (4, 3), "b": (4, 3)}}}, ["h/mlp/w"]),
        ({"lora": {"a": (8, 2), "b": (2, 8)}}, ["lora/a", "lora/b"]),
        ({"mlp/~/linear_0": {"w": (3, 4), "b": (4,)}, "mlp/~/layer_norm": {"offset": (4,)}}, ["mlp/~/linear_0/w"]),
    ],
    ids=str,
)
def test_plain_trees(params, decayed):
    params = jax.tree.map(jnp.zeros, params, is_leaf=lambda x: isinstance(x, tuple))
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in mask if flag] == decayed


def test_a_wrong_stack_names_both_leaves():
    params = {"layers": {"first": jnp.zeros((2, 3)), "second": jnp.zeros((5, 3))}}
    wrong = r"layers/first has shape \(2, 3\) and layers/second has shape \(5, 3\)"
    with pytest.raises(ValueError, match=wrong):
        decay_mask(params, stacked=("layers",))
    assert decay_mask(params, stacked=()) == {"layers": {"first": True, "second": True}}
    assert decay_mask(params, stacked=("blocks",)) == {"layers": {"first": True, "second": True}}
    with pytest.raises(ValueError, match="layers/second has shape"):
        decay_mask({"layers": {"first": jnp.zeros((2, 3)), "second": jnp.zeros(())}}, stacked=("layers",))


# Shapes of parameter trees as public projects name and stack them, and the leaves that do not decay.
PROJECTS = {
    "nanoGPT in Linen": (
        {"wte": {"embedding": (9, 4)}, "h_0": {"ln_1": {"scale": (4,), "bias": (4,)}, "c_fc": {"kernel": (4, 8)}}},
        ["h_0/ln_1/bias", "h_0/ln_1/scale"],
    ),
    "GPT-2 checkpoints, stacked under h": (
        {"h": {"ln_1": {"g": (3, 4), "b": (3, 4)}, "c_fc": {"w": (3, 4, 8), "b": (3, 8)}}, "wpe": (6, 4)},
        ["h/c_fc/b", "h/ln_1/b", "h/ln_1/g"],
    ),
    "MaxText, scan axis 1": (
        {
            "decoder": {
                "layers": {
                    "mlp": {"wi_0": {"kernel": (4, 3, 8)}},
                    "pre_self_attention_layer_norm": {"scale": (4, 3)},
                    "self_attention": {"query": {"kernel": (4, 3, 2, 2)}, "per_layer": (5, 3)},
                },
                "decoder_norm": {"scale": (4,)},
            },
        },
        ["decoder/decoder_norm/scale", "decoder/layers/pre_self_attention_layer_norm/scale",
         "decoder/layers/self_attention/per_layer"],
    ),
    "big_vision ViT": (
        {
            "cls": (1, 1, 4), "pos_embedding": (1, 9, 4), "embedding": {"kernel": (2, 2, 3, 4), "bias": (4,)},
            "Transformer": {"encoderblock": {"LayerNorm_0": {"scale": (3, 4)}, "MlpBlock_0": {"kernel": (3, 4, 8)}}},
        },
        ["Transformer/encoderblock/LayerNorm_0/scale", "cls", "embedding/bias"],
    ),
    "Hugging Face LLaMA in Flax": (
        {"model": {"layers": {"0": {"input_layernorm": {"weight": (4,)}, "mlp": {"up_proj": {"kernel": (4, 4)}}}}}},
        ["model/layers/0/input_layernorm/weight"],
    ),
    "torch names in one dict": (
        {"layers.0.attention_norm.weight": (4,), "layers.0.wq.weight": (4, 4), "layers.0.q_norm.weight": (2, 2)},
        ["layers.0.attention_norm.weight", "layers.0.q_norm.weight"],
    ),
    "NFNet in Haiku": (
        {"nf_res_block/~/conv0": {"w": (3, 3, 4, 4), "gain": (1, 1, 1, 4), "bias": (4,)}},
        ["nf_res_block/~/conv0/bias", "nf_res_block/~/conv0/gain"],
    ),
    "BatchNorm in Haiku": (
        {"resnet/~/batchnorm": {"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)}, "resnet/~/conv": {"w": (3, 3, 1, 4)}},
        ["resnet/~/batchnorm/offset", "resnet/~/batchnorm/scale"],
    ),
    "ConvNeXt and CaiT layer scale": (
        {"stage": {"gamma": (1, 4), "layer_scale": (1, 1, 4), "pwconv": {"kernel": (4, 8)}}, "mask_token": (1, 1, 4)},
        ["mask_token", "stage/gamma", "stage/layer_scale"],
    ),
    "weight normalization": ({"linear": {"v": (4, 8), "g": (4, 1)}}, ["linear/g"]),
    "LoRA": ({"q": {"a": (8, 2), "b": (2, 8)}, "scale": ()}, ["scale"]),
    "nn.scan of blocks": (
        {"blocks": {"norm": {"scale": (3, 4)}, "skip": (3, 4), "attention": {"qkv": {"kernel": (3, 4, 6)}}}},
        ["blocks/norm/scale", "blocks/skip"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("project", PROJECTS)
def test_conventions_of_public_projects(project):
    shapes, expected = PROJECTS[project]
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params))
    undecayed = [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in mask if not flag]
    assert sorted(undecayed) == sorted(expected)


UNPROVEN = {
    "matrices": {"blocks": {"wq": (8, 8), "wk": (8, 8)}},
    "a bias per head": {"layers": {"w": (8, 8, 4), "bias": (8, 4), "v": (8, 8)}},
    "deeper": {"model": {"layers": {"mlp": {"w": (2, 3, 3)}, "gate": (2, 3)}}},
    "one leaf": {"layers": {"w": (4, 4)}},
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_matrix_is_never_silently_undecayed(name):
    """Without proof of a stack the error names the leaf and both remedies, which work."""
    params = jax.tree.map(jnp.zeros, UNPROVEN[name], is_leaf=lambda x: isinstance(x, tuple))
    with pytest.raises(ValueError, match=r"may be a matrix, or a vector in each of .* stacked=\(\) if they have none"):
        clipped_adamw(0.1).init(params)
    doubtful = [jnp.ndim(leaf) == 2 for leaf in jax.tree.leaves(params)]
    flat, stacked = (jax.tree.leaves(decay_mask(params, stacked=stacked)) for stacked in ((), ("blocks", "layers")))
    assert all(flag for flag, two in zip(flat, doubtful, strict=True) if two and name != "a bias per head")
    assert not any(flag for flag, two in zip(stacked, doubtful, strict=True) if two)
    assert "stacked or not" in decay_report(params, functools.partial(decay_mask, stacked=()))


REPORT = """\
embed/table    1000x8  8,000  decay
layers/kernel  3x8x8     192  decay
layers/scale   3x8        24  -
temperature    scalar      1  -
layers: 3 stacked layers along axis 0
2 parameters of 8,192 numbers decay, 2 of 25 do not"""


def test_decay_report():
    params = {"embed": {"table": (1000, 8)}, "layers": {"kernel": (3, 8, 8), "scale": (3, 8)}, "temperature": ()}
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), params, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert decay_report(params, decay_mask) == decay_report(params, decay_mask(params)) == REPORT
    with pytest.raises(ValueError, match="one bool for each parameter"):
        decay_report(params, {"embed": True})


DOUBTS = """\
block/g  4x3    12  decay ?
block/w  4x3x3  36  decay
gamma    1x3     3  - ?
wide     3x4    12  decay
3 parameters of 60 numbers decay, 1 of 3 do not"""


def test_the_report_marks_what_is_in_doubt():
    """Size-1 axes, and a leaf of a subtree of stacks under another name."""
    shapes = {"block": {"w": (4, 3, 3), "g": (4, 3)}, "gamma": (1, 3), "wide": (3, 4)}
    report = decay_report(jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)), decay_mask)
    assert report == DOUBTS
    assert decay_report({}, decay_mask) == "0 parameters of 0 numbers decay, 0 of 0 do not"


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(5, 4)
        return embed.attend(embed(tokens))


def test_tied_embeddings_count_once():
    """One leaf, one decay decision, and a gradient that is the sum of both uses."""
    tokens, model = jnp.array([1, 3]), Tied()
    params = model.init(jax.random.key(0), tokens)["params"]
    assert decay_report(params, decay_mask).endswith("1 parameters of 20 numbers decay, 0 of 0 do not")
    table = params["Embed_0"]["embedding"]
    grads = jax.grad(lambda p: jnp.sum(jnp.square(model.apply({"params": p}, tokens))))(params)
    use_in, use_out = jax.grad(lambda a, b: jnp.sum(jnp.square(a[tokens] @ b.T)), (0, 1))(table, table)
    np.testing.assert_allclose(global_norm(grads), np.linalg.norm(np.float64(use_in) + np.float64(use_out)), rtol=1e-6)


def test_mask_that_does_not_fit():
    params = random_tree(0)
    for mask in ({"dense": True}, lambda p: True):
        with pytest.raises(ValueError, match=r"the decay mask has the structure .* give one bool for each parameter"):
            clipped_adamw(0.1, mask=mask).init(params)
    optimizer = clipped_adamw(0.1, weight_decay=0.5, mask=jax.tree.map(lambda p: p.ndim == 1, params))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert (updates["dense"]["kernel"] == 0).all()
    assert (updates["norm"]["scale"] != 0).all()


def test_update_needs_the_parameters():
    optimizer = clipped_adamw(0.1)
    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


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


def test_each_wrapper_does_its_own_part():
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b1": -0.1}, "b1"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1.0"),
        ({"b2": np.nan}, "b2"),
        ({"eps": 0.0}, "eps must be above 0, got 0.0"),
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
