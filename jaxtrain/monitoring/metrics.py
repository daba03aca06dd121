"""Metrics of a step: packed into one array on the device, and written to JSON lines that survive a crash."""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.runtime.terminal import echo

# JSON has no such numbers; any JSON reader reads these strings, and `float` of most languages converts them.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Keys of an event line beside the fields of the event.
EVENT_KEYS = {"event", "time", "text"}

# Fields whose type every reader relies on. Other fields may hold any JSON value.
_WHOLE = {"step", "attempt", "steps", "vocab_size", "train_tokens"}
_NUMBERS = {"loss", "nll", "z_loss", "grad_norm", "grad_norm_max", "clip_factor", "clipped", "update_norm"}
_NUMBERS |= {"param_norm", "learning_rate", "loss_scale", "tokens", "skipped", "skip_reason", "give_up"}
_NUMBERS |= {"adam_frozen_share", "tokens_seen", "tokens_per_second", "step_seconds", "mfu", "seconds"}
_LISTS = {"layer_grad_norm", "layer_update_ratio"}
_TEXTS = {"event", "name", "severity", "evidence", "remedy"}
_REQUIRED = {
    "start": {"step"},
    "resume": {"step"},
    "eval": {"step"},
    "finding": {"step", "name", "severity", "evidence", "remedy"},
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["metrics"], meta_fields=["shapes"])
@dataclasses.dataclass(frozen=True)
class PackedMetrics:
    """Float32 arrays by name, concatenated: the host pays milliseconds for each array that a step returns."""

    metrics: jax.Array  # float32 [n]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # name and shape of each

    def unpack(self) -> dict[str, np.ndarray]:
        """Waits for the array and splits it."""
        sizes = [math.prod(shape) for _, shape in self.shapes]
        parts = np.split(jax.device_get(self.metrics), np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes, parts, strict=True)}


def pack(metrics: Mapping[str, jax.Array]) -> PackedMetrics:
    """Packs float32 arrays; `unpack` returns them unchanged."""
    chex.assert_type(list(metrics.values()), jnp.float32)
    shapes = tuple((name, jnp.shape(value)) for name, value in metrics.items())
    return PackedMetrics(jnp.concatenate([jnp.ravel(value) for value in metrics.values()]), shapes)


class JsonLines:
    """Sink that appends steps and events to a JSON-lines file, and flushes each line.

    A crash leaves at most one torn last line. Opening the file again ends that line, so that the next object starts a
    new line. Lines that cannot be written (a full disk) wait and are retried, with a message on standard
    error; `close` raises an OSError if any are left. Values are strings, numbers, arrays (NumPy or JAX; a vector
    becomes a list), None, and lists and dicts of these. A float32 is written with the digits that restore it exactly;
    NaN and infinities become the strings "NaN", "Infinity" and "-Infinity".
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._problem: OSError | None = None  # of the last attempt to write
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by close)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - 1, 0))
        self._waiting = b"\n" if size and self._file.read(1) != b"\n" else b""  # bytes that are not written yet
        self._write_waiting()

    def step(self, step: int, fields: Mapping[str, Any]) -> None:
        self._write_line({"step": step, **fields})

    def event(self, name: str, text: str, fields: Mapping[str, Any]) -> None:
        """Writes an event: its name, the time (ISO 8601, UTC), the text unless that is "", and the fields."""
        if clash := EVENT_KEYS & fields.keys():
            raise ValueError(f"an event's fields must not be named {' or '.join(sorted(clash))}: rename them")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write_line({"event": name, "time": time, **({"text": text} if text else {}), **fields})

    def close(self) -> None:
        """Closes the file; a second call does nothing. Raises an OSError if lines could not be written."""
        if self._file.closed:
            return
        self._write_waiting()
        self._file.close()
        if self._waiting:
            count = self._waiting.count(b"\n")
            raise OSError(self._problem.errno, f"{self._path} lacks its last lines ({count})")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_line(self, fields: dict[str, Any]) -> None:
        # Encoded before anything is written: a value that is not JSON leaves no partial line.
        self._waiting += (json.dumps(encode(fields)) + "\n").encode("ascii")
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._problem = None
        except OSError as error:
            if self._problem is None:
                text = f"{self._path} cannot be written: {error}; its lines wait until it can"
                echo(text, file=sys.stderr)
            self._problem = error


def read_metrics(path: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Reads a file of `JsonLines`.

    Returns:
      `(step lines, event lines)`. A step line has

      - `step` (1 is the first) and `attempt`, the number of times that the run was started;
      - the metrics of `make_train_step`, such as `loss`, `nll`, `grad_norm`, `clip_factor`, `learning_rate` and
        `tokens`, as `interval.summarize` takes them from the `steps` steps that the line covers (absent: 1), and its
        `clipped`, `skipped` and `grad_norm_max`; every `train.diagnose_every`-th step also has the metrics of
        `layer_diagnostics`;
      - `tokens_seen` since the start, `tokens_seen/NAME` from each source of a mixture, `padding_share` if packed,
        `tokens_per_second` and `step_seconds` since the last logged step, and `mfu`, the FLOP utilization as a
        fraction, where the peak of the device is known.

      Step lines are sorted. Lines that a `start` or `resume` from an earlier step has replaced are left out. Event
      lines have `event`, `time` and mostly `text`; all of them are returned, in the order of writing. Damaged lines are
      left out.

    Raises:
      ValueError: there is no such file.
    """
    log = read_log(path)
    return log.steps, log.events


