"""Devices, the mesh over them, and how state and batches lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh with one axis, `data`, over the first `num_devices` devices; 0: all.

    Raises:
      ValueError: more devices than there are.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise ValueError(f"train.num_devices {num_devices} exceeds the {len(devices)} devices that JAX sees")
    return Mesh(np.array(devices[: num_devices or len(devices)]), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: parameters and optimizer state."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The leading dimension spread over `data`: batches."""
    return NamedSharding(mesh, P("data"))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a ValueError if the batch does not divide evenly over micro-batches and devices."""
    if batch_size % (accumulate * mesh.size):
        raise ValueError(
            f"train.batch_size {batch_size} is not divisible by train.accumulate {accumulate} x {mesh.size} devices = "
            f"{accumulate * mesh.size}: change one of them, or set --train.num-devices"
        )
