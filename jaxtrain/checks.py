"""Checks of arguments; each error names the argument, what is allowed and the value."""

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
    if not valid:
        raise ValueError(f"{name} must be a whole number from {least} to 2**31 - 2, got {value!r}")


def check_number(name: str, value: Any, interval: str, otherwise: str = "") -> None:
    """Raises a ValueError unless a number lies in an interval; an array may be traced and passes unchecked.

    Args:
      interval: such as "[0, 1)" or "(0, inf)".
      otherwise: what is allowed beside numbers, for the error.
    """
    if isinstance(value, jax.Array | np.ndarray):
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
