"""AdamW with a decay mask behind global-norm clipping, as one optax chain.

  clip by global norm -> Adam -> decoupled decay under the mask -> learning rate

All arithmetic is float32 for any dtype of parameters and gradients. Updates have the parameters' dtype, as optax
expects. The state of the chain is a plain pytree of arrays.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.checks import check_number, check_transformation
from jaxtrain.clipping import clip_by_global_norm
from jaxtrain.trees import (
    STACKED,
    as_float32,
    check_params,
    float32_if_array,
    global_norm,
    is_vector,
    layer_axes,
    named_leaves,
    num_dims,
    path_names,
    present_names,
    stack_of,
)

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


def decay_mask(params: optax.Params, *, stacked: tuple[str, ...] | None = None) -> Any:
    """Selects the parameters that decay: matrices do, vectors do not.

    A parameter decays if it has two or more dimensions. Dimensions of size 1 do not count (unless all are 1), and
    neither does the layer axis of stacked layers (`nn.scan`): a norm scale `[L, D]` is a vector. Vectors by name never
    decay: names that end in `bias`, `scale`, `offset`, `beta`, `gamma`, `gain` or `lambda` (`q_bias`, `gamma_1`); `b`,
    `bq`, `b_qkv` or `q_b` beside a `w`, `wq`, `W_qkv` or `q_w` of more dimensions, and a `b` under `bias`; and every
    parameter of a norm (a key such as `LayerNorm_0`, `norm1`, `ln_f`, `norm_mlp`, `bn1`, but not `norm_proj`).

    A subtree `layers` or `blocks` is a stack if a named vector other than a bias has two dimensions there, a matrix has
    three, no named vector has only one, and all leaves share the size of axis 0 (or of axis 1). Without such evidence,
    a leaf of two dimensions that may be either is a ValueError, if all leaves share their leading size. A list of
    layers (`layers/0/...`) is never a stack.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      stacked: keys of the subtrees whose leaves have a leading layer axis, without further proof. None applies the rule
        above; () says that nothing is stacked.

    Returns:
      A tree of bools with the structure of `params`.

    Raises:
      ValueError: a leaf that may be a matrix or stacked vectors; leaves under a key in `stacked` that do not share
        their leading size.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.optim import decay_mask
      >>> decay_mask({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3), "gamma": jnp.ones((1, 3))})
      {'bias': False, 'gamma': False, 'kernel': True}
      >>> decay_mask({"blocks": {"w": jnp.ones((4, 2, 2)), "g": jnp.ones((4, 2))}}, stacked=("blocks",))
      {'blocks': {'g': False, 'w': True}}
    """
    shapes = named_leaves(params)
    axes = layer_axes(params, stacked)
    decays = [
        num_dims(shapes[names], axis) >= 2 and not is_vector(names, shapes)
        for names, axis in zip(present_names(params), axes, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), decays)


def decay_report(params: optax.Params, mask: MaskFn | Any, frozen: Any | None = None) -> str:
    """Formats path, shape, size and decay of every parameter as a table, with totals of those that are trained.

    A `?` marks a parameter whose decay its shape leaves in doubt: one of two or more dimensions that does not decay and
    is not called `bias` or `scale`, or a decaying one that may be stacked vectors. A line for each stack of layers
    states its axis and size.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      mask: a tree of bools of the same structure, or a function from parameters to one.
      frozen: a tree of bools of the same structure, True for parameters that are not trained; None freezes none.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.optim import decay_mask, decay_report
      >>> print(decay_report({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, decay_mask))
      bias    3    3  -
      kernel  2x3  6  decay
      1 parameters of 6 numbers decay, 1 of 3 do not
    """
    shapes = named_leaves(params)
    flags = jax.tree.leaves(_resolve_mask(mask, params))
    fixed = [False] * len(flags) if frozen is None else jax.tree.leaves(frozen)
    sizes: dict[bool, list[int]] = {False: [], True: []}  # of the trained parameters, by decay
    rows = []
    for (names, shape), decays, is_frozen in zip(shapes.items(), flags, fixed, strict=True):
        size, what = math.prod(shape), "frozen"
        if not is_frozen:
            what = ("decay" if decays else "-") + " ?" * _in_doubt(names, decays, shapes)
            sizes[bool(decays)].append(size)
        rows.append(("/".join(names), "x".join(map(str, shape)) or "scalar", f"{size:,}", what))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"{p:<{widths[0]}}  {s:<{widths[1]}}  {n:>{widths[2]}}  {d}" for p, s, n, d in rows]
    lines += _stack_lines(params)
    (count, total), (others, rest) = ((len(sizes[decays]), sum(sizes[decays])) for decays in (True, False))
    lines.append(f"{count} parameters of {total:,} numbers decay, {others} of {rest:,} do not")
    return "\n".join(lines)


def _in_doubt(names: tuple[str, ...], decays: bool, shapes: dict[tuple[str, ...], tuple[int, ...]]) -> bool:
    """Returns True if the number of dimensions alone suggests another decay; see `decay_report`."""
    shape = shapes[names]
    if not decays:
        return len(shape) >= 2 and names[-1] not in ("bias", "scale")
    siblings = [other for path, other in shapes.items() if path[:1] == names[:1] and path != names]
    leading = {other[:1] for other in siblings}
    return len(shape) < 2 or (num_dims(shape, None) == 2 and leading == {shape[:1]} and max(map(len, siblings)) > 2)


def _stack_lines(params: optax.Params) -> list[str]:
    """Returns a line for each stack of layers that the parameters prove."""
    try:
        axes = layer_axes(params)
    except ValueError:
        return ["layers or blocks may be stacked or not: the mask names them in stacked="]
    shapes = named_leaves(params)
    found = {stack_of(names, STACKED): (axis, shapes[names]) for names, axis in zip(shapes, axes, strict=True)}
    return [
        f"{'/'.join(stack)}: {shape[axis]} stacked layers along axis {axis}"
        for stack, (axis, shape) in found.items()
        if stack is not None and axis is not None
    ]


def clipped_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: MaskFn | Any | None = None,
    clip_norm: float | None = 1.0,
    clip: optax.GradientTransformation | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, then applies AdamW (arXiv:1711.05101).

    With clipped gradient g, moments m and v, and parameter p before the step:

      p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)

    so decay is scaled by the learning rate (as in optax and torch), never enters the moments and is never clipped.
    Every number may be a traced array: `optax.inject_hyperparams(clipped_adamw)(learning_rate=1e-3)` works, and so does
    a search under `jax.vmap`.

    Args:
      learning_rate: a number, or a schedule from a step to a learning rate. The step is the chain's own count, unless
        `update` receives `step=`: then a skipped update does not delay the schedule.
      b1, b2: decay of the first and second moment, in [0, 1).
      eps: added to sqrt(v_hat), outside the root; above 0.
      weight_decay: 0 or more.
      mask: a tree of bools with the structure of the parameters, or a function from parameters to one; True decays.
        None: `decay_mask`.
      clip_norm: threshold of the global gradient norm, above 0; None disables clipping.
      clip: replaces clipping by the global norm; see `jaxtrain.clipping`.
      mu_dtype: dtype of the first moment; None: float32. The second moment is always float32.

    Returns:
      An optax transformation; `update` needs `params`. Its state holds, under these names for
      `optax.tree_utils.tree_get`, the last `grad_norm` (before clipping), `clip_factor` and `learning_rate` (unless
      that is an array, which its owner reports).

    Raises:
      ValueError: an argument out of range; a mask that does not fit the parameters; parameters that are no float
        arrays; `update` without `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxtrain.optim import clipped_adamw
      >>> optimizer = clipped_adamw(0.1, weight_decay=0.0, clip_norm=1.0)
      >>> params = {"w": jnp.ones(2)}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.array([3.0, -4.0])}, state, params)
      >>> print(optax.apply_updates(params, updates)["w"], optax.tree_utils.tree_get(state, "clip_factor"))
      [0.9 1.1] 0.2
    """
    return optax.chain(
        clip_by_global_norm(clip_norm) if clip is None else check_transformation("clip", clip),
        scale_by_adam(b1, b2, eps, mu_dtype),
        add_decayed_weights(weight_decay, decay_mask if mask is None else mask),
        scale_by_learning_rate(learning_rate),
    )


class AdamState(NamedTuple):
    """Number of updates (int32), first and second moments."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any = None) -> optax.GradientTransformation:
    """Returns Adam's direction (arXiv:1412.6980) in float32, also for bfloat16 and float16 gradients.

    Two forms differ from the textbook's, to keep float32 exact. A moment moves by (1 - b) * (g - m): the form
    b * m + (1 - b) * g is biased by the rounding of b, 1.3e-5 for b2 = 0.999. And 1 - b**t is -expm1(t * log(b)).

    Arguments and errors are those of `clipped_adamw`.
    """

    for name, value in (("b1", b1), ("b2", b2)):
        check_number(name, value, "[0, 1)")
    check_number("eps", eps, "(0, inf)")
    try:
        is_float = mu_dtype is None or jnp.issubdtype(jnp.dtype(mu_dtype), jnp.floating)
    except TypeError:  # not the name of a dtype
        is_float = False
    if not is_float:
        raise ValueError(f"mu_dtype must be a float dtype, such as jnp.bfloat16, or None for float32, got {mu_dtype!r}")

    def init(params):
        check_params(params)
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)  # noqa: E731
        return AdamState(jnp.zeros((), jnp.int32), zeros(mu_dtype or jnp.float32), zeros(jnp.float32))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        correction1, correction2 = _bias_correction(b1, count), _bias_correction(b2, count)

        def moment(old, new, b):
            old = old.astype(jnp.float32)
            return old + (1 - b) * (new - old)

        grads = jax.tree.map(as_float32, grads)
        mu = jax.tree.map(lambda g, m: moment(m, g, b1), grads, state.mu)
        nu = jax.tree.map(lambda g, v: moment(v, jnp.square(g), b2), grads, state.nu)
        updates = jax.tree.map(lambda m, v: (m / correction1) / (jnp.sqrt(v / correction2) + eps), mu, nu)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return updates, AdamState(count, mu, nu)

    b1, b2, eps = map(float32_if_array, (b1, b2, eps))
    return optax.GradientTransformation(init, update)


def _bias_correction(b: Any, count: jax.Array) -> jax.Array:
    """Returns 1 - b**count, float32; the logarithm of a Python number is taken in double precision."""
    if isinstance(b, jax.Array):
        return -jnp.expm1(count.astype(jnp.float32) * jnp.log(b))
    if b == 0:
        return jnp.float32(1)
    return -jnp.expm1(count.astype(jnp.float32) * jnp.float32(math.log(b)))


def add_decayed_weights(weight_decay: float, mask: MaskFn | Any) -> optax.GradientTransformation:
    """Adds `weight_decay * p` to the updates of the parameters under the mask.

    Arguments and errors are those of `clipped_adamw`; with the Python number 0, `update` needs no `params`.
    """
    check_number("weight_decay", weight_decay, "[0, inf)")
    disabled = not isinstance(weight_decay, jax.Array | np.ndarray) and weight_decay == 0
    weight_decay = float32_if_array(weight_decay)

    def init(params):
        _resolve_mask(mask, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        if disabled:
            return updates, state
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")

        def decay(update, param, decayed):
            return update + weight_decay * as_float32(param) if decayed else update

        return jax.tree.map(decay, updates, params, _resolve_mask(mask, params)), state

    return optax.GradientTransformation(init, update)


def _resolve_mask(mask: MaskFn | Any, params: optax.Params) -> Any:
    is_tree = any(isinstance(leaf, bool | np.bool_) for leaf in jax.tree.leaves(mask))  # and callable, in Equinox
    tree = mask(params) if callable(mask) and not is_tree else mask
    actual: Any = jax.tree.structure(tree)
    if actual != (expected := jax.tree.structure(params)):
        remedy = "give one bool for each parameter, and under optax.inject_hyperparams static_args=('mask',)"
        raise ValueError(f"the decay mask has the structure {actual}, the parameters have {expected}: {remedy}")
    for path, flag in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.shape(flag) or getattr(flag, "dtype", type(flag)) not in (bool, np.bool_, int):
            name = "/".join(path_names(path))
            raise ValueError(f"the decay mask has {flag!r} at {name}: give one bool for each parameter")
    return tree


class LearningRateState(NamedTuple):
    """Number of updates (int32) and the learning rate of the last one (float32)."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    learning_rate: jax.Array


def scale_by_learning_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies by minus the learning rate, in float32, and casts to the parameters' dtype; see `clipped_adamw`.

    The state does not hold a learning rate that is an array: its owner, such as `optax.inject_hyperparams`, already
    does, and `tree_get` wants to find it once.
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "[0, inf)", "or a schedule")
    is_array = isinstance(learning_rate, jax.Array)

    def make_state(count, rate):
        return optax.ScaleByScheduleState(count) if is_array else LearningRateState(count, rate)

    def init(params):
        del params
        return make_state(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None, *, step=None, **extra):
        del extra
        step = state.count if step is None else step
        rate = as_float32(learning_rate(step) if callable(learning_rate) else learning_rate)
        if rate.ndim:
            raise ValueError(f"the schedule returns shape {rate.shape}, and a learning rate is one number per step")
        like = updates if params is None else params
        updates = jax.tree.map(lambda u, p: (-rate * as_float32(u)).astype(jnp.asarray(p).dtype), updates, like)
        return updates, make_state(optax.safe_increment(state.count), rate)

    return optax.GradientTransformationExtraArgs(init, update)


