"""Curves of a run for its report: few points however long the run, extremes kept."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Records = Sequence[dict[str, Any]]

POINTS = 3000  # of a curve; more lines than these become pairs of a minimum and a maximum
_SHARES = 120  # points of the share of clipped steps
_BINS = 48  # of the histogram
_SAMPLES, _LAYERS = 240, 160  # cells of a heat map
# Scalars without a curve: positions, counts that another chart shows, and parts of nll.
_NO_CURVE = {"step", "steps", "attempt", "tokens_seen", "step_seconds", "skipped", "skip_reason", "give_up", "clipped"}
_NO_CURVE |= {"tokens", "clip_factor"}
HEAT_MAPS = ("layer_grad_norm", "layer_update_ratio")


def column(records: Records, name: str) -> np.ndarray:
    """Returns a metric of each record, float64; NaN where it is absent or no number."""
    values = [record.get(name) for record in records]
    return np.array([v if isinstance(v, int | float) and not isinstance(v, bool) else math.nan for v in values], float)


def covered_steps(lines: Records) -> np.ndarray:
    """Returns the number of steps that each line covers; older lines stand for the steps since the line before."""
    step = column(lines, "step")
    return np.maximum(np.diff(step, prepend=0), 1)


class Axis:
    """Positions of steps on the three x axes: `step`, `tokens` seen, and `seconds` of training."""

    def __init__(self, lines: Records):
        self.step = column(lines, "step")
        seconds = np.nan_to_num(column(lines, "step_seconds"), posinf=0.0) * covered_steps(lines)
        self._known = np.nan_to_num(column(lines, "tokens_seen")), np.cumsum(seconds)

    def at(self, steps: Any) -> dict[str, list[float | None]]:
        """Returns the positions of steps, interpolated between lines."""
        steps = np.asarray(steps, float)
        origin = np.concatenate([[0.0], self.step])
        tokens, seconds = (np.interp(steps, origin, np.concatenate([[0.0], values])) for values in self._known)
        return {"step": _short(steps, 12), "tokens": _short(tokens, 12), "seconds": _short(seconds, 7)}


def run_curves(lines: Records, evaluations: Records, *, points: int = POINTS) -> dict[str, Any]:
    """Returns the curves of a run, at most `points` points each, as JSON values; numbers that are not finite are None.

    Returns:
      `x` (see `Axis`); `y`, values by metric; `mean`, for a run of more than `points` lines the mean of each pair of
      points in `y`, which are a minimum and a maximum; `validation`, `clipping`, `histogram` and `layers`.
    """
    axis = Axis(lines)
    names = dict.fromkeys(name for line in lines for name in line if name not in _NO_CURVE)
    values = {name: column(lines, name) for name in names}
    with np.errstate(divide="ignore", invalid="ignore"):
        values["update_ratio"] = column(lines, "update_norm") / column(lines, "param_norm")
    values = {name: found for name, found in values.items() if np.isfinite(found).any()}
    x, y, mean = axis.step, values, None
    if len(lines) > points:
        edges = np.linspace(0, len(lines), points // 2 + 1).astype(int)
        parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
        x = np.array([axis.step[i] for part in parts for i in (part.start, part.stop - 1)])
        y = {name: _extremes(found, parts) for name, found in values.items()}
        mean = {name: _short([_finite_mean(found[part]) for part in parts]) for name, found in values.items()}
    return {
        "x": axis.at(x),
        "y": {name: _short(found) for name, found in y.items()},
        "mean": mean,
        "validation": axis.at(column(evaluations, "step")) | {"nll": _short(column(evaluations, "nll"))},
        "clipping": _clipping(lines, axis),
        "histogram": _histogram(lines),
        "layers": {name: found for name in HEAT_MAPS if (found := _heat_map(lines, name, axis))},
    }


def clipped_steps(lines: Records) -> np.ndarray:
    """Returns the number of clipped steps of each line; NaN where nothing is known of clipping."""
    factor, skipped = column(lines, "clip_factor"), column(lines, "skipped") == 1
    one_step = np.where(np.isnan(factor), math.nan, (factor < 1) & ~skipped) * covered_steps(lines)
    counted = column(lines, "clipped")
    return np.where(np.isnan(counted), one_step, counted)


def _clipping(lines: Records, axis: Axis) -> dict[str, Any] | None:
    clipped = clipped_steps(lines)
    if np.isnan(clipped).all():
        return None
    edges = np.unique(np.linspace(0, len(lines), min(len(lines), _SHARES) + 1).astype(int))
    counts = np.where(np.isnan(clipped), 0.0, covered_steps(lines))
    sums = [(np.nansum(clipped[a:b]), counts[a:b].sum()) for a, b in itertools.pairwise(edges)]
    shares = np.array([part / total if total else math.nan for part, total in sums])
    return axis.at(axis.step[edges[1:] - 1]) | {"share": _short(shares)}


def _histogram(lines: Records) -> dict[str, Any] | None:
    """Returns logarithmic bins of the gradient norm, weighted by steps."""
    norms = column(lines, "grad_norm")
    usable = np.isfinite(norms) & (norms > 0)
    if not usable.any():
        return None
    logs = np.log10(norms[usable])
    low, high = max(logs.min(), logs.max() - 12), logs.max()
    margin = max((high - low) * 0.02, 0.02)
    limits = low - margin, high + margin
    counts, edges = np.histogram(logs, bins=_BINS, range=limits, weights=covered_steps(lines)[usable])
    return {"edges": _short(10**edges), "counts": _short(counts, 9)}


def _heat_map(lines: Records, name: str, axis: Axis) -> dict[str, Any] | None:
    """Returns samples of a metric of each layer, `[samples, layers]`."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), list) and line[name]]
    found = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(len(found), _SAMPLES)).astype(int))]
    if not found:
        return None
    rows = [np.asarray(values, object) for _, values in found]
    layers = np.unique(np.linspace(0, len(rows[-1]) - 1, min(len(rows[-1]), _LAYERS)).astype(int))
    cells = [[row[i] if i < len(row) and isinstance(row[i], int | float) else math.nan for i in layers] for row in rows]
    return axis.at([step for step, _ in found]) | {
        "layer": layers.tolist(),
        "values": [_short(np.array(row, float), 3) for row in cells],
    }


def _extremes(values: np.ndarray, parts: Sequence[slice]) -> np.ndarray:
    """Returns the minimum and the maximum of each part, in the order in which they occur."""
    pairs = []
    for part in parts:
        piece = np.where(np.isfinite(values[part]), values[part], math.nan)
        known = not np.isnan(piece).all()
        pairs += [piece[i] for i in sorted((np.nanargmin(piece), np.nanargmax(piece)))] if known else [math.nan] * 2
    return np.array(pairs)


def _finite_mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return finite.mean() if finite.size else math.nan


def _short(values: Any, digits: int = 5) -> list[float | None]:
    """Returns numbers with few digits; None for those that are not finite."""
    plain = np.asarray(values, float).tolist()
    rounded = [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in plain]
    return [int(v) if v is not None and v.is_integer() and abs(v) < 1e15 else v for v in rounded]
