"""Curves of a schedule: PNG files drawn with matplotlib, and text for the terminal."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxtrain.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # a character cell filled by 0 to 8 eighths


def plot_schedule(schedule: Schedule, total_steps: int, path: str | Path) -> Path:
    """Draws the learning rate of steps 1 to `total_steps` to a PNG file, and names the first, highest and last rate.

    Raises an ImportError without matplotlib, and a ValueError if total_steps is below 1.
    """
    schedule_figure(schedule, total_steps).savefig(path, format="png")
    return Path(path)


def schedule_figure(schedule: Schedule, total_steps: int) -> "Figure":
    """Draws a learning-rate schedule; see `plot_schedule`."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'jaxtrain[plot]'") from error
    rates = np.asarray(schedule(np.arange(total_steps, dtype=np.int32)))
    # Not pyplot, which keeps figures in global state and may choose a backend that needs a display.
    figure = Figure(figsize=(9.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    marker = "o" if total_steps < 3 else ""  # a line through one point is invisible
    axes.plot(np.arange(1, total_steps + 1), rates, color="C2", marker=marker)
    peak = float(rates.max()) or 1.0
    axes.set_ylim(-0.15 * peak, 1.2 * peak)  # room for text above the highest point and below the lowest
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.2 * peak])
    named: dict[int, list[str]] = {}  # steps that coincide share one text
    for name, index in (("first", 0), ("peak", int(rates.argmax())), ("last", total_steps - 1)):
        named.setdefault(index, []).append(name)
    for index, names in named.items():
        _annotate(axes, index + 1, float(rates[index]), names, total_steps)
    axes.set_xlabel("optimizer step (the first is 1)")
    axes.set_ylabel("learning rate")
    axes.grid(True, alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_curve(values: Sequence[float], *, width: int = 72, height: int = 12, label: str = "") -> str:
    """Draws a curve as text, with block characters.

    Args:
      values: one or more numbers, at x = 1, 2, ...; if there are more values than columns, a column shows the mean of
        several. A column without a finite value stays empty.
      width: characters per line, the y axis included.
      height: lines of the curve; the x axis and the label take one more each.

    Returns:
      Lines joined by newlines. The y axis names the highest and lowest value, the x axis the first and last x.

    Raises:
      ValueError: no finite value, or a size too small to draw in.
    """
    array = np.asarray(values, np.float64).reshape(-1)
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        raise ValueError(f"draw_curve needs a finite value, got {array.size} values and none of them finite")
    low, high = float(finite.min()), float(finite.max())
    names = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}" if low < high else ""]
    margin = max(len(name) for name in names)
    columns, last = width - margin - 2, str(array.size)
    if height < 2 or columns < len(last) + 2:
        raise ValueError(f"width {width} and height {height} are too small for a curve: use at least 24 by 2")
    means = _column_means(array, columns)
    # The lowest value keeps an eighth, so that it differs from a column without a value.
    share = (means - low) / (high - low) if high > low else np.where(np.isfinite(means), 1.0, math.nan)
    eighths = np.nan_to_num(1 + np.round(share * (8 * height - 1)), nan=0).astype(int)
    lines = [label] if label else []
    for row, name in enumerate(names):
        cells = np.clip(eighths - 8 * (height - 1 - row), 0, 8)
        lines.append(f"{name:>{margin}} |" + "".join(_BLOCKS[cell] for cell in cells).rstrip())
    lines.append(" " * (margin + 2) + "1" + (last.rjust(columns - 1) if array.size > 1 else ""))
    return "\n".join(lines)


def _annotate(axes: "Axes", step: int, rate: float, names: list[str], total_steps: int) -> None:
    """Names a point: above the peak, below any other, and towards the middle, so that texts do not overlap."""
    above = "peak" in names
    side = "left" if step <= (total_steps - 1) / 2 else "right"
    axes.plot([step], [rate], "o", color="C2", markersize=5)
    axes.annotate(
        f"{', '.join(names)}: {rate:.3g} at step {step}",
        (step, rate),
        xytext=(0, 8 if above else -8),
        textcoords="offset points",
        ha=side,
        va="bottom" if above else "top",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},  # where the curve passes behind it
    )


def _column_means(values: np.ndarray, columns: int) -> np.ndarray:
    """Returns the mean of the finite values in each column; fewer values than columns are repeated."""
    edges = np.linspace(0, len(values), columns + 1)
    means = np.full(columns, math.nan)
    for column in range(columns):
        start = int(edges[column])
        part = values[start : max(math.ceil(edges[column + 1] - 1e-9), start + 1)]
        part = part[np.isfinite(part)]
        if part.size:
            means[column] = part.mean()
    return means
