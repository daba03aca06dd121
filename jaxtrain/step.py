"""Train step: a pure function of state and batch.

Order within a step: sum the gradients of the summed loss over micro-batches and devices, divide by the global weight
(and the loss scale), run the optimizer chain (guard, clip, Adam, decay, learning rate), add the updates. Jit the step
with the state donated:

  train_step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)

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

A Flax NNX model is split before and merged in the loss function, with `rngs=nnx.Rngs(rng)` for dropout:
`graph, params, rest = nnx.split(model, nnx.Param, ...)` and `nnx.merge(graph, params, rest)`. An Equinox model:
`params, static = eqx.partition(model, eqx.is_inexact_array)` and `eqx.combine(params, static)`.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import trees
from jaxtrain.checks import check_count, check_transformation, with_extra_args
from jaxtrain.gradients import (
    AxisName,
    Batch,
    LossFn,
    Metrics,
    accumulate_gradients,
    differentiate,
    localize,
    mean_gradient,
    micro_batch_keys,
    split_aux,
    split_batch,
    sum_over_devices,
    takes_key,
)
from jaxtrain.losses import LossSums
from jaxtrain.precision import LossScale, LossScaling, Policy
from jaxtrain.sums import update_squares
from jaxtrain.trees import global_norm, norm_of_squares

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

    if TYPE_CHECKING:

        def replace(self, **changes: Any) -> "TrainState":
            """Returns a copy with other values for some fields."""

    @classmethod
    def create(
        cls, params: Any, optimizer: optax.GradientTransformation, loss_scale: LossScale | None = None
    ) -> "TrainState":
        """Returns the state before step 1, with a fresh optimizer state.

        Python floats become arrays. An array that the state would hold twice is copied, so that it can be donated.
        `flax.serialization` writes and reads the state (`to_bytes`, `from_bytes`) if it was imported before this call.

        Raises:
          ValueError: parameters that are no float arrays.
        """
        trees.check_params(params)
        trees.register_with_flax()
        params = jax.tree.map(lambda p: p if hasattr(p, "dtype") else jnp.float32(p), params)
        return trees.distinct(cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), loss_scale))


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
      optimizer: any optax transformation. Its extra arguments are `step=`, and the mean loss as `loss=` and `value=`.
      accumulate: number of micro-batches. Rows i, i + accumulate, ... of the batch make micro-batch i, so that a batch
        sharded over its rows is split within each device.
      axis_name: mapped axis (or axes) if the step is the body of `jax.pmap` or `jax.shard_map`; sums are added over it.
      policy: dtypes; None computes in the parameters' own dtype. The parameters are cast once a step.
      loss_scaling: required by float16. The loss is multiplied by the factor in `state.loss_scale` and the float32
        gradient divided by it. A gradient that is not finite halves the factor; `guard.skip_bad_steps` must skip it.
      seed: determines the keys.
      micro_batch_terms: adds `micro_batch_loss`, `_nll`, `_tokens`, `_grad_norm`, float32 `[accumulate]`.
      map_gradients: wraps `(params, batch, *loss_factor) -> (sums, gradients)`; see `runtime.mesh.map_gradients`.
      diagnose: `(params, grads, updates, opt_state) -> dict` of more metrics, from the parameters before the update,
        the gradient before clipping and the optimizer's new state; see `monitoring.layers.layer_diagnostics`.

    Returns:
      `train_step(state, batch) -> (state, metrics)`. Metrics are float32 scalars: `loss` (nll + z_loss + smoothing) and
      its parts `nll` and `z_loss`, in nats per token; `grad_norm` before clipping; `update_norm`; `param_norm` before
      the update; `tokens`, the global weight; `skipped`, 1 if the optimizer skipped the step. `clip_factor` (0 for a
      skipped step), `learning_rate`, `skip_reason` and `give_up` are present if the optimizer's state holds a scalar
      under that name; `loss_scale` is the scale of this step, present with loss scaling.

    Raises:
      TypeError: an optimizer, a policy or a loss scaling of another type. When called: a state that is no TrainState.
      ValueError: accumulate below 1; float16 without loss scaling; map_gradients with a loss that takes a key. When
        traced: a batch that `accumulate` does not divide; loss scaling without a guard or a loss scale in the state; a
        loss that is no LossSums; an auxiliary metric with the name of another metric, or that is no scalar.
    """
    check_transformation("the optimizer", optimizer)
    _check_options(loss_fn, accumulate, policy, loss_scaling, map_gradients)
    wrap = map_gradients or (lambda gradients: gradients)
    one = functools.partial(differentiate, loss_fn)
    whole = wrap(functools.partial(accumulate_gradients, one, accumulate=accumulate, axis_name=axis_name))
    keys = functools.partial(micro_batch_keys, seed, accumulate=accumulate) if takes_key(loss_fn) else None
    options = accumulate, axis_name, policy, loss_scaling, micro_batch_terms, diagnose
    parts = _Parts(wrap(one), whole, keys, with_extra_args(optimizer), *options)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return _run_step(parts, state, batch)

    return train_step


