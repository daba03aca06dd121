"""ZClip and adaptive clipping, against NumPy and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.clipping import ClipState, ZClipState, clip_adaptively, zclip
from jaxtrain.config import Config, DataConfig, GuardConfig, OptimConfig
from jaxtrain.guard import skip_bad_steps
from jaxtrain.optim import clipped_adamw, global_norm
from jaxtrain.training.components import make_optimizer


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's own transformations need it
        yield


def zclip_in_float64(norms, *, z_threshold=2.5, decay=0.97, warmup=25, max_norm=np.inf):
    """Returns the clipped norms of the paper's algorithm, step by step."""
    seen, mean, variance, left = [], 0.0, 0.0, []
    for norm in norms:
        clipped = norm
        if len(seen) >= warmup:
            z = (norm - mean) / np.sqrt(variance)
            if z > z_threshold:
                clipped = mean + z_threshold**2 / z * np.sqrt(variance)
        clipped = min(clipped, max_norm)
        left.append(clipped)
        seen.append(clipped)
        if len(seen) <= warmup:
            mean, variance = np.mean(seen), np.var(seen)
        else:
            # The average of squares around the moving mean, as Welford's update gives it.
            change = clipped - mean
            mean += (1 - decay) * change
            variance = decay * (variance + (1 - decay) * change**2)
    return np.array(left)


def norms_with_spikes():
    norms = 1 + 0.1 * np.random.default_rng(0).normal(size=90)
    norms[[40, 60, 61, 80]] = [2.0, 50.0, 9.0, 1e6]
    return norms


def left_by(clip, norms, params=None):
    params = {"w": jnp.zeros((2, 2))} if params is None else params
    state, update, left, factors = clip.init(params), jax.jit(clip.update), [], []
    for norm in norms:
        clipped, state = update({"w": jnp.full((2, 2), norm / 2, jnp.float32)}, state, params)
        left.append(float(jnp.linalg.norm(clipped["w"])))
        factors.append(float(state.clip_factor))
        np.testing.assert_allclose(state.grad_norm, norm, rtol=1e-6)
    return np.array(left), np.array(factors)


@pytest.mark.parametrize("max_norm", [None, 1.1])
def test_zclip_equals_the_algorithm_of_the_paper(max_norm):
    norms = norms_with_spikes()
    left, factors = left_by(zclip(max_norm=max_norm), norms)
    expected = zclip_in_float64(norms, max_norm=max_norm or np.inf)
    np.testing.assert_allclose(left, expected, rtol=1e-4)
    np.testing.assert_allclose(factors, expected / norms, rtol=1e-4)
    clipped = left < 0.9 * norms
    assert clipped[[40, 60, 61, 80]].all()
    assert clipped.sum() == 4 or max_norm
    assert left[80] < left[40] < 1.5  # the larger the spike, the less is left


def test_zclip_passes_a_healthy_gradient_bit_for_bit():
    clip = zclip()
    grads = {"w": jnp.array([0.3, -0.1, 1e-45])}
    state = clip.init(grads)
    for _ in range(30):
        clipped, state = clip.update(grads, state)
        assert np.asarray(clipped["w"]).tobytes() == np.asarray(grads["w"]).tobytes()


def test_zclip_leaves_non_finite_norms_out_of_its_averages():
    clip = zclip()
    state = clip.init({"w": jnp.zeros(2)})
    _, state = clip.update({"w": jnp.ones(2)}, state)
    clipped, after = clip.update({"w": jnp.array([jnp.nan, 1.0])}, state)
    assert np.isnan(clipped["w"]).all()
    assert (float(after.mean), float(after.variance), int(after.count)) == (
        float(state.mean),
        float(state.variance),
        1,
    )


