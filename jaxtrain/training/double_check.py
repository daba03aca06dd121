"""Detection of silent data corruption: a step runs twice on the same inputs, and all bits of the results must agree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.monitoring.metrics import PackedMetrics
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.processes import compile_together
from jaxtrain.step import TrainState
from jaxtrain.trees import leaf_paths

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


class ReplayMismatch(OSError):
    """Two runs of one step differ: the machine computed one of them wrongly."""

    def __init__(self, step: int, leaves: list[str], last_checkpoint: int | None):
        listed = ", ".join(leaves[:5]) + (f" and {len(leaves) - 5} more" if len(leaves) > 5 else "")
        saved = "start again" if last_checkpoint is None else f"resume from the checkpoint of step {last_checkpoint}"
        super().__init__(
            f"step {step} gave other bits when it was run again (silent data corruption): {listed}; the step was not "
            f"saved: {saved} on other devices (GPUs are deterministic only with XLA_FLAGS={_DETERMINISTIC})"
        )


class ReplayChecked:
    """Compiled train step that runs one of `every` steps twice; None disables the check.

    The second run starts from a copy of the state, because the first run's state is donated. During the check a device
    holds its shard of the state twice. The first run's result is returned, so the check changes no number.
    """

    def __init__(
        self, every: int | None, train_step: Callable, like: TrainState, report: Callable[[int, list[str]], int | None]
    ):
        """Wraps the compiled step of a run; `like` has the shapes and shardings of its state.

        `report` receives a step and the arrays that differ, and returns the step of the newest checkpoint.
        """
        self._every, self._train_step, self._report = every, train_step, report
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        self._copy = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings)
        everywhere = replicated(jax.tree.leaves(shardings)[0].mesh)
        self._compare = jax.jit(lambda a, b: jax.tree.map(_differs, a, b), out_shardings=everywhere)

    def __call__(self, done: int, state: TrainState, batch: Any) -> tuple[TrainState, PackedMetrics]:
        """Runs step `done`, counted from 1; raises a ReplayMismatch on every process, before the state can be saved."""
        if not self._every or done % self._every:
            return self._train_step(state, batch)
        copy = self._copy(state)
        result = self._train_step(state, batch)
        second = self._train_step(copy, batch)
        compile_together(self._compare, result, second)
        differs = jax.device_get(self._compare(result, second))
        pairs = zip(leaf_paths(differs), jax.tree.leaves(differs), strict=True)
        if leaves := [path.partition("/")[2] for path, value in pairs if value]:
            raise ReplayMismatch(done, leaves, self._report(done, leaves))
        return result


def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns True if any bit differs. Comparing floats would miss NaN and -0."""
    return jnp.any(_bits(a) != _bits(b))


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
