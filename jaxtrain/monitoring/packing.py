"""A step's metrics in one array.

The host pays for each array that a step returns, and more for each that it reads: in steps of some milliseconds fifteen
scalars show.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.tree_util.register_dataclass, data_fields=["metrics"], meta_fields=["shapes"])
@dataclasses.dataclass(frozen=True)
class PackedMetrics:
    """Float32 arrays by name.

    Attributes:
      metrics: all of them, one behind the other, float32 [n].
      shapes: name and shape of each.
    """

    metrics: jax.Array
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def unpack(self) -> dict[str, np.ndarray]:
        """Waits for the array, and takes it apart."""
        sizes = [math.prod(shape) for _, shape in self.shapes]
        parts = np.split(jax.device_get(self.metrics), np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}


def pack(metrics: Mapping[str, jax.Array]) -> PackedMetrics:
    """Packs float32 arrays, which `unpack` returns as they were."""
    shapes = tuple((name, jnp.shape(value)) for name, value in metrics.items())
    return PackedMetrics(jnp.concatenate([jnp.ravel(value) for value in metrics.values()]), shapes)
