"""Deliberate faults, to test what a run does about them. Nothing of it is in a run whose config asks for none.

A fault travels with the batch, one number a row, so that it reaches the micro-batch and the device that have the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import FaultConfig
from jaxtrain.data.loader import Batch, Batches
from jaxtrain.losses import LossSums

_KEYS = ("loss_factor", "gradient_factor", "gradient_offset")  # each float32 [B]


@dataclass(frozen=True, eq=False)
class FaultyBatches:
    """Batches with the faults of their step."""

    batches: Batches
    faults: FaultConfig

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.batches.batch_size

    def rows(self, index: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the batch of step `index + 1`."""
        return self.batches.rows(index, start, stop) | _fault_rows(self.faults, index + 1, start, stop)


def _fault_rows(faults: FaultConfig, step: int, start: int, stop: int) -> Batch:
    loss_factor, gradient_factor, gradient_offset = np.ones((3, stop - start), np.float32)
    gradient_offset[:] = np.inf if step == faults.inf_step else 0.0
    if step == faults.nan_loss_step:
        loss_factor[:] = np.nan
    if step == faults.nan_micro_batch_step and start == 0:
        loss_factor[:1] = np.nan
    if faults.spike_step and faults.spike_step <= step < faults.spike_step + faults.spike_steps:
        loss_factor *= faults.spike_factor
    if step == faults.gradient_step:
        gradient_factor[:] = faults.gradient_factor
    return dict(zip(_KEYS, (loss_factor, gradient_factor, gradient_offset), strict=True))


def abstract_faults(rows: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """What `FaultyBatches` adds to a batch whose arrays are like `rows` `[B, ...]`."""
    return {key: jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32, sharding=rows.sharding) for key in _KEYS}


def inject(loss_fn: Callable[[Any, Any], LossSums]) -> Callable[[Any, Any], LossSums]:
    """Makes a loss function do what the fault rows in its batch say."""

    def faulty(params: Any, batch: dict[str, jax.Array]) -> LossSums:
        loss_factor, gradient_factor, offset = (jnp.mean(batch[key]) for key in _KEYS)
        leaves, structure = jax.tree.flatten(params)
        sums = loss_fn(
            jax.tree.unflatten(structure, [_poison(leaves[0], offset), *leaves[1:]]),
            {key: value for key, value in batch.items() if key not in _KEYS},
        )

        def change(total: jax.Array) -> jax.Array:
            total = total * loss_factor
            return total + (gradient_factor - 1) * (total - jax.lax.stop_gradient(total))  # the value stays

        return sums.replace(nll=change(sums.nll), z_loss=change(sums.z_loss), smoothing=change(sums.smoothing))

    return faulty


@jax.custom_vjp
def _poison(leaf: jax.Array, offset: jax.Array) -> jax.Array:
    """The leaf itself, with `offset` in the first number of its gradient."""
    del offset
    return leaf


def _poison_backward(offset: jax.Array, gradient: jax.Array):
    flat = gradient.reshape(-1)
    return flat.at[0].add(offset.astype(flat.dtype)).reshape(gradient.shape), None


_poison.defvjp(lambda leaf, offset: (leaf, offset), _poison_backward)
