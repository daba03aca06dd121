"""AdamW with a decay mask behind global-norm clipping, as one optax chain that anybody can import.

  clip by global norm -> Adam -> decoupled decay under the mask -> learning rate

All arithmetic is float32 whatever the parameters and gradients are; updates leave in the parameters' dtype, as optax
expects. The chain's state is a plain pytree of arrays.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.clipping import clip_by_global_norm
from jaxtrain.trees import STACKED, global_norm, path_names, stack_of

__all__ = [
    "clip_by_global_norm",
    "clipped_adamw",
    "decay_mask",
    "decay_report",
    "global_norm",
    "scale_by_adam",
    "scale_by_learning_rate",
]

MaskFn = Callable[[optax.Params], Any]

# Parameters of these names are vectors by meaning, even where they have two dimensions (a bias [heads, head_dim]).
_NEVER_DECAYED = {"bias", "scale"}


def decay_mask(params: optax.Params, *, stacked: tuple[str, ...] = STACKED) -> Any:
    """Says which parameters decay: matrices do; biases, norm scales and other vectors do not.

    A parameter named `bias` or `scale` never decays; another one does if it has two or more dimensions. Under a key in
    `stacked` the first dimension is the layer (`nn.scan`) and is not counted: a norm scale `[L, D]` is a vector. A list
    of layers (`layers/0/...`) is not stacked.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      stacked: names of the subtrees whose leaves have a leading layer axis.

    Returns:
      A tree of bools with the structure of `params`.

    Raises:
      ValueError: leaves under one stacked key that do not share their leading dimension, so are no stack.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    depth: dict[tuple[str, ...], tuple[str, int]] = {}
    decayed = []
    for path, leaf in leaves:
        names = path_names(path)
        stack = stack_of(names, stacked)
        if stack is not None:
            first, num_layers = depth.setdefault(stack, ("/".join(names), leaf.shape[0] if leaf.shape else 0))
            if not leaf.shape or leaf.shape[0] != num_layers:
                raise ValueError(
                    f"{'/'.join(stack)} is taken for stacked layers, but {first} has leading dimension {num_layers} "
                    f"and {'/'.join(names)} has shape {leaf.shape}: name the stacked subtrees with "
                    "decay_mask(params, stacked=(...)), or stacked=() if there are none"
                )
        rank = len(leaf.shape) - (stack is not None)
        decayed.append(rank >= 2 and not set(names[-1:]) & _NEVER_DECAYED)
    return jax.tree.unflatten(structure, decayed)


