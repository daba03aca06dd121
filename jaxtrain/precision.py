"""Which dtype holds the parameters and which one computes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Policy:
    """Dtypes of a run (arXiv:1710.03740): float32 masters, and a copy of them that computes.

    Attributes:
      params: dtype of the parameters in the TrainState; only float32, because bfloat16 loses small updates: 1 - 6e-4
        rounds back to 1.
      compute: dtype that the loss function sees the parameters in: float32 or bfloat16. float16 needs loss scaling.
      output: dtype of losses and metrics; only float32.

    Raises:
      ValueError: a dtype other than those.
    """

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self):
        for name, allowed in (("params", ["float32"]), ("compute", ["float32", "bfloat16"]), ("output", ["float32"])):
            dtype = jnp.dtype(getattr(self, name)).name
            if dtype not in allowed:
                raise ValueError(f"Policy.{name} is {dtype}; it can be {' or '.join(allowed)}")

    def cast_to_compute(self, params: Any) -> Any:
        """Casts the floating leaves of a tree to the compute dtype."""

        def cast(leaf):
            return leaf.astype(self.compute) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(cast, params)