class Log(NamedTuple):
    """Contents of a file of `JsonLines`; see `read_metrics` for the first two."""

    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    damaged: list[int]  # numbers of lines (1 is the first) that are torn or have a field of an unexpected type


def read_log(path: str | Path) -> Log:
    """Reads a file of `JsonLines`. Raises a ValueError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        if os.path.lexists(path):
            raise ValueError(f"{path} is no regular file: move it away, or give another run directory")
        raise ValueError(f"no metrics file {path}: give a run directory of `jaxtrain train`")
    steps: dict[int, dict[str, Any]] = {}
    events, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        try:
            record = _decode(json.loads(line)) if line.strip() else {"event": ""}
        except (ValueError, RecursionError):
            record = None
        if not _is_sound(record):  # the torn end of a line may be JSON by itself, as in `12`
            damaged.append(number)
        elif "event" not in record:
            steps[record["step"]] = record  # lines are in order of time: the last attempt wins
        elif line.strip():
            events.append(record)
            if record["event"] in ("start", "resume"):  # it replaces the later steps
                steps = {step: line for step, line in steps.items() if step <= record["step"]}
    return Log([steps[step] for step in sorted(steps)], events, damaged)


def _is_sound(record: Any) -> bool:
    """Returns True for a record with the fields that readers rely on, each of its type."""
    if not isinstance(record, dict) or not isinstance(record.get("event", ""), str):
        return False
    required = _REQUIRED.get(record["event"], set()) if "event" in record else {"step"}
    return required <= record.keys() and all(_fits(name, value) for name, value in record.items())


def _fits(name: str, value: Any) -> bool:
    if name in _WHOLE:
        return type(value) is int and 0 <= value < 2**63  # a bool is none
    if name in _NUMBERS:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if name in _LISTS:
        return isinstance(value, list) and all(_fits("loss", item) for item in value)
    return name not in _TEXTS or isinstance(value, str)


def encode(value: Any) -> Any:
    """Converts a value to JSON types: arrays to numbers and lists, NaN and infinities to strings."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if hasattr(value, "dtype"):
        if value.ndim:
            return [encode(item) for item in np.asarray(value)]
        # Only exact kinds use `item`: for bfloat16 it returns a NumPy scalar that json rejects.
        value = value.item() if np.dtype(value.dtype).kind in "biu" else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
