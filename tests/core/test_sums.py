"""The form of the sums for GPUs, which lets the optimizer write in place: the same values from one reduction each."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from step_reference import lm_loss

from jaxtrain.guard import skip_bad_steps
from jaxtrain.losses import LossSums
from jaxtrain.monitoring.layers import layer_diagnostics
from jaxtrain.optim import clipped_adamw
from jaxtrain.plan.costs import part_costs
from jaxtrain.plan.gpu import target_config
from jaxtrain.runtime.chips import CHIPS
from jaxtrain.step import TrainState, make_train_step
from jaxtrain.sums import update_sums
from jaxtrain.trees import as_float32, leaf_squares

GPU_COMPILER = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def make_params():
    random = np.random.default_rng(0)
    shapes = {"embed": (13, 5), "head": (5, 13), "layers": {"scale": (3, 5), "gain": (3, 4)}, "temperature": ()}
    make = lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(make, shapes, is_leaf=lambda node: isinstance(node, tuple))


@pytest.mark.parametrize("inner", ["clipped_adamw", "partition"])
def test_the_sums_of_an_update(inner):
    """Also for an optimizer that holds moments of some parameters only, in bfloat16."""
    params = make_params()
    adamw = clipped_adamw(1e-3, mu_dtype="bfloat16", weight_decay=0.0)
    labels = {**jax.tree.map(lambda _: "on", params), "head": "off"}
    partition = optax.partition({"on": adamw, "off": optax.set_to_zero()}, labels)
    state = {"clipped_adamw": adamw, "partition": partition}[inner].init(params)
    updates = jax.tree.map(lambda p: 0.1 * p, params)
    sums = jax.jit(update_sums)
    param_squares, squares, faults = sums(params, updates, state)
    for found, tree in ((param_squares, params), (squares, updates)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found, leaf_squares(tree))
    assert faults == 0
    leaves, structure = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            broken = [*leaves[:i], leaf.at[(0,) * leaf.ndim].set(jnp.nan), *leaves[i + 1 :]]
            assert sums(params, updates, structure.unflatten(broken))[2] == 1


@pytest.fixture(scope="module")
def steps():
    """A guarded train step, traced, and lowered in the form for GPUs; its state and batches, of which one is bad."""
    optimizer = skip_bad_steps(clipped_adamw(1e-2), check_updates=False)
    diagnose = functools.partial(layer_diagnostics, b2=0.95, eps=1e-8)

    def loss(params, batch):
        sums, others = lm_loss(params, batch), [*jax.tree.leaves(params["layers"]), params["temperature"]]
        return sums.replace(nll=sums.nll * batch["scale"] * sum(jnp.mean(jnp.cos(leaf)) for leaf in others))

    step = make_train_step(loss, optimizer, diagnose=diagnose)
    tokens = np.random.default_rng(1).integers(0, 13, (4, 9))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": np.ones((4, 8), bool)}
    batches = [batch | {"scale": jnp.float32(scale)} for scale in (1, jnp.nan, 2)]
    state = TrainState.create(make_params(), optimizer)
    traced, choose = jax.jit(step).trace(state, batches[0]), jax.lax.platform_dependent

    def for_gpus(*arguments, **forms):
        own = getattr(forms.get("cuda"), "__module__", None) in ("jaxtrain.sums", "jaxtrain.guard")
        return forms["cuda"](*arguments) if own else choose(*arguments, **forms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", for_gpus)
        form = jax.jit(lambda state, batch: step(state, batch)).lower(state, batches[0])
    return traced, form, state, batches


def test_a_step_in_the_form_for_gpus_is_the_same_step(steps):
    """Up to the rounding of two programs; a skipped step changes no bit of parameters and moments."""
    traced, lowered, state, batches = steps
    plain, form = traced.lower().compile(), lowered.compile()
    states = [state, state]
    for batch in batches:
        before, (one, metrics), (other, found) = states[1], plain(states[0], batch), form(states[1], batch)
        assert float(metrics["skipped"]) == float(found["skipped"]) == np.isnan(batch["scale"])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), (one, metrics), (other, found))
        if found["skipped"]:
            jax.tree.map(np.testing.assert_array_equal, other.params, before.params)
            jax.tree.map(np.testing.assert_array_equal, other.opt_state.inner[1], before.opt_state.inner[1])
        states = [one, other]


def test_a_gpu_forms_the_sums_of_an_update_in_one_reduction(steps):
    """One for each sum would have XLA copy all parameters and moments; see the test below."""
    traced, *_ = steps

    def count(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return sum(line.count(" init: ") == 3 for line in text.splitlines())

    # Of each matrix for the guard and for the norms, of those of the layers for the diagnostics; equal ones become one.
    assert (count("cuda"), count("tpu"), count("cpu")) == (4 + 4 + 2, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(not GPU_COMPILER, reason="no GPU compiler: pip install jaxtrain[plan-gpu]")
def test_the_gpu_compiler_updates_in_place():
    """12 bytes per parameter are state, 2 gradient: the optimizer reads both, writes the state, reads 8 for records.

    With a reduction for each sum it moves 64 bytes, and needs 12 more for copies.
    """
    target = {"target_config": target_config(CHIPS["h100"], 91002), "topology": "1x1x1"}
    device = topologies.get_topology_desc(platform="cuda", **target).devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    array = lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)  # noqa: E731
    params = {"head": jnp.zeros((512, 2048)), "layers": {"down": jnp.zeros((4, 1024, 512))}}
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    optimizer = skip_bad_steps(clipped_adamw(1e-2), check_updates=False)
    diagnose = functools.partial(layer_diagnostics, b2=0.95, eps=1e-8)

    def given(gradients):
        del gradients
        one = jnp.float32(1)
        return lambda params, batch: ((LossSums(one, one, one, one), {}), jax.tree.map(as_float32, batch))

    step = make_train_step(lambda params, batch: None, optimizer, map_gradients=given, diagnose=diagnose)
    state = jax.tree.map(lambda leaf: array(leaf, leaf.dtype), TrainState.create(params, optimizer))
    batch = jax.tree.map(lambda leaf: array(leaf, jnp.bfloat16), params)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    assert sum(row["bytes"] for row in part_costs(compiled.as_text())) < 35 * number
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * number
