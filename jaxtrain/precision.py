"""Dtype policy (float32 masters, narrow compute) and the loss scaling that float16 needs."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import trees
from jaxtrain.checks import check_count, check_number


@dataclass(frozen=True)
class Policy:
    """Dtypes of a run (arXiv:1710.03740): float32 master parameters, cast to the compute dtype in each step.

    Attributes:
      params: dtype of the parameters in the TrainState; only float32, because bfloat16 loses small updates: 1 - 6e-4
        rounds back to 1.
      compute: dtype of the parameters inside the loss function: float32, bfloat16 or float16. float16 needs
        `LossScaling`: its gradients underflow below 6e-8 and overflow above 65,504.
      output: dtype of losses and metrics; only float32.

    Raises:
      ValueError: another dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.precision import Policy
      >>> Policy(compute="bfloat16").cast_to_compute({"w": jnp.ones(2), "step": jnp.int32(3)})["w"].dtype
      dtype(bfloat16)
    """

    params: str = "float32"
    compute: str = "float32"
    output: str = "float32"

    def __post_init__(self):
        computing = ["float32", "bfloat16", "float16"]
        for name, allowed in (("params", ["float32"]), ("compute", computing), ("output", ["float32"])):
            try:
                dtype = jnp.dtype(getattr(self, name)).name
            except TypeError:  # not the name of a dtype
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
    """State of loss scaling."""

    scale: jax.Array  # current scale, float32
    good_steps: jax.Array  # number of steps since the scale last changed, int32


@dataclass(frozen=True)
class LossScaling:
    """Dynamic loss scaling (arXiv:1710.03740): multiplies the loss by a factor and divides its float32 gradient by it.

    The scale doubles after `growth_interval` steps without overflow and is halved by an overflow, between bounds:
    unbounded growth ends at infinity, and unbounded shrinking hides a broken run.

    Attributes:
      initial: scale of the first step.
      growth_interval: steps without overflow before the scale doubles, at least 1.
      floor, ceiling: bounds of the scale.
      divisor: number of tokens of a micro-batch on one device. The factor is scale / divisor, so that a scale means the
        same for a sum over tokens as for their mean. A power of two keeps the scaling exact.

    Raises:
      ValueError: a number out of range.

    Example:
      >>> from jaxtrain.precision import LossScaling
      >>> scaling = LossScaling(initial=8.0)
      >>> print(scaling.update(scaling.init(), finite=False).scale)
      4.0
    """

    initial: float = 2.0**15
    growth_interval: int = 2000
    floor: float = 1.0
    ceiling: float = 2.0**24
    divisor: float = 1.0

    def __post_init__(self):
        if not 0 < self.floor <= self.initial <= self.ceiling < math.inf:
            given = f"floor {self.floor}, initial {self.initial}, ceiling {self.ceiling}"
            raise ValueError(f"loss scaling needs 0 < floor <= initial <= ceiling, got {given}")
        check_count("growth_interval", self.growth_interval, 1)
        check_number("divisor", self.divisor, "(0, inf)")

    def init(self) -> LossScale:
        """Returns the state before step 1."""
        return LossScale(jnp.asarray(self.initial, jnp.float32), jnp.zeros((), jnp.int32))

    def factor(self, state: LossScale) -> jax.Array:
        """Returns the factor on the summed loss, float32."""
        return state.scale / self.divisor

    def update(self, state: LossScale, finite: jax.Array) -> LossScale:
        """Returns the state after a step, given whether its gradient was finite (bool)."""
        good_steps = jnp.where(finite, state.good_steps + 1, 0)
        grows = good_steps >= self.growth_interval
        grown = jnp.where(grows, jnp.minimum(state.scale * 2, self.ceiling), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / 2, self.floor))
        return LossScale(scale, jnp.where(grows, 0, good_steps))