class _Parts(NamedTuple):
    """Collaborators and options of a train step; see `make_train_step`."""

    one: Callable  # differentiates one micro-batch
    whole: Callable  # differentiates all micro-batches
    keys: Callable | None  # returns the keys of the micro-batches
    optimizer: optax.GradientTransformationExtraArgs
    accumulate: int
    axis_name: AxisName | None
    policy: Policy | None
    loss_scaling: LossScaling | None
    micro_batch_terms: bool
    diagnose: Callable[..., Metrics] | None


def _run_step(parts: _Parts, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Runs a train step: gradients, optimizer, new state, metrics."""
    if not isinstance(state, TrainState):
        remedy = "make one from parameters with TrainState.create(params, optimizer)"
        raise TypeError(f"the train step takes a TrainState, got {type(state).__name__}: {remedy}")
    axis_name, loss_scaling = parts.axis_name, parts.loss_scaling
    factor = _loss_factor(state, loss_scaling)
    keys = {} if parts.keys is None else {"keys": parts.keys(state.step, axis_name=axis_name)}
    params = localize(parts.policy.cast_to_compute(state.params) if parts.policy else state.params, axis_name)
    (sums, aux), grads = sum_over_devices(parts.whole(params, batch, *factor, **keys), axis_name)
    grads, loss = mean_gradient(grads, sums, factor), sums.mean()
    with jax.named_scope("optimizer"):
        extra = {"step": state.step, "loss": loss, "value": loss}
        updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params, **extra)
        new_params = jax.tree.map(_add_update, state.params, updates)
    updates = _applied_updates(new_params, state.params, updates)
    metrics = _metrics(sums, grads, updates, state.params, opt_state)
    if parts.diagnose is not None:
        metrics |= parts.diagnose(state.params, grads, updates, opt_state)
    new_state = state.replace(step=state.step + 1, params=new_params, opt_state=opt_state)
    if loss_scaling is not None and state.loss_scale is not None:
        metrics["loss_scale"] = state.loss_scale.scale
        finite = jnp.isfinite(metrics["grad_norm"])
        new_state = new_state.replace(loss_scale=loss_scaling.update(state.loss_scale, finite))
    if parts.micro_batch_terms:
        metrics |= _micro_batch_terms(parts, params, batch, factor, keys)
    return new_state, _with_aux(metrics, aux, sums)


def make_eval_step(
    loss_fn: LossFn, *, axis_name: AxisName | None = None, policy: Policy | None = None
) -> Callable[[Any, Batch], LossSums]:
    """Makes `eval_step(params, batch) -> LossSums`.

    Add the sums over a whole data set, then divide once. A `loss_fn` that takes a key receives None: evaluation has no
    dropout. Auxiliary sums are dropped. See `make_train_step` for the arguments.
    """

    def eval_step(params: Any, batch: Batch) -> LossSums:
        key = (None,) if takes_key(loss_fn) else ()
        sums, _ = split_aux(loss_fn(policy.cast_to_compute(params) if policy else params, batch, *key))
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
    `[devices]`, all equal. The state is donated. `devices` None maps over all local ones; the other arguments are those
    of `make_train_step`.
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
    check_count("accumulate", accumulate, 1)
    for name, value, cls in (("policy", policy, Policy), ("loss_scaling", loss_scaling, LossScaling)):
        if not isinstance(value, cls | None):
            raise TypeError(f"{name} must be a jaxtrain.precision.{cls.__name__} or None, got {value!r}")
    if policy is not None and policy.compute == "float16" and loss_scaling is None:
        raise ValueError("gradients underflow in float16: give make_train_step(loss_scaling=LossScaling())")
    if map_gradients is not None and takes_key(loss_fn):
        raise ValueError("map_gradients would give every device the same key: use axis_name with a loss that takes one")


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


def _add_update(param: jax.Array, update: jax.Array) -> jax.Array:
    wide = jnp.float64 if param.dtype == jnp.float64 else jnp.float32
    added = (param.astype(wide) + update.astype(wide)).astype(param.dtype)
    # Some devices flush subnormal sums to zero; a parameter with update 0 must keep its bits.
    return jnp.where(update == 0, param, added)


def _applied_updates(new: Any, old: Any, updates: Any) -> Any:
    """Returns the change of the parameters on TPUs, the updates themselves elsewhere and in other dtypes than float32.

    Their norms are then the only use of both. With a second use of the updates, the TPU compiler would store them: 22
    more bytes of memory traffic per parameter, with 28 left (scripts/bench_compiled.py --optimizer).
    """

    def change(new, old, updates):
        return jax.tree.map(lambda n, o, u: n - o if n.dtype == u.dtype == jnp.float32 else u, new, old, updates)

    return jax.lax.platform_dependent(new, old, updates, tpu=change, default=lambda new, old, updates: updates)


def _metrics(sums: LossSums, grads: Any, updates: Any, params: Any, opt_state: optax.OptState) -> Metrics:
    """Returns the metrics of every step; see `make_train_step`."""

    def read(name: str, combine: Callable = lambda first, second: first) -> Metrics:
        found = list(trees.state_fields(opt_state, name, params).values())
        return {name: jnp.asarray(functools.reduce(combine, found), jnp.float32)} if found else {}

    param_squares, squares = update_squares(params, updates, opt_state)
    # A chain may hold several guards or clips: one for each group of parameters, or one inside another.
    skipped = {"skipped": jnp.float32(0)} | read("skipped", jnp.maximum)
    clip_factor = read("clip_factor", jnp.minimum)
    return {
        "loss": sums.mean(),
        "nll": sums.mean_nll(),
        "z_loss": sums.z_loss / sums.divisor(),
        "grad_norm": global_norm(grads),
        **{name: jnp.where(skipped["skipped"] == 1, 0.0, value) for name, value in clip_factor.items()},
        "update_norm": norm_of_squares(squares),
        "param_norm": norm_of_squares(param_squares),
        **read("learning_rate"),
        "tokens": sums.weight,
        **skipped,
        **read("skip_reason", jnp.maximum),
        **read("give_up", jnp.maximum),
    }


def _micro_batch_terms(
    parts: _Parts, params: Any, batch: Batch, factor: tuple[jax.Array, ...], keys: dict[str, jax.Array]
) -> Metrics:
    """Returns loss, nll, tokens and gradient norm of each micro-batch, over all devices, float32 `[accumulate]`."""

    def measure(part):
        micro_batch, key = part
        key = {} if key is None else {"keys": key}
        (sums, _), grads = sum_over_devices(parts.one(params, micro_batch, *factor, **key), parts.axis_name)
        return {
            "micro_batch_loss": sums.mean(),
            "micro_batch_nll": sums.mean_nll(),
            "micro_batch_tokens": sums.weight,
            "micro_batch_grad_norm": global_norm(mean_gradient(grads, sums, factor)),
        }

    return jax.lax.map(measure, split_batch(batch, keys.get("keys"), parts.accumulate))


def _with_aux(metrics: Metrics, aux: Metrics, sums: LossSums) -> Metrics:
    """Adds the auxiliary sums, divided by the global weight."""
    clash = sorted(metrics.keys() & aux.keys())
    if clash:
        raise ValueError(f"loss_fn returns {', '.join(clash)}, which the train step measures itself: rename it")
    return metrics | {name: value / sums.divisor() for name, value in aux.items()}
