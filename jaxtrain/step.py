"""The train step: a pure function around which everything else is arranged.

Order, once a step: accumulate the gradients of the summed loss over micro-batches (and devices) -> divide by the global
weight (and the loss scale) -> the optimizer's chain: guard, norm, clip, Adam, decay, learning rate -> add. Jit it with
the state donated:

  train_step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import trees
from jaxtrain.losses import LossSums
from jaxtrain.optim import global_norm
from jaxtrain.precision import LossScale, LossScaling, Policy

Batch = Any  # a pytree of arrays [B, ...]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], LossSums]

_PMAP_AXIS = "devices"


@trees.dataclass
class TrainState:
    """All that a run carries from step to step.

    Attributes:
      step: number of train steps done, int32 scalar.
      params: parameters, any pytree of float32 arrays.
      opt_state: state of the optimizer.
      loss_scale: state of loss scaling (`LossScaling.init()`); None: there is none (only float16 needs it).
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
    ) -> "TrainState":
        """Starts at step 0 with a fresh optimizer state."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss_scale)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    policy: Policy | None = None,
    loss_scaling: LossScaling | None = None,
    map_gradients: Callable[[Callable], Callable] | None = None,
    diagnose: Callable[..., Metrics] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a pure, un-jitted train step.

    Args:
      loss_fn: `(params, batch) -> LossSums`: sums over tokens, not means. Sums of micro-batches and devices are divided
        once by the global weight, so any split of a batch gives the same loss and gradient, however unequal the parts.
      optimizer: any optax transformation. It is given `step=` and `loss=` if it takes extra arguments.
      accumulate: number of micro-batches. Rows i, i + accumulate, ... of the batch make micro-batch i, so that a batch
        sharded over its rows is split within each device.
      axis_name: name of the mapped axis (or axes) where this is the body of `jax.pmap` or `jax.shard_map`: sums are
        then reduced over it, and every device computes the same update.
      policy: dtypes; None: compute in the parameters' own dtype. The cast is done once a step.
      loss_scaling: for float16: the loss is multiplied by the factor in `state.loss_scale`, and the gradient, in
        float32, divided by it before anything looks at it. A gradient that is not finite halves the factor; that it is
        not applied is the optimizer's business: wrap it in `guard.skip_bad_steps`.
      map_gradients: wraps `(params, batch, *loss_factor) -> (LossSums, gradients)`, all micro-batches of it, to run it
        over a mesh while the optimizer stays outside: see `sharding.map_gradients`.
      diagnose: `(params, grads, updates, opt_state) -> dict` of more metrics, from the parameters before the update,
        the gradient before clipping and the optimizer's new state: see `diagnostics.layer_diagnostics`.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss` (nll + z_loss + smoothing) and
      its parts `nll` and `z_loss`, nats a token; `grad_norm` before clipping; `clip_factor` and `learning_rate` as the
      optimizer applied them (NaN if its state does not hold them under these names); `update_norm`; `param_norm` before
      the update; `tokens`, the global weight; `skipped`, 1 if the optimizer says it skipped the step, `skip_reason` and
      `give_up` as `guard.GuardState` has them, and `clip_factor` 0 then; with loss scaling, `loss_scale` of this step.

    Raises:
      ValueError: accumulate below 1, float16 without loss scaling; when traced, a batch that `accumulate` does not
        divide, or loss scaling with an optimizer that skips nothing or a state without it.
    """
    _check(accumulate, policy, loss_scaling)
    optimizer = optax.with_extra_args_support(optimizer)
    gradients = functools.partial(_accumulate_gradients, loss_fn, accumulate=accumulate, axis_name=axis_name)
    if map_gradients is not None:
        gradients = map_gradients(gradients)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        factor = _loss_factor(state, loss_scaling)
        params = policy.cast_to_compute(state.params) if policy else state.params
        sums, grads = gradients(_localize(params, axis_name), batch, *factor)
        if axis_name is not None:
            sums, grads = jax.lax.psum((sums, grads), axis_name)
        grads = _mean(grads, sums, factor)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, step=state.step, loss=sums.mean()
            )
            new_params = jax.tree.map(_add_update, state.params, updates)
        metrics = _metrics(sums, grads, updates, state.params, opt_state)
        if diagnose is not None:
            metrics |= diagnose(state.params, grads, updates, opt_state)
        new_state = state.replace(step=state.step + 1, params=new_params, opt_state=opt_state)
        if loss_scaling is not None:
            metrics["loss_scale"] = state.loss_scale.scale
            finite = jnp.isfinite(metrics["grad_norm"])
            new_state = new_state.replace(loss_scale=loss_scaling.update(state.loss_scale, finite))
        return new_state, metrics

    return train_step


def make_eval_step(
    loss_fn: LossFn, *, axis_name: str | tuple[str, ...] | None = None, policy: Policy | None = None
) -> Callable[[Any, Batch], LossSums]:
    """Makes `eval_step(params, batch) -> LossSums`: add the sums over a whole data set, then divide once."""

    def eval_step(params: Any, batch: Batch) -> LossSums:
        sums = loss_fn(policy.cast_to_compute(params) if policy else params, batch)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step


