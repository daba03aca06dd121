"""Checkpoints: what is read is what was written, or an error that names the path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import MeshConfig
from jaxtrain.optim import clipped_adamw
from jaxtrain.sharding import make_mesh, replicated
from jaxtrain.step import TrainState

RECORD = {"data": "fingerprint", "decay_mask": ["w"]}


def make_state(step=3, **changes):
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": {"scale": jnp.ones((2, 4))}} | changes
    optimizer = clipped_adamw(1e-2)
    state = TrainState.create(params, optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = optimizer.update(grads, state.opt_state, params)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def abstract(state, num_devices=1):
    sharding = replicated(make_mesh(MeshConfig(data=num_devices)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.weak_type == y.weak_type
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(make_state(), RECORD)
        checkpoints.wait()
    return folder


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_new_process_reads_what_was_written_onto_its_devices(folder, num_devices):
    state = make_state()
    with Checkpoints(folder) as checkpoints:
        restored, record = checkpoints.restore(abstract(state, num_devices))
    same(restored, state)
    assert record == RECORD
    assert len(restored.params["w"].sharding.device_set) == num_devices


def test_parameters_alone(folder):
    state = make_state()
    with Checkpoints(folder) as checkpoints:
        params, step = checkpoints.restore_params(abstract(state).params)
    assert step == 3
    same(params, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": jnp.ones(2)}, "extra: missing from the checkpoint"),
        ({"w": jnp.ones((2, 4))}, r"w: float32\[2, 3\] in the checkpoint, float32\[2, 4\] in the run"),
        ({"w": jnp.ones((2, 3), jnp.bfloat16)}, r"w: float32\[2, 3\] in the checkpoint, bfloat16\[2, 3\] in the run"),
        ({"layers": {}}, "layers/scale: in the checkpoint, not in the run"),
    ],
)
def test_restore_is_strict_and_names_the_path(folder, changes, message):
    like = abstract(make_state())
    like = like.replace(params={**like.params, **abstract(changes)})
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(like)
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_params(like.params)


def test_restore_is_strict_about_the_optimizer_too(folder):
    like = abstract(make_state())
    like = like.replace(opt_state=(*like.opt_state, {"more": like.step}))
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="opt_state/4/more: missing"):
        checkpoints.restore(like)


def test_missing_checkpoints_are_named(folder, tmp_path):
    like = abstract(make_state())
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=r"step 7 .* there are \[3\]"):
        checkpoints.restore(like, 7)
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(ValueError, match="no checkpoint in"):
            checkpoints.restore(like)


def test_the_newest_are_kept_and_saving_a_step_again_is_harmless(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(make_state(step), RECORD)
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_save_is_not_touched_by_the_steps_that_follow_it(tmp_path):
    """The next step takes the memory of the state that is still being written."""
    state = make_state(0, w=jnp.zeros((1000, 1000)))
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, RECORD)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(abstract(state))
    same(restored, jax.tree.map(jnp.asarray, expected))
