"""Checks of arguments; each error names the argument, what is allowed and the value."""

import inspect
import operator
from typing import Any

import jax
import numpy as np

LARGEST_COUNT = 2**31 - 2  # counts are int32 on the device, and one more must fit


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Raises a ValueError unless a value is an integer from `least` to 2**31 - 2; the float 100.0 is none."""
    try:
        valid = not isinstance(value, bool) and least <= operator.index(value) <= LARGEST_COUNT
    except TypeError:
        valid = False
    if isinstance(value, jax.core.Tracer):
        remedy = f'keep it out of the arguments of jit and vmap (optax.inject_hyperparams: static_args=("{name}",))'
        raise ValueError(f"{name} must be a Python integer, got a traced array: {remedy}")
    if not valid:
        raise ValueError(f"{name} must be a whole number from {least} to 2**31 - 2, got {value!r}")


def check_number(name: str, value: Any, interval: str, otherwise: str = "") -> None:
    """Raises a ValueError unless a number lies in an interval; an array may be traced and passes unchecked.

    Args:
      interval: such as "[0, 1)" or "(0, inf)".
      otherwise: what is allowed beside numbers, for the error.
    """
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim:
            raise ValueError(f"{name} must be one number, got an array of shape {value.shape}")
        return
    low, high = map(float, interval[1:-1].split(","))
    try:
        above = low <= value if interval[0] == "[" else low < value
        below = value <= high if interval[-1] == "]" else value < high
        valid = above and below and not isinstance(value, bool)
    except TypeError:
        valid = False
    if not valid:
        words = {"(0, inf)": "above 0", "(0, inf]": "above 0", "[0, inf)": "0 or more"}
        allowed = words.get(interval, f"in {interval}")
        raise ValueError(f"{name} must be {allowed}{otherwise and f', {otherwise}'}, got {value!r}")


def python_number(name: str, value: Any) -> Any:
    """Converts an array of one number to a Python number; raises a ValueError if its value is not known."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a Python number, got a traced array: keep it out of the arguments of jit")
    return value.item() if isinstance(value, jax.Array | np.ndarray) and value.size == 1 else value


def check_transformation(name: str, value: Any) -> Any:
    """Returns an optax transformation; raises a TypeError for another value, such as `optax.adam` without arguments."""
    if not all(callable(getattr(value, method, None)) for method in ("init", "update")):
        raise TypeError(f"{name} must be an optax transformation, such as clipped_adamw(1e-3), got {value!r}")
    return value


def with_extra_args(transformation: Any) -> Any:
    """Makes a transformation ignore extra arguments that its `update` does not name, as `optax.contrib.sam` must."""
    import optax  # not at the top: the losses and `jaxtrain.load` need no optax

    update = optax.with_extra_args_support(transformation).update
    named = inspect.signature(update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values()):
        return optax.GradientTransformationExtraArgs(transformation.init, update)

    def update_with_named(updates, state, params=None, **extra):
        return update(updates, state, params, **{name: extra[name] for name in extra.keys() & named.keys()})

    return optax.GradientTransformationExtraArgs(transformation.init, update_with_named)
