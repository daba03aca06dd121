"""The train step: a pure function around which everything else is arranged.

Order within a step: sum the gradients of the summed loss over micro-batches and devices, divide by the global weight
(and the loss scale), run the optimizer chain (guard, clip, Adam, decay, learning rate), add the updates. Jit the step
with the state donated:

  train_step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import trees
from jaxtrain.losses import LossSums
from jaxtrain.precision import LossScale, LossScaling, Policy
from jaxtrain.trees import global_norm

Batch = Any  # a pytree of arrays [B, ...]
Metrics = dict[str, jax.Array]
LossFn = Callable[..., LossSums | tuple[LossSums, Metrics]]
AxisName = str | tuple[str, ...]

_PMAP_AXIS = "devices"


@trees.dataclass
class TrainState:
    """Everything that a run carries from step to step.

    Attributes:
      step: number of completed train steps, int32 scalar.
      params: parameters, any pytree of float32 arrays.
      opt_state: state of the optimizer.
      loss_scale: state of loss scaling (`LossScaling.init()`); None without loss scaling.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    loss_scale: LossScale | None = None

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
    ) -> "TrainState":
        """Returns the state before step 1, with a fresh optimizer state."""
        return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss_scale)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    axis_name: AxisName | None = None,
    policy: Policy | None = None,
    loss_scaling: LossScaling | None = None,
    seed: int = 0,
    micro_batch_terms: bool = False,
    map_gradients: Callable[[Callable], Callable] | None = None,
    diagnose: Callable[..., Metrics] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a pure, un-jitted train step.

    Args:
      loss_fn: `(params, batch) -> LossSums` or `(params, batch, rng) -> LossSums`: sums over tokens, not means. The
        sums of micro-batches and devices are divided once by the global weight, so any split of a batch gives the same
        loss and gradient. A third positional parameter without a default, or named `rng`, receives a PRNG key that is
        a pure function of (seed, step, micro-batch, index along `axis_name`). The function may also return
        `(LossSums, {"name": sum over tokens})`; these sums become metrics, divided by the global weight.
      optimizer: any optax transformation. One that takes extra arguments receives `step=`, `loss=` and `value=`, the
        last two being the mean loss.
      accumulate: number of micro-batches. Rows i, i + accumulate, ... of the batch make micro-batch i, so that a batch
        sharded over its rows is split within each device.
      axis_name: name of the mapped axis (or axes) if the step is the body of `jax.pmap` or `jax.shard_map`. Sums are
        reduced over it, and every device computes the same update.
      policy: dtypes; None computes in the parameters' own dtype. The parameters are cast once a step.
      loss_scaling: required by float16. The loss is multiplied by the factor in `state.loss_scale` and the float32
        gradient divided by it. A gradient that is not finite halves the factor. Wrap the optimizer in
        `guard.skip_bad_steps`, so that such a gradient is not applied.
      seed: seed of the keys for `loss_fn`.
      micro_batch_terms: adds the metrics `micro_batch_loss`, `micro_batch_nll`, `micro_batch_tokens` and
        `micro_batch_grad_norm`, float32 `[accumulate]`. With several micro-batches, their gradients are computed twice.
      map_gradients: wraps `(params, batch, *loss_factor) -> (sums, gradients)`, all micro-batches of it, to run it over
        a mesh while the optimizer stays outside; see `runtime.mesh.map_gradients`.
      diagnose: `(params, grads, updates, opt_state) -> dict` of more metrics, from the parameters before the update,
        the gradient before clipping and the optimizer's new state; see `monitoring.layers.layer_diagnostics`.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss` (nll + z_loss + smoothing) and
      its parts `nll` and `z_loss`, in nats per token; `grad_norm` before clipping; `update_norm`; `param_norm` before
      the update; `tokens`, the global weight; `skipped`, 1 if the optimizer skipped the step. `clip_factor` (0 for a
      skipped step), `learning_rate`, `skip_reason` and `give_up` are present if the optimizer's state holds a scalar
      under that name; `loss_scale` is the scale of this step, present with loss scaling.

    Raises:
      ValueError: accumulate below 1; float16 without loss scaling; map_gradients with a loss that takes a key. When
        traced: a batch that `accumulate` does not divide; loss scaling with an optimizer that skips nothing or a state
        without a loss scale; a loss that is no LossSums; an auxiliary metric with the name of another metric.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxtrain.losses import cross_entropy
      >>> from jaxtrain.step import TrainState, make_train_step
      >>> def loss_fn(params, batch):
      ...     return cross_entropy(batch["inputs"] @ params["kernel"], batch["labels"])
      >>> optimizer = optax.sgd(0.1)
      >>> train_step = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2), donate_argnums=0)
      >>> state = TrainState.create({"kernel": jnp.zeros((4, 3))}, optimizer)
      >>> state, metrics = train_step(state, {"inputs": jnp.eye(4), "labels": jnp.array([0, 1, 2, 0])})
      >>> print(f"{metrics['loss']:.4f} nats, {metrics['tokens']:.0f} tokens, step {state.step}")
      1.0986 nats, 4 tokens, step 1
    """
    _check_options(loss_fn, accumulate, policy, loss_scaling, map_gradients)
    optimizer = optax.with_extra_args_support(optimizer)
    wrap = map_gradients or (lambda gradients: gradients)
    one = functools.partial(_differentiate, loss_fn)
    whole = wrap(functools.partial(_accumulate, one, accumulate=accumulate, axis_name=axis_name))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        factor = _loss_factor(state, loss_scaling)
        keys = _micro_batch_keys(seed, state.step, accumulate, axis_name) if _takes_key(loss_fn) else {}
        params = _localize(policy.cast_to_compute(state.params) if policy else state.params, axis_name)
        (sums, aux), grads = _sum_over_devices(whole(params, batch, *factor, **keys), axis_name)
        grads = _mean_gradient(grads, sums, factor)
        loss = sums.mean()
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, step=state.step, loss=loss, value=loss
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
        if micro_batch_terms:
            metrics |= _micro_batch_terms(wrap(one), params, batch, factor, keys, accumulate, axis_name)
        return new_state, _with_aux(metrics, aux, sums)

    return train_step


def make_eval_step(
    loss_fn: LossFn, *, axis_name: AxisName | None = None, policy: Policy | None = None
) -> Callable[[Any, Batch], LossSums]:
    """Makes `eval_step(params, batch) -> LossSums`.

    Add the sums over a whole data set, then divide once. A `loss_fn` that takes a key receives None: evaluation has no
    dropout. Auxiliary sums are dropped.

    Args:
      loss_fn, axis_name, policy: as for `make_train_step`.
    """

    def eval_step(params: Any, batch: Batch) -> LossSums:
        key = (None,) if _takes_key(loss_fn) else ()
        sums, _ = _split_aux(loss_fn(policy.cast_to_compute(params) if policy else params, batch, *key))
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step


def pmap_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    policy: Policy | None = None,
    seed: int = 0,
    devices: list[jax.Device] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Maps the train step with `jax.pmap`, for code that holds a replica of the state on each device.

    State leaves are `[devices, ...]` as `replicate` makes them, batch leaves `[devices, B / devices, ...]`. Metrics are
    `[devices]`, all equal. The state is donated.

    Args:
      loss_fn, optimizer, accumulate, policy, seed: as for `make_train_step`.
      devices: devices to map over; None: all local ones.
    """
    body = make_train_step(loss_fn, optimizer, accumulate=accumulate, axis_name=_PMAP_AXIS, policy=policy, seed=seed)
    return jax.pmap(body, axis_name=_PMAP_AXIS, donate_argnums=0, devices=devices)


