"""Checks of a run that goes on."""

from collections.abc import Sequence

from jaxtrain.config import Ranges, parse_ranges
from jaxtrain.data.order import skip_to


def check_past(old: Sequence[str], new: Sequence[str], step: int) -> None:
    """Checks that other ranges leave a run's first `step` steps as they were.

    Raises:
      ValueError: they would have read other batches.
    """
    before, after = parse_ranges(old), parse_ranges(new)
    end = skip_to(step - 1, before) + 1 if step else 0  # of what was read
    if _until(before, end) == _until(after, end):
        return
    raise ValueError(
        f"data.skip {_show(old)} -> {_show(new)} changes what the first {step} steps have read: only batches from "
        f"{skip_to(step, before)} on can be left out now; for others go back first, with --rewind STEP"
    )


def _until(ranges: Ranges, end: int) -> Ranges:
    return tuple((start, min(stop, end)) for start, stop in ranges if start < end)


def _show(texts: Sequence[str]) -> str:
    return " ".join(texts) or "(nothing)"
