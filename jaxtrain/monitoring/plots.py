"""Curves of a run and of a schedule: PNG pictures with matplotlib, and plain text for the terminal."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = list[dict[str, Any]]

_BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # a character cell filled by 0 to 8 eighths


def plot_metrics(run_dir: str | Path, *, clip_norm: float) -> Path:
    """Draws `report.png` in a run's folder: loss, learning rate and gradient norm over the steps.

    Args:
      run_dir: folder with a `metrics.jsonl` of `MetricsWriter`.
      clip_norm: threshold of the gradient norm.

    Returns:
      Path of the picture.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there are no metrics, or no step has been logged.
    """
    run_dir = Path(run_dir)
    steps, events = read_metrics(run_dir / "metrics.jsonl")
    if not steps:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} holds no logged step: train past train.log_every steps first")
    figure = _new_figure(height=9.0)
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.5, 2))
    _draw_loss(loss, steps, [event for event in events if event["event"] == "eval"])
    rate.plot(_column(steps, "step"), _column(steps, "learning_rate"), color="C2", marker=_marker(steps))
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    _draw_grad_norm(norm, steps, clip_norm)
    norm.set_xlabel("optimizer steps done")
    return _save(figure, run_dir / "report.png")


def plot_schedule(schedule: Schedule, total_steps: int, path: str | Path) -> Path:
    """Draws a learning-rate schedule over steps 0 to `total_steps - 1` with its first, highest and last rate.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: total_steps below 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    rates = np.asarray(schedule(np.arange(total_steps, dtype=np.int32)))
    figure = _new_figure(height=4.0)
    axes = figure.subplots()
    axes.plot(rates, color="C2", marker=_marker(rates))
    peak = float(rates.max()) or 1.0
    axes.set_ylim(-0.15 * peak, 1.2 * peak)  # room for text above the highest point and below the lowest
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 1.2 * peak])
    named: dict[int, list[str]] = {}  # steps that coincide share one text
    for name, step in (("first", 0), ("peak", int(rates.argmax())), ("last", total_steps - 1)):
        named.setdefault(step, []).append(name)
    for step, names in named.items():
        _annotate(axes, step, float(rates[step]), names, total_steps)
    axes.set_xlabel("optimizer step (the first is 0)")
    axes.set_ylabel("learning rate")
    return _save(figure, Path(path))


def draw_curve(values: Sequence[float], *, width: int = 72, height: int = 12, label: str = "") -> str:
    """Draws a curve as text, with block characters.

    Args:
      values: one or more numbers at x = 0, 1, ...; where there are more than columns, a column is the mean of several.
        A column without a finite value stays empty.
      width: characters a line, the y axis included.
      height: lines of the curve; the x axis is one more, the label another.
      label: what is above the curve.

    Returns:
      Lines joined by newlines; the y axis says the highest and lowest value, the x axis the first and last index.

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
    columns, last = width - margin - 2, str(array.size - 1)
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
    lines.append(" " * (margin + 2) + "0" + last.rjust(columns - 1) if array.size > 1 else " " * (margin + 2) + "0")
    return "\n".join(lines)


def _new_figure(height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'jaxtrain[plot]'") from error
    # Not pyplot: that keeps figures in global state and picks a backend that may want a display.
    figure = Figure(figsize=(9.0, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    for axes in figure.axes:
        axes.grid(True, alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
    return path


def _column(records: Records, key: str) -> np.ndarray:
    return np.array([record.get(key, math.nan) for record in records], np.float64)


def _marker(points: Sequence) -> str:
    return "o" if len(points) < 3 else ""  # a line through one point cannot be seen


def _draw_loss(axes: "Axes", steps: Records, evals: Records) -> None:
    x, nll = _column(steps, "step"), _column(steps, "nll")
    axes.plot(x, nll, color="C0", linewidth=0.8, alpha=0.4, marker=_marker(x), label="train")
    if len(x) >= 10:
        window = 2 * max(len(x) // 60, 1) + 1
        axes.plot(x, _smooth(nll, window), color="C0", linewidth=1.8, label=f"train, mean of {window} logged steps")
    if evals:
        points = {"color": "C1", "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(_column(evals, "step"), _column(evals, "nll"), label="validation", **points)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def _draw_grad_norm(axes: "Axes", steps: Records, clip_norm: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    norms = _column(steps, "grad_norm")
    norms[norms <= 0] = math.nan  # a logarithmic axis has no place for them
    axes.plot(_column(steps, "step"), norms, color="C4", linewidth=0.9, marker=_marker(norms))
    axes.axhline(clip_norm, color="black", linestyle="--", linewidth=1, label=f"clipping threshold {clip_norm:g}")
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1e4 * bottom else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # 0.5 rather than 5 times a power of ten
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("gradient norm\nbefore clipping")
    clipped = np.mean(norms > clip_norm)
    axes.set_title(f"{clipped:.1%} of {len(norms)} logged steps clipped", fontsize="medium", loc="left")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98))  # above the panel: inside it hides points


def _annotate(axes: "Axes", step: int, rate: float, names: list[str], total_steps: int) -> None:
    """Writes above the highest point and below the others, and always towards the middle: texts cannot meet."""
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


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values in an odd window around each; the window shrinks, on both sides, towards the ends."""
    index = np.arange(len(values))
    half = np.minimum(np.minimum(index, index[::-1]), window // 2)
    finite = np.isfinite(values)
    counts = np.concatenate([[0], np.cumsum(finite)])
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = counts[index + half + 1] - counts[index - half]
    total = totals[index + half + 1] - totals[index - half]
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0)


def _column_means(values: np.ndarray, columns: int) -> np.ndarray:
    """Mean of the finite values that fall in each column; fewer values than columns are repeated."""
    edges = np.linspace(0, len(values), columns + 1)
    means = np.full(columns, math.nan)
    for column in range(columns):
        start = int(edges[column])
        part = values[start : max(math.ceil(edges[column + 1] - 1e-9), start + 1)]
        part = part[np.isfinite(part)]
        if part.size:
            means[column] = part.mean()
    return means