class OptimizerEntry(NamedTuple):
    """Optimizer that `optim.name` of a config can name; see `OPTIMIZERS`."""

    # `(optim, learning_rate, clip) -> optax.GradientTransformation`, from a `config.OptimConfig`, the schedule and the
    # transformation that clips the gradient, which `make` puts first
    make: Callable[[Any, optax.Schedule, optax.GradientTransformation], optax.GradientTransformation]
    description: str  # one line
    # `(optim) -> None`, raises a ValueError that names the fields of `optim`. None: `make` checks.
    check: Callable[[Any], None] | None = None
    # True if a finite gradient norm, state and learning rate imply finite updates; see `check_updates` of
    # `guard.skip_bad_steps`
    stays_finite: bool = False
    takes_arrays: bool = False  # True if `optim.weight_decay` may be an array: another value needs no compilation


def _adamw(optim: Any, learning_rate: optax.Schedule, clip: optax.GradientTransformation):
    numbers = {name: getattr(optim, name) for name in ("b1", "b2", "eps", "weight_decay")}
    return clipped_adamw(learning_rate, **numbers, clip=clip, mu_dtype=jnp.dtype(optim.mu_dtype))


# A config file may add an entry: OPTIMIZERS["name"] = OptimizerEntry(make, description).
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(
        _adamw, "AdamW (arXiv:1711.05101) with decay on matrices alone", stays_finite=True, takes_arrays=True
    ),
}