def replicate(state: Any, devices: list[jax.Device] | None = None) -> Any:
    """Copies a state to each device, leaves `[devices, ...]`, laid out as `pmap_train_step` returns it.

    `flax.jax_utils.replicate` names the axis differently, which costs a second compilation at step 2.
    """
    devices = devices or jax.local_devices()
    sharding = NamedSharding(Mesh(np.array(devices), (_PMAP_AXIS,)), PartitionSpec(_PMAP_AXIS))
    return jax.tree.map(lambda x: jax.device_put(jnp.stack([x] * len(devices)), sharding), state)


def _check_options(
    loss_fn: LossFn,
    accumulate: int,
    policy: Policy | None,
    loss_scaling: LossScaling | None,
    map_gradients: Callable | None,
) -> None:
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be at least 1 micro-batch, got {accumulate}")
    if policy is not None and policy.compute == "float16" and loss_scaling is None:
        raise ValueError("gradients underflow in float16: give make_train_step(loss_scaling=LossScaling())")
    if map_gradients is not None and _takes_key(loss_fn):
        raise ValueError("map_gradients would give every device the same key: use axis_name with a loss that takes one")


def _takes_key(loss_fn: LossFn) -> bool:
    """Returns True if the third positional parameter is required or named `rng`."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return bool(third) and (third[0].default is third[0].empty or third[0].name == "rng")


def _micro_batch_keys(seed: int, step: jax.Array, accumulate: int, axis_name: AxisName | None) -> dict[str, jax.Array]:
    """Returns `{"keys": [accumulate]}`, one key for each micro-batch of this device."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return {"keys": jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(accumulate))}


