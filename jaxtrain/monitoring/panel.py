"""Progress of a run as text: four lines with sparklines of the loss and the gradient norm, or one line."""

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from jaxtrain.monitoring.tables import format_seconds

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_CELLS = 48  # of a sparkline
_RECENT = 10  # logged steps from which the remaining time is estimated


class Sparkline:
    """Curve of a whole run in at most 2 `_CELLS` numbers: when they are full, neighbours are averaged."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._part: list[float] = []
        self._stride = 1

    def add(self, value: float) -> None:
        """Adds a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self._part.append(value)
        if len(self._part) < self._stride:
            return
        self._means.append(statistics.fmean(self._part))
        self._part = []
        if len(self._means) == 2 * _CELLS:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stride *= 2

    def draw(self, cells: int) -> str:
        """Returns at most so many block characters, the oldest first."""
        values = self._means
        if len(values) > cells > 0:
            edges = [round(i * len(values) / cells) for i in range(cells + 1)]
            values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
        if not values or cells <= 0:
            return ""
        low, high = min(values), max(values)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BARS[round((value - low) * scale)] for value in values)


class Panel:
    """State of a run since the start of this process, as a text of four lines."""

    def __init__(self, total_steps: int):
        self._total, self._begin = total_steps, time.monotonic()
        self._loss, self._norm = Sparkline(), Sparkline()
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._fields: Mapping[str, Any] = {}
        self._clipped = self._steps = self._skipped = 0.0
        self._validation = self._saved = ""

    def step(self, step: int, fields: Mapping[str, Any]) -> None:
        self._fields = {**fields, "step": step}
        self._seconds.append(float(fields["step_seconds"]))
        self._loss.add(float(fields["loss"]))
        self._norm.add(float(fields.get("grad_norm", math.nan)))
        self._steps += fields.get("steps", 1)
        self._clipped += fields.get("clipped", fields.get("clip_factor", 1.0) < 1)
        self._skipped += fields.get("skipped", 0)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        if name == "eval" and "nll" in fields:
            self._validation = f"validation {fields['nll']:.4f} at step {fields['step']:,}"
        elif name == "saved":
            self._saved = f"saved step {fields['step']:,}"

    def _left(self) -> str:
        """Returns the remaining time."""
        return format_seconds(statistics.median(self._seconds) * max(self._total - self._fields["step"], 0))

    def line(self) -> str:
        """Returns the last step as one line."""
        fields, step = self._fields, self._fields["step"]
        clipped = fields.get("clipped", fields.get("clip_factor", 1.0) < 1) / fields.get("steps", 1)
        mark = " skipped" if fields.get("skipped") else f" {clipped:.0%} clipped" if 0 < clipped < 1 else ""
        mark = mark or (" clipped" if clipped else "")
        parts = [
            f"step {step}/{self._total} {step / self._total:.1%}",
            f"{float(fields['tokens_per_second']):,.0f} tokens/s",
            *([f"{float(fields['mfu']):.1%} MFU"] if "mfu" in fields else []),
            f"loss {float(fields['loss']):.4f}",
        ]
        if "grad_norm" in fields:
            parts.append(f"grad_norm {float(fields['grad_norm']):.3g}{mark}")
        if "learning_rate" in fields:
            parts.append(f"lr {float(fields['learning_rate']):.2e}")
        return "  ".join([*parts, f"{self._left()} left"])

    def render(self, width: int) -> Text:
        """Returns the panel for a terminal of a width; empty before the first step."""
        if not self._fields:
            return Text()
        fields, step = self._fields, self._fields["step"]
        elapsed = format_seconds(time.monotonic() - self._begin)
        cells = max(min(_CELLS, width - 62), 0)
        done = round(cells * min(step / self._total, 1.0))
        rows = [
            (
                f"step {step:,}/{self._total:,} {step / self._total:.1%}".ljust(26),
                ("\u2501" * done, "green"),
                ("\u2501" * (cells - done), "dim"),
                f"  {elapsed} elapsed, {self._left()} left",
            ),
            ("loss", f"{float(fields['loss']):.4f}", self._loss, "blue", self._validation),
        ]
        if "grad_norm" in fields:
            share = f"{self._clipped / self._steps:.0%} clipped, {self._skipped:.0f} skipped"
            rows.append(("grad_norm", f"{float(fields['grad_norm']):.3g}", self._norm, "magenta", share))
        rest = [f"lr {float(fields['learning_rate']):.2e}"] if "learning_rate" in fields else []
        rest.append(f"{float(fields['tokens_per_second']):,.0f} tokens/s")
        rest += [f"MFU {float(fields['mfu']):.1%}"] if "mfu" in fields else []
        rest += [self._saved] if self._saved else []
        lines = [Text.assemble(*rows[0])]
        for name, value, curve, style, note in rows[1:]:
            lines.append(
                Text.assemble(
                    (f"{name:10}", "bold"), f"{value:16}", (curve.draw(cells).ljust(cells), style), f"  {note}"
                )
            )
        lines.append(Text("   ".join(rest)))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return Text("\n").join(lines)
