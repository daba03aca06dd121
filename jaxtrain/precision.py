"""Which dtype holds the parameters and which one computes; and loss scaling, which float16 needs."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import trees


@dataclass(frozen=True)
class Policy:
    """Dtypes of a run (arXiv:1710.03740): float32 masters, and a copy of them that computes.

    Attributes:
      params: dtype of the parameters in the TrainState; only float32, because bfloat16 loses small updates: 1 - 6e-4
        rounds back to 1.
      compute: dtype that the loss function sees the parameters in: float32, bfloat16 or float16. float16 needs
        `LossScaling`: its gradients underflow below 6e-8 and overflow above 65,504.
      output: dtype of losses and metrics; only float32.

    Raises:
      ValueError: a dtype other than those.
    """

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self):
        computing = ["float32", "bfloat16", "float16"]
        for name, allowed in (("params", ["float32"]), ("compute", computing), ("output", ["float32"])):
            try:
                dtype = jnp.dtype(getattr(self, name)).name
            except TypeError:  # the name of none
                dtype = repr(getattr(self, name))
            if dtype not in allowed:
                raise ValueError(f"Policy.{name} is {dtype}; it can be {' or '.join(allowed)}")

    def cast_to_compute(self, params: Any) -> Any:
        """Casts the floating leaves of a tree to the compute dtype."""

        def cast(leaf):
            return leaf.astype(self.compute) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        return jax.tree.map(cast, params)


@trees.dataclass
class LossScale:
    """State of loss scaling: the factor now, and the number of steps since it last changed."""

    scale: jax.Array  # float32
    good_steps: jax.Array  # int32


@dataclass(frozen=True)
class LossScaling:
    """Dynamic loss scaling (arXiv:1710.03740): the loss times a factor, its gradient divided by it in float32.

    The factor doubles after `growth_interval` steps without overflow and is halved by an overflow, between bounds: one
    that may grow for ever ends at infinity, and one that may shrink for ever hides a broken run.

    Attributes:
      initial: the first factor.
      growth_interval: steps without overflow before it doubles.
      floor, ceiling: its bounds.
      divisor: what the loss is divided by as well, so that the factor means the same for a sum over tokens as for their
        mean: the number of tokens of a micro-batch on one device. A power of two keeps the scaling exact.

    Raises:
      ValueError: a number out of range.
    """

    initial: float = 2.0**15
    growth_interval: int = 2000
    floor: float = 1.0
    ceiling: float = 2.0**24
    divisor: float = 1.0

    def __post_init__(self):
        if not 0 < self.floor <= self.initial <= self.ceiling < math.inf:
            raise ValueError(
                f"loss scaling needs 0 < floor <= initial <= ceiling, got floor {self.floor}, initial {self.initial}, "
                f"ceiling {self.ceiling}"
            )
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1 step, got {self.growth_interval}")
        if not 0 < self.divisor < math.inf:
            raise ValueError(f"divisor must be above 0, got {self.divisor}")

    def init(self) -> LossScale:
        """The state before the first step."""
        return LossScale(jnp.float32(self.initial), jnp.zeros((), jnp.int32))

    def factor(self, state: LossScale) -> jax.Array:
        """What the summed loss is multiplied by, float32."""
        return state.scale / self.divisor

    def update(self, state: LossScale, finite: jax.Array) -> LossScale:
        """The state after a step whose gradient was `finite` (bool) or not."""
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= self.growth_interval
        grown = jnp.where(grows, jnp.minimum(state.scale * 2, self.ceiling), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / 2, self.floor))
        return LossScale(scale, jnp.where(grows, 0, good_steps))