def _loss_factor(state: TrainState, loss_scaling: LossScaling | None) -> tuple[jax.Array, ...]:
    """Returns `(loss_scale,)`, or `()` without loss scaling."""
    if loss_scaling is None:
        return ()
    if state.loss_scale is None:
        raise ValueError("the state has no loss scale: TrainState.create(params, optimizer, loss_scaling.init())")
    if not trees.state_fields(state.opt_state, "skipped", state.params):
        raise ValueError(
            "loss scaling finds its factor by overflowing, and this optimizer would apply the overflow: wrap it in "
            "jaxtrain.guard.skip_bad_steps"
        )
    return (loss_scaling.factor(state.loss_scale),)


def _split_aux(result: Any) -> tuple[LossSums, Metrics]:
    """Splits the result of a loss function into its sums and its auxiliary sums, `{}` if it has none."""
    sums, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(sums, LossSums) or not isinstance(aux, dict):
        raise ValueError(
            "loss_fn must return LossSums, sums over tokens, or (LossSums, dict of sums), not "
            f"{jax.tree.map(jnp.shape, result) if isinstance(result, tuple) else type(result).__name__}"
        )
    return sums, aux


def _differentiate(
    loss_fn: LossFn, params: Any, micro_batch: Batch, *loss_factor: jax.Array, keys: jax.Array | None = None
) -> tuple[tuple[LossSums, Metrics], Any]:
    """Returns the sums and the float32 gradient of the summed loss (times the factor) of one micro-batch."""

    def total(params):
        sums, aux = _split_aux(loss_fn(params, micro_batch, *(() if keys is None else keys)))
        aux = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
        return functools.reduce(jnp.multiply, loss_factor, sums.total()), (sums, aux)

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
    return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _accumulate(
    one: Callable,
    params: Any,
    batch: Batch,
    *loss_factor: jax.Array,
    keys: jax.Array | None = None,
    accumulate: int,
    axis_name: AxisName | None,
) -> tuple[tuple[LossSums, Metrics], Any]:
    """Sums what `one` returns for each micro-batch."""
    if accumulate == 1:
        return one(params, batch, *loss_factor, keys=keys)

    def gradients(part):
        return one(params, part[0], *loss_factor, keys=part[1])

    parts = _micro_batches(batch, keys, accumulate)
    shapes = jax.eval_shape(lambda parts: gradients(jax.tree.map(lambda x: x[0], parts)), parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, gradients(part)), None

    return jax.lax.scan(body, _localize(zeros, axis_name), parts)[0]


def _micro_batches(batch: Batch, keys: jax.Array | None, accumulate: int) -> tuple[Batch, jax.Array | None]:
    """Returns the micro-batches `[accumulate, B / accumulate, ...]`, and their keys `[accumulate, 1]`."""
    split = jax.tree.map(functools.partial(_split_rows, accumulate=accumulate), batch)
    return split, None if keys is None else keys[:, None]


