"""Small states, and checkpoints of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import MeshConfig
from jaxtrain.optim import clipped_adamw
from jaxtrain.runtime.mesh import make_mesh, replicated
from jaxtrain.step import TrainState

FINGERPRINT = {"data": "fingerprint", "decay_mask": ["w"]}


def make_state(step=3, **changes):
    """A state after one update, so that the moments are not zero."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": {"scale": jnp.ones((2, 4))}} | changes
    optimizer = clipped_adamw(1e-2)
    state = TrainState.create(params, optimizer)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = optimizer.update(grads, state.opt_state, params)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def abstract(state, num_devices=1):
    sharding = replicated(make_mesh(MeshConfig(data=num_devices)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.weak_type == y.weak_type
        np.testing.assert_array_equal(x, y)


def save_steps(path, *steps, **options):
    """Saves a state for each step."""
    with Saver(CheckpointFolder(path, **options)) as saver:
        for step in steps:
            saver.begin(make_state(step), FINGERPRINT)


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def big_file(folder, part):
    """Returns the largest data file of a part of a checkpoint."""
    return max((folder / part).rglob("d/*"), key=lambda path: path.stat().st_size)


class Events(list):
    """`report` of a CheckpointFolder that records the events."""

    def __call__(self, event, text, **fields):
        self.append((event, text, fields))

    def named(self, name):
        return [(text, fields) for event, text, fields in self if event == name]
