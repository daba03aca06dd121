"""Means over the steps that one line of metrics.jsonl covers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Values = dict[str, Any]

# Metrics that describe the state at the last step.
_LAST = {"learning_rate", "param_norm", "loss_scale", "skip_reason", "give_up"}
# Metrics of a step as a whole; all others are sums over tokens, divided by their number.
_PER_STEP = {"tokens", "grad_norm", "clip_factor", "update_norm"}


def summarize(steps: Sequence[Values]) -> Values:
    """Returns the metrics of consecutive steps as the fields of one line.

    Args:
      steps: metrics of each step, as floats or lists; the last step decides which names the line has.

    Returns:
      `steps`, how many there are; `clipped` and `skipped`, how many of them were; `grad_norm_max`, NaN if one is NaN.
      `learning_rate`, `param_norm`, `loss_scale`, `skip_reason` and `give_up` come from the last step. Every other
      metric is the mean, weighted by `tokens` if it is one per token. A skipped step counts in the means only if all
      were skipped. A line of one step has its values unchanged.
    """
    last, count = steps[-1], len(steps)
    accepted = [values for values in steps if values.get("skipped") != 1]
    fields = dict(last) if count == 1 else _means(accepted or steps, last)
    fields |= {name: last[name] for name in _LAST & last.keys()}
    fields["steps"] = count
    if "skipped" in last:
        fields["skipped"] = float(count - len(accepted))
    if "clip_factor" in last:
        fields["clipped"] = sum(values.get("clip_factor", 1.0) < 1 for values in accepted)
    if "grad_norm" in last:
        fields["grad_norm_max"] = float(np.max([values.get("grad_norm", math.nan) for values in steps]))
    return fields


def _means(steps: Sequence[Values], last: Values) -> Values:
    tokens = [values.get("tokens", 1.0) for values in steps]
    means = {}
    for name in last:
        found = [(values[name], weight) for values, weight in zip(steps, tokens, strict=True) if name in values]
        values = np.asarray([value for value, _ in found] or [last[name]], np.float64)
        weights = [weight for _, weight in found]
        weighted = name not in _PER_STEP and sum(weights) > 0
        means[name] = np.average(values, axis=0, weights=weights if weighted else None).tolist()
    return means