def _split_rows(leaf: jax.Array, accumulate: int) -> jax.Array:
    """Reshapes `[B, ...]` to `[accumulate, B / accumulate, ...]`; row i goes to micro-batch i % accumulate."""
    if leaf.shape[0] % accumulate:
        raise ValueError(
            f"a batch of {leaf.shape[0]} rows (on each device) cannot be split into accumulate={accumulate} equal "
            "micro-batches: change one of them"
        )
    return leaf.reshape((leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:])).swapaxes(0, 1)


def _localize(tree: Any, axis_name: AxisName | None) -> Any:
    """Marks replicated values as varying over the mapped axis.

    Where `shard_map` tracks replication, it would reduce the gradient of replicated parameters by itself, and the train
    step's own reduction would count it again.
    """
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")


def _sum_over_devices(tree: Any, axis_name: AxisName | None) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _mean_gradient(grads: Any, sums: LossSums, factor: tuple[jax.Array, ...]) -> Any:
    """Divides the summed, scaled gradient by the loss scale and by the global weight."""
    # Two divisions: the product of a factor of 2^24 and millions of tokens is not exact.
    divisors = (*factor, jnp.maximum(sums.weight, 1.0))
    return jax.tree.map(lambda g: functools.reduce(jnp.divide, divisors, g), grads)


def _add_update(param: jax.Array, update: jax.Array) -> jax.Array:
    added = (param.astype(jnp.float32) + update.astype(jnp.float32)).astype(param.dtype)
    # Some devices flush subnormal sums to zero; a parameter with update 0 must keep its bits.
    return jnp.where(update == 0, param, added)


def _metrics(sums: LossSums, grads: Any, updates: Any, params: Any, opt_state: optax.OptState) -> Metrics:
    """Returns the metrics of every step; see `make_train_step`."""

    def read(name: str) -> Metrics:
        found = list(trees.state_fields(opt_state, name, params).values())
        return {name: jnp.asarray(found[0], jnp.float32)} if found else {}

    skipped = {"skipped": jnp.float32(0)} | read("skipped")
    clip_factor = read("clip_factor")
    return {
        "loss": sums.mean(),
        "nll": sums.mean_nll(),
        "z_loss": sums.z_loss / jnp.maximum(sums.weight, 1.0),
        "grad_norm": global_norm(grads),
        **{name: jnp.where(skipped["skipped"] == 1, 0.0, value) for name, value in clip_factor.items()},
        "update_norm": global_norm(updates),
        "param_norm": global_norm(params),
        **read("learning_rate"),
        "tokens": sums.weight,
        **skipped,
        **read("skip_reason"),
        **read("give_up"),
    }


def _micro_batch_terms(
    one: Callable,
    params: Any,
    batch: Batch,
    factor: tuple[jax.Array, ...],
    keys: dict[str, jax.Array],
    accumulate: int,
    axis_name: AxisName | None,
) -> Metrics:
    """Returns loss, nll, tokens and gradient norm of each micro-batch, over all devices, float32 `[accumulate]`."""

    def measure(part):
        micro_batch, key = part
        key = {} if key is None else {"keys": key}
        (sums, _), grads = _sum_over_devices(one(params, micro_batch, *factor, **key), axis_name)
        return {
            "micro_batch_loss": sums.mean(),
            "micro_batch_nll": sums.mean_nll(),
            "micro_batch_tokens": sums.weight,
            "micro_batch_grad_norm": global_norm(_mean_gradient(grads, sums, factor)),
        }

    return jax.lax.map(measure, _micro_batches(batch, keys.get("keys"), accumulate))


def _with_aux(metrics: Metrics, aux: Metrics, sums: LossSums) -> Metrics:
    """Adds the auxiliary sums, divided by the global weight."""
    clash = sorted(metrics.keys() & aux.keys())
    if clash:
        raise ValueError(f"loss_fn returns {', '.join(clash)}, which the train step measures itself: rename it")
    return metrics | {name: value / jnp.maximum(sums.weight, 1.0) for name, value in aux.items()}
