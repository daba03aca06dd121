"""Mesh over the devices, and shardings of state and batches.

The mesh has three axes: `data` (replicas), `fsdp` (sharded matrices, gathered where they are used: ZeRO,
arXiv:1910.02054) and `tensor` (sharded heads, hidden channels and vocabulary: arXiv:1909.08053). Rows of a batch are
sharded over the first two.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.checks import check_count
from jaxtrain.config import MeshConfig
from jaxtrain.fields import check_divisible
from jaxtrain.losses import LossSums

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that share the rows of a batch

# Mesh axis that shards each logical axis. Other logical axes are replicated.
LOGICAL_AXES = {"rows": ROWS, "vocab": "tensor", "heads": "tensor", "hidden": "tensor", "embed": "fsdp"}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `data`, `fsdp`, `tensor` that places neighboring devices next to each other.

    Without a -1 among its sizes it uses the first data x fsdp x tensor devices. TPU slices joined by a data-centre
    network lie along `data`. Raises a ValueError if the sizes do not fit the devices.
    """
    everywhere = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(everywhere))
    devices = everywhere[: math.prod(shape)]
    if missing := {device.process_index for device in everywhere} - {device.process_index for device in devices}:
        problem = f"leaves {len(missing)} processes without a device, of {len(everywhere)} devices"
        raise ValueError(f"a mesh of {_format_shape(shape)} {problem}: set one axis to -1")
    num_slices = len({getattr(device, "slice_index", None) for device in devices})
    if num_slices > 1:
        return Mesh(_hybrid(shape, num_slices, devices), AXES)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of the axes on a number of devices. Raises a ValueError if they do not fit."""
    sizes = [config.data, config.fsdp, config.tensor]
    known, name = math.prod(size for size in sizes if size != -1), _format_shape(sizes)
    if known > num_devices:
        raise ValueError(f"a mesh of {name} takes {known} devices, and there are {num_devices}")
    if -1 in sizes and num_devices % known:
        raise ValueError(f"a mesh of {name} cannot be made of {num_devices} devices: {known} does not divide it")
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def _format_shape(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))


def _hybrid(shape: tuple[int, ...], num_slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Places TPU slices along `data`, whose traffic over the network is the smallest: gradients once per step."""
    remedy = f"fsdp and tensor must fit in one slice, of {len(devices) // num_slices} devices"
    check_divisible("mesh.data", shape[0], "the number of slices,", num_slices, remedy)
    within, between = (shape[0] // num_slices, *shape[1:]), (num_slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def partition_spec(axes: Sequence[str | None], rules: dict[str, Any] = LOGICAL_AXES) -> P:
    """Returns the PartitionSpec of an array with these logical axes. None and unlisted axes are not sharded.

    Raises a ValueError if two dimensions are sharded over the same mesh axis.
    """
    spec = tuple(rules.get(axis) if axis else None for axis in axes)
    used = [name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(axes)} become {spec}: a mesh axis can shard one dimension only")
    return P(*spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def num_row_shards(mesh: Mesh) -> int:
    """Returns the number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises a ValueError if the batch does not divide evenly over micro-batches and devices."""
    parts = num_row_shards(mesh)
    check_count("train.accumulate", accumulate, 1)
    by = f"train.accumulate {accumulate} x {parts} devices along mesh.data and mesh.fsdp ="
    check_divisible("train.batch_size", batch_size, by, accumulate * parts)


def map_loss(loss_fn: Callable[[Any, Any], LossSums], mesh: Mesh, specs: Any) -> Callable[[Any, Any], LossSums]:
    """Runs a loss function on each device's shard of the parameters (by `specs`) and of the batch (by rows)."""

    def body(params: Any, batch: Any) -> LossSums:
        return jax.lax.psum(loss_fn(params, batch), ROWS)

    return _shard_map(body, mesh, specs, P())


def map_gradients(mesh: Mesh, specs: Any) -> Callable[[Callable], Callable]:
    """Returns a wrapper for `make_train_step(map_gradients=...)`: each device differentiates the loss of its rows.

    A gradient is all-reduced over the axes that shard the rows but not its parameter. Over an axis that shards the
    parameter too, the loss function gathers the parameter, and the transpose of the gather has summed the gradient.
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
        # check_vma: Pallas kernels do not declare over which axes their results vary. The model's collectives define
        # their own derivatives (models/parallel.py), so nothing depends on JAX's tracking of replication.
        run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return run(params, batch, *scalars)

    return mapped
