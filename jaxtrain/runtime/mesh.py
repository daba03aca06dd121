"""Devices, the mesh over them, and how state and batches lie on it.

The mesh has three axes: `data` (replicas), `fsdp` (matrices in parts, gathered where they are used: ZeRO,
arXiv:1910.02054) and `tensor` (heads, hidden channels and vocabulary in parts, arXiv:1909.08053). Rows of a batch are
spread over the first two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.config import MeshConfig
from jaxtrain.losses import LossSums

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share the rows of a batch

# The one table: which mesh axis has a logical axis in parts. A logical axis that is not here is whole everywhere.
RULES = {"rows": ROWS, "vocab": "tensor", "heads": "tensor", "hidden": "tensor", "embed": "fsdp"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices, near ones next to each other.

    Args:
      config: sizes of the axes. Without a -1 among them the mesh takes the first data x fsdp x tensor devices.
      devices: None: all.

    Returns:
      A mesh with the axes `data`, `fsdp`, `tensor`. TPU slices joined by a data-centre network lie along `data`.

    Raises:
      ValueError: sizes that do not fit the devices.
    """
    everywhere = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(everywhere))
    devices = everywhere[: math.prod(shape)]
    if missing := {device.process_index for device in everywhere} - {device.process_index for device in devices}:
        raise ValueError(
            f"a mesh of {_product(shape)} leaves {len(missing)} processes without a device, {len(everywhere)} devices "
            "are there: set one axis to -1"
        )
    num_slices = len({getattr(device, "slice_index", None) for device in devices})
    if num_slices > 1:
        return Mesh(_hybrid(shape, num_slices, devices), AXES)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of the axes on a number of devices; a ValueError with the arithmetic if they do not fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if known > num_devices:
        raise ValueError(f"a mesh of {_product(sizes)} takes {known} devices, and there are {num_devices}")
    if -1 in sizes and num_devices % known:
        raise ValueError(
            f"a mesh of {_product(sizes)} cannot be made of {num_devices} devices: {known} does not divide it"
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))


def _hybrid(shape: tuple[int, ...], num_slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Slices along `data`: of all that goes over the network between them, gradients once a step is the least."""
    if shape[0] % num_slices:
        raise ValueError(
            f"mesh.data {shape[0]} is not divisible by the {num_slices} slices, each of {len(devices) // num_slices} "
            "devices: fsdp and tensor must fit in one slice"
        )
    within = (shape[0] // num_slices, *shape[1:])
    between = (num_slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def partition_spec(axes: Sequence[str | None], rules: dict[str, Any] = RULES) -> P:
    """The PartitionSpec of an array whose dimensions have these logical axes; None and unlisted: whole.

    Raises:
      ValueError: two dimensions in parts over the same mesh axis.
    """
    spec = tuple(rules.get(axis) if axis else None for axis in axes)
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(axes)} become {spec}: a mesh axis can split one dimension only")
    return P(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device: scalars."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The leading dimension spread over `data` and `fsdp`: batches."""
    return NamedSharding(mesh, P(ROWS))


def num_row_shards(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a ValueError if the batch does not divide evenly over micro-batches and devices."""
    parts = num_row_shards(mesh)
    if accumulate < 1:
        raise ValueError(f"train.accumulate must be at least 1 micro-batch, got {accumulate}")
    if batch_size % (accumulate * parts):
        raise ValueError(
            f"train.batch_size {batch_size} is not divisible by train.accumulate {accumulate} x {parts} devices along "
            f"mesh.data and mesh.fsdp = {accumulate * parts}: change one of them"
        )


def map_loss(loss_fn: Callable[[Any, Any], LossSums], mesh: Mesh, specs: Any) -> Callable[[Any, Any], LossSums]:
    """Runs a loss function on each device's part of the parameters (by `specs`) and of the batch (by rows)."""

    def body(params: Any, batch: Any) -> LossSums:
        return jax.lax.psum(loss_fn(params, batch), ROWS)

    return _shard_map(body, mesh, specs, P())


def map_gradients(mesh: Mesh, specs: Any) -> Callable[[Callable], Callable]:
    """For `make_train_step(map_gradients=...)`: each device differentiates the loss of its own rows.

    A gradient is added over the axes among which rows are shared and its parameter is not; where the parameter is in
    parts over such an axis, the loss function gathered it, and the transpose of that has added it already.
    """

    def wrap(gradients: Callable) -> Callable:
        def add(gradient: jax.Array, spec: P) -> jax.Array:
            axes = tuple(axis for axis in ROWS if axis not in spec)
            return jax.lax.psum(gradient, axes) if axes else gradient

        def body(params: Any, batch: Any, *loss_factor: jax.Array):
            sums, grads = gradients(params, batch, *loss_factor)
            return jax.lax.psum(sums, ROWS), jax.tree.map(add, grads, specs)

        return _shard_map(body, mesh, specs, (P(), specs))

    return wrap


def _shard_map(body: Callable, mesh: Mesh, specs: Any, out_specs: Any) -> Callable:
    def mapped(params: Any, batch: Any, *scalars: jax.Array):
        in_specs = (specs, P(ROWS), *(P() for _ in scalars))
        # check_vma: Pallas kernels do not say over which axes their results vary. The model's collectives carry their
        # own derivatives (models/parallel.py), so nothing depends on JAX's bookkeeping of it.
        run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return run(params, batch, *scalars)

    return mapped