def pmap_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    policy: Policy | None = None,
    devices: list[jax.Device] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Maps the same train step with `jax.pmap`, for code that keeps a replica of the state on each device.

    State leaves are `[devices, ...]` as `replicate` makes them, batch leaves `[devices, B / devices, ...]`; metrics
    come back `[devices]`, all equal. The state is donated. Arguments as for `make_train_step`.
    """
    body = make_train_step(loss_fn, optimizer, accumulate=accumulate, axis_name=_PMAP_AXIS, policy=policy)
    return jax.pmap(body, axis_name=_PMAP_AXIS, donate_argnums=0, devices=devices)


def replicate(state: Any, devices: list[jax.Device] | None = None) -> Any:
    """Copies a state to each device, leaves `[devices, ...]`, laid out as `pmap_train_step` returns it.

    `flax.jax_utils.replicate` serves too, but names the axis otherwise, which costs a second compilation at step 2.
    """
    devices = devices or jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (_PMAP_AXIS,)), PartitionSpec(_PMAP_AXIS))
    return jax.tree.map(lambda x: jax.device_put(jnp.stack([x] * len(devices)), sharding), state)


def _check(accumulate: int, policy: Policy | None, loss_scaling: LossScaling | None) -> None:
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 micro-batch, got {accumulate}")
    if policy is not None and policy.compute == "float16" and loss_scaling is None:
        raise ValueError("gradients underflow in float16: give make_train_step(loss_scaling=LossScaling())")


def _mean(grads: Any, sums: LossSums, factor: tuple[jax.Array, ...]) -> Any:
    """The gradient of the mean loss, of that of the summed loss times the factor."""
    # Two divisions: the product of a factor of 2^24 and millions of tokens is not exact.
    divisors = (*factor, jnp.maximum(sums.weight, 1.0))
    return jax.tree.map(lambda g: functools.reduce(jnp.divide, divisors, g), grads)


def _metrics(sums: LossSums, grads: Any, updates: Any, params: Any, opt_state: optax.OptState) -> Metrics:
    """What every step says of itself: see `make_train_step`."""
    skipped = _read(opt_state, "skipped", 0.0)
    return {
        "loss": sums.mean(),
        "nll": sums.mean_nll(),
        "z_loss": sums.z_loss / jnp.maximum(sums.weight, 1.0),
        "grad_norm": global_norm(grads),
        "clip_factor": jnp.where(skipped == 1, 0.0, _read(opt_state, "clip_factor", jnp.nan)),
        "update_norm": global_norm(updates),
        "param_norm": global_norm(params),
        "learning_rate": _read(opt_state, "learning_rate", jnp.nan),
        "tokens": sums.weight,
        "skipped": skipped,
        "skip_reason": _read(opt_state, "skip_reason", 0.0),
        "give_up": _read(opt_state, "give_up", 0.0),
    }


def _loss_factor(state: TrainState, loss_scaling: LossScaling | None) -> tuple[jax.Array, ...]:
    """What the loss is multiplied by, if it is."""
    if loss_scaling is None:
        return ()
    if state.loss_scale is None:
        raise ValueError("the state has no loss scale: TrainState.create(params, optimizer, loss_scaling.init())")
    if not optax.tree_utils.tree_get_all_with_path(state.opt_state, "skipped"):
        raise ValueError(
            "loss scaling finds its factor by overflowing, and this optimizer would apply the overflow: wrap it in "
            "jaxtrain.guard.skip_bad_steps"
        )
    return (loss_scaling.factor(state.loss_scale),)


def _accumulate_gradients(
    loss_fn: LossFn,
    params: Any,
    batch: Batch,
    *loss_factor: jax.Array,
    accumulate: int,
    axis_name: str | tuple[str, ...] | None,
) -> tuple[LossSums, Any]:
    """Returns the sums and the float32 gradient of the summed loss (times the factor) over all micro-batches."""

    def total(params, micro_batch):
        sums = loss_fn(params, micro_batch)
        if not isinstance(sums, LossSums):
            raise ValueError(f"loss_fn must return LossSums, sums over tokens, not a {type(sums).__name__}")
        return functools.reduce(jnp.multiply, loss_factor, sums.total()), sums

    def gradients(micro_batch):
        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params, micro_batch)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if accumulate == 1:
        return gradients(batch)
    micro_batches = jax.tree.map(functools.partial(_split_rows, accumulate=accumulate), batch)
    shapes = jax.eval_shape(lambda batches: gradients(jax.tree.map(lambda x: x[0], batches)), micro_batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry, micro_batch):
        return jax.tree.map(jnp.add, carry, gradients(micro_batch)), None

    return jax.lax.scan(body, _localize(zeros, axis_name), micro_batches)[0]


def _localize(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """Marks replicated values as belonging to each device.

    Where `shard_map` tracks replication it would reduce the gradient of replicated parameters by itself, and the one
    reduction of the train step would count it again.
    """
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")


def _split_rows(leaf: jax.Array, accumulate: int) -> jax.Array:
    """`[B, ...]` to `[accumulate, B / accumulate, ...]`, rows dealt out in turn."""
    if leaf.shape[0] % accumulate:
        raise ValueError(
            f"a batch of {leaf.shape[0]} rows (on each device) cannot be split into accumulate={accumulate} equal "
            "micro-batches: change one of them"
        )
    return leaf.reshape((leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:])).swapaxes(0, 1)


def _add_update(param: jax.Array, update: jax.Array) -> jax.Array:
    added = (param.astype(jnp.float32) + update.astype(jnp.float32)).astype(param.dtype)
    # A sum flushes subnormal numbers on some devices; nothing is to change where nothing is added.
    return jnp.where(update == 0, param, added)


def _read(opt_state: optax.OptState, name: str, default: float) -> jax.Array:
    """A float32 scalar that the optimizer keeps in its state under a name (optax.inject_hyperparams does, too)."""
    found = [value for _, value in optax.tree_utils.tree_get_all_with_path(opt_state, name)]
    return jnp.asarray(found[0] if found else default, jnp.float32)