def test_adaptive_clipping_is_optax_layer_by_layer():
    """Each layer of a stack is clipped by itself; optax alone would clip the stack as one matrix."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    shapes = {"kernel": (5, 7), "bias": (7,)}
    params, grads = ({name: draw(3, *shape) for name, shape in shapes.items()} for _ in range(2))
    rest = {"head": draw(5, 7)}
    clipped, state = clip_adaptively(0.5).update(
        {"layers": grads, **rest}, clip_adaptively(0.5).init({}), {"layers": params, "head": 0.1 * rest["head"]}
    )
    one = optax.adaptive_grad_clip(0.5)
    for layer in range(3):
        part = lambda tree, layer=layer: jax.tree.map(lambda x: x[layer], tree)  # noqa: E731
        expected, _ = one.update(part(grads), optax.EmptyState(), part(params))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), part(clipped["layers"]), expected)
    np.testing.assert_allclose(clipped["head"], 0.05 * rest["head"], rtol=1e-5)
    whole = {"layers": grads, **rest}
    np.testing.assert_allclose(state.clip_factor, global_norm(clipped) / global_norm(whole), rtol=1e-5)
    stacked, _ = one.update(grads, optax.EmptyState(), params)
    assert np.abs(stacked["kernel"] - clipped["layers"]["kernel"]).max() > 0.01


def test_adaptive_clipping_of_a_zero_gradient():
    clip, params = clip_adaptively(), {"w": jnp.ones((2, 2))}
    clipped, state = clip.update({"w": jnp.zeros((2, 2))}, clip.init(params), params)
    assert (float(state.clip_factor), float(jnp.abs(clipped["w"]).max())) == (1.0, 0.0)


@pytest.mark.parametrize("make", [zclip, clip_adaptively])
def test_zclip_and_adaptive_clipping_replace_the_fixed_threshold(make):
    """In AdamW behind the guard: a NaN is skipped and their state keeps its bits."""
    optimizer = skip_bad_steps(clipped_adamw(1e-2, clip=make()))
    params = {"w": jnp.ones((2, 2))}
    state = optimizer.init(params)
    for scale in (1.0, 1.1):
        updates, state = optimizer.update({"w": jnp.full((2, 2), scale)}, state, params, loss=1.0)
    before = jax.tree.map(np.asarray, state.inner[0])
    _, state = optimizer.update({"w": jnp.full((2, 2), jnp.nan)}, state, params, loss=1.0)
    assert float(state.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, state.inner[0], before)
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zclip(max_norm=0.0), "max_norm must be above 0, or None for no clipping, got 0.0"),
        (lambda: zclip(z_threshold=-1.0), "z_threshold must be above 0, got -1.0"),
        (lambda: zclip(decay=1.0), r"decay must be in \(0, 1\), got 1.0"),
        (lambda: zclip(warmup_steps=1), "warmup_steps must be a whole number from 2"),
        (lambda: clip_adaptively(0.0), "ratio must be above 0, got 0.0"),
        (lambda: clip_adaptively(eps=float("nan")), "eps must be above 0, got nan"),
        (lambda: clip_adaptively().update({}, None), "needs the parameters"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("clipping", ["global_norm", "zclip", "adaptive"])
def test_a_config_chooses_the_clipping(clipping):
    """The gradient equals the weights: its global norm is 2, and each unit has the norm of its weights.

    A later norm of 40 is no spike where each unit is clipped to a share of its weights.
    """
    optim = OptimConfig(clipping=clipping, clip_norm=0.05)
    config = Config(data=DataConfig(store="none"), optim=optim, guard=GuardConfig(window=2))
    params, optimizer = {"w": jnp.ones((2, 2))}, make_optimizer(config)
    update = jax.jit(lambda factor, state: optimizer.update({"w": factor * params["w"]}, state, params, loss=1.0)[1])
    later = state = update(1.0, optimizer.init(params))
    for factor in (1.0, 20.0):
        later = update(factor, later)
    assert later.skipped == (clipping != "adaptive")
    assert isinstance(state.inner[0], ZClipState if clipping == "zclip" else ClipState)
    np.testing.assert_allclose(state.inner[0].clip_factor, 0.05 if clipping == "adaptive" else 0.025, rtol=1e-6)


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=str)
def test_on_explicit_axes(spec):
    """Explicit mesh axes give the same numbers, whichever axis of a leaf is sharded."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
    params = {"w": jnp.arange(32.0).reshape(4, 8) + 1, "b": jnp.ones(8)}
    placed = {**params, "w": jax.device_put(params["w"], NamedSharding(mesh, spec))}
    for make in (clip_adaptively, zclip, lambda: skip_bad_steps(clipped_adamw(0.1, clip=clip_adaptively()))):
        transform = make()
        expected, _ = transform.update(params, transform.init(params), params)
        actual, _ = jax.jit(transform.update)(placed, transform.init(placed), placed)
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-5)