def decay_report(params: optax.Params, mask: Any) -> str:
    """Lays out path, shape, size and decay of every parameter as a table, with totals.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      mask: a tree of bools of the same structure, or a function from parameters to one.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    flags = jax.tree.leaves(_resolve_mask(mask, params))
    sizes = [math.prod(leaf.shape) for _, leaf in leaves]
    rows = [
        ("/".join(path_names(path)), "x".join(map(str, leaf.shape)) or "scalar", f"{size:,}", "decay" if flag else "-")
        for (path, leaf), size, flag in zip(leaves, sizes, flags, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{p:<{widths[0]}}  {s:<{widths[1]}}  {n:>{widths[2]}}  {d}" for p, s, n, d in rows]
    decayed = sum(size for size, flag in zip(sizes, flags, strict=True) if flag)
    lines.append(
        f"{sum(flags)} parameters of {decayed:,} numbers decay, "
        f"{len(flags) - sum(flags)} of {sum(sizes) - decayed:,} do not"
    )
    return "\n".join(lines)


def clipped_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: MaskFn | Any = decay_mask,
    clip_norm: float | None = 1.0,
    clip: optax.GradientTransformation | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then applies AdamW (arXiv:1711.05101).

    With clipped gradient g, moments m and v, and parameter p before the step:

      p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)

    so decay is scaled by the learning rate (as in optax and torch), never enters the moments and is never clipped.

    Args:
      learning_rate: a number, or a schedule from a step to a learning rate. The step is the chain's own count, unless
        `update` is given `step=`, which wins: then a caller who skips an update does not delay the schedule. To change
        it from outside, `optax.inject_hyperparams` with everything else in `static_args`, `mask` included.
      b1, b2: decay of the first and second moment, in [0, 1).
      eps: added to sqrt(v_hat), outside the root; above 0.
      weight_decay: 0 or more.
      mask: a tree of bools with the structure of the parameters, or a function from parameters to one; True decays.
      clip_norm: threshold of the global gradient norm, above 0; None: no clipping.
      clip: clips instead of that; see `jaxtrain.clipping`.
      mu_dtype: dtype of the first moment; None: float32. The second moment is always float32.

    Returns:
      An optax transformation; `update` needs `params`. Its state holds, under these names for
      `optax.tree_utils.tree_get`, the last `grad_norm` (before clipping), `clip_factor` and `learning_rate`.

    Raises:
      ValueError: an argument out of range; a mask that does not fit the parameters; `update` without `params`.
    """
    _check_adamw(learning_rate, b1, b2, eps, weight_decay, mu_dtype)
    return optax.chain(
        clip_by_global_norm(clip_norm) if clip is None else clip,
        scale_by_adam(b1, b2, eps, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _check_adamw(learning_rate, b1, b2, eps, weight_decay, mu_dtype) -> None:
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0, got {eps}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be 0 or more, got {weight_decay}")
    # An array may be traced (optax.inject_hyperparams), so only a number can be checked.
    given = not callable(learning_rate) and not isinstance(learning_rate, jax.Array)
    if given and isinstance(learning_rate, str):
        raise ValueError(f"learning_rate must be a number or a schedule, got {learning_rate!r}")
    if given and not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate must be 0 or more, or a schedule; got {learning_rate}")
    if mu_dtype is not None and not jnp.issubdtype(mu_dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a float dtype, got {mu_dtype}")


class AdamState(NamedTuple):
    """Number of updates (int32), first and second moments."""

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any = None) -> optax.GradientTransformation:
    """Adam's direction (arXiv:1412.6980) in float32, also for bfloat16 and float16 gradients.

    Two things differ from the textbook's form to keep float32 exact. A moment moves by (1 - b) * (g - m): the form
    b * m + (1 - b) * g is biased by the rounding of b, 1.3e-5 for b2 = 0.999. And 1 - b**t is -expm1(t * log(b)).
    """

    def init(params):
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)  # noqa: E731
        return AdamState(jnp.zeros((), jnp.int32), zeros(mu_dtype or jnp.float32), zeros(jnp.float32))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        correction1, correction2 = _bias_correction(b1, count), _bias_correction(b2, count)

        def moment(old, new, b):
            old = old.astype(jnp.float32)
            return old + (1 - b) * (new - old)

        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        mu = jax.tree.map(lambda g, m: moment(m, g, b1), grads, state.mu)
        nu = jax.tree.map(lambda g, v: moment(v, jnp.square(g), b2), grads, state.nu)
        updates = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _bias_correction(b: float, count: jax.Array) -> jax.Array:
    """1 - b**count, float32; the logarithm is taken in double precision."""
    if b == 0:
        return jnp.float32(1)
    return -jnp.expm1(count.astype(jnp.float32) * jnp.float32(math.log(b)))


def add_decayed_weights(weight_decay: float, mask: MaskFn | Any) -> optax.GradientTransformation:
    """Adds `weight_decay * p` to the updates of the parameters under the mask."""

    def init(params):
        _resolve_mask(mask, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        if weight_decay == 0:
            return updates, state

        def decay(update, param, decayed):
            return update + weight_decay * param.astype(jnp.float32) if decayed else update

        return jax.tree.map(decay, updates, params, _resolve_mask(mask, params)), state

    return optax.GradientTransformation(init, update)


def _resolve_mask(mask: MaskFn | Any, params: optax.Params) -> Any:
    tree = mask(params) if callable(mask) else mask
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"the decay mask has the structure {jax.tree.structure(tree)}, the parameters have "
            f"{jax.tree.structure(params)}: give one bool for each parameter"
        )
    return tree


class LearningRateState(NamedTuple):
    """Number of updates (int32) and the learning rate of the last one (float32)."""

    count: jax.Array
    learning_rate: jax.Array


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate, in float32, and casts to the parameters' dtype."""

    def rate(step):
        return jnp.asarray(learning_rate(step) if callable(learning_rate) else learning_rate, jnp.float32)

    def init(params):
        del params
        return LearningRateState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None, *, step=None, **extra):
        del extra
        lr = rate(state.count if step is None else step)
        like = updates if params is None else params
        updates = jax.tree.map(lambda u, p: (-lr * u.astype(jnp.float32)).astype(p.dtype), updates, like)
        return updates, LearningRateState(optax.safe_increment(state.count), lr)

    return optax.GradientTransformationExtraArgs(init, update)


class OptimizerEntry(NamedTuple):
    """Optimizer that `optim.name` of a config can name; see `OPTIMIZERS`.

    Attributes:
      make: `(optim, learning_rate, clip) -> optax.GradientTransformation`, from a `config.OptimConfig`, the schedule
        and the transformation that clips the gradient, which `make` puts first.
      description: one line.
      check: `(optim) -> None`, raises a ValueError that names the fields of `optim`. None: `make` checks.
    """

    make: Callable[[Any, optax.Schedule, optax.GradientTransformation], optax.GradientTransformation]
    description: str
    check: Callable[[Any], None] | None = None


def _adamw(optim: Any, learning_rate: optax.Schedule, clip: optax.GradientTransformation):
    return clipped_adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip=clip,
        mu_dtype=jnp.dtype(optim.mu_dtype),
    )


# A config file may add an entry: OPTIMIZERS["name"] = OptimizerEntry(make, description).
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(_adamw, "AdamW (arXiv:1711.05101) with decay on matrices alone"),
}
