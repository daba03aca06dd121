"""Recorder of a running loop: reads metrics one step late, adds timing, and passes both to the sinks."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.config import TrainConfig
from jaxtrain.monitoring.console import Console
from jaxtrain.monitoring.interval import Values, summarize
from jaxtrain.monitoring.layers import drop_unsampled
from jaxtrain.monitoring.metrics import JsonLines, PackedMetrics, read_metrics
from jaxtrain.monitoring.rules import RunFacts
from jaxtrain.monitoring.sinks import SINKS, BackgroundSink, HealthSink, Sink, SinkFailed
from jaxtrain.monitoring.tracked import Tracked
from jaxtrain.runtime.config_files import flat_fields
from jaxtrain.runtime.processes import is_lead

_RESTORED_LINES = 1000  # logged steps of a resumed run that are judged again, so that no finding is repeated


def open_recorder(
    folder: Path,
    facts: RunFacts,
    *,
    seconds_at_peak: float | None = None,
    sinks: Sequence[Sink] = (),
    more: Callable[[int, int], dict[str, Any]] = lambda first, last: {},
    track: Sequence[str] = (),
    track_patience: float = 60.0,
) -> "Recorder":
    """Builds the recorder of a run directory.

    The lead process gets the metrics file, the console, the sinks of `SINKS` and the given ones (each on a separate
    thread), and the health rules. The other processes get no sink.

    Args:
      folder: run directory; metrics.jsonl in it is appended to.
      seconds_at_peak: time of a step at the peak FLOP/s of all devices; None leaves `mfu` out.
      more: returns further fields of a line from the first and the last step that it covers.
      track_patience: seconds that a tracker may take at the end, for uploads.
    """
    file, config = folder / "metrics.jsonl", facts.config.train
    lines, events = read_metrics(file) if file.exists() else ([], [])
    console = Console(config.steps) if is_lead() else None
    options = {"seconds_at_peak": seconds_at_peak, "lines": lines, "events": events, "more": more}
    recorder = Recorder(config, [JsonLines(file), console] if console else [], console=console, **options)
    if console:
        recorder.sinks += map(BackgroundSink, sinks)
        for name, make in SINKS.items():
            every_step = getattr(make, "every_step", False)
            recorder.sinks.append(BackgroundSink(functools.partial(make, folder), name, every_step=every_step))
        for name in track:
            sink = Tracked(name, folder, flat_fields(facts.config), lines, events)
            recorder.sinks.append(BackgroundSink(sink, name, patience=track_patience))
        recorder.sinks.append(HealthSink(facts, recorder.event, lines[-_RESTORED_LINES:], events))
    return recorder


class Recorder:
    """Reads the metrics of a step while the next one runs, and passes steps and events to the sinks.

    Use it as a context manager: leaving it closes the sinks. An exception in a sink's `step` or `event` is reported
    once and never reaches the loop.
    """

    def __init__(
        self,
        config: TrainConfig,
        sinks: Sequence[Sink],
        *,
        console: Console | None = None,
        seconds_at_peak: float | None = None,
        lines: Sequence[dict[str, Any]] = (),
        events: Sequence[dict[str, Any]] = (),
        more: Callable[[int, int], dict[str, Any]] = lambda first, last: {},
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Starts the clock. `lines` and `events` are the records of the earlier attempts.

        The console shows the text of `say`, `table` and `pause`. `seconds_at_peak` and `more`: see `open_recorder`.
        """
        self.sinks = list(sinks)  # called in order
        self.begun = [event for event in events if event["event"] in ("start", "resume")]  # earlier attempts
        self.attempt = 1 + len(self.begun)
        self.evaluated = {event["step"] for event in events if event["event"] == "eval"}  # by earlier attempts
        last = next((event for event in reversed(events) if event["event"] in ("start", "resume", "stop")), {})
        self.last_stop = last if last.get("event") == "stop" else {}  # empty if the last attempt crashed
        self.give_up = False  # True once the guard has given up
        self.last_line = lines[-1]["step"] if lines else 0  # last step that earlier attempts logged
        self._skipped = {line["step"] for line in lines if line.get("skipped") == 1}
        self._config, self._console, self._clock, self._more = config, console, clock, more
        self._failed: set[str] = set()  # names of the sinks whose failure was reported
        self._pending: tuple[int, PackedMetrics] | None = None
        self._unlogged: list[Values] = []  # metrics of the steps since the last logged one
        self._logged_step: int | None = None
        self._since = clock()
        self._tokens_per_step = config.batch_size * config.seq_len
        self._seconds_at_peak = seconds_at_peak

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: Any) -> None:
        errors: list[OSError] = []
        for sink in reversed(self.sinks):  # the file and the console last: they record the failures of the others
            try:
                sink.close()
            except OSError as error:
                errors.append(error)
            except Exception as error:
                self.report_failure(_name(sink), error)
        if errors and exception[0] is None:  # else a more important error is on its way
            raise errors[0]

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped so far, in all attempts."""
        return len(self._skipped)

    def event(self, name: str, text: str, /, **fields: Any) -> None:
        """Passes an event to the sinks; the console shows its text."""
        if name in ("start", "resume"):
            self._skipped = {step for step in self._skipped if step <= fields["step"]}
        for sink in self.sinks:
            self._call(sink, sink.event, name, text, fields)

    def stop(self, outcome: dict[str, Any]) -> None:
        """Records the end of the run, as an event `stop`, with the number of skipped steps and how to resume."""
        text = f"stopped at step {outcome['step']}: {outcome['reason']}"
        if self._skipped:
            text += f", {len(self._skipped)} steps skipped" if len(self._skipped) > 1 else ", 1 step skipped"
        if outcome["reason"].startswith("SIG"):
            text += "; the same command resumes the run"
        elif outcome["reason"] == "stop_after":
            text += "; the same command without train.stop_after resumes the run"
        self.event("stop", text, **outcome, skipped_steps=len(self._skipped))

    def say(self, text: str) -> None:
        if self._console:
            self._console.print(text)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        if self._console:
            self._console.table(title, rows)

    @contextlib.contextmanager
    def pause(self, activity: str = "") -> Iterator[None]:
        """Leaves the time of the block out of the steps' time, and shows that the activity, if named, is running."""
        begin = self._clock()
        try:
            with self._console.busy(activity) if self._console and activity else contextlib.nullcontext():
                yield
        finally:
            self._since += self._clock() - begin

    def compile(self, function: Callable[[], Callable]) -> Callable:
        """Returns the result of `function`, which compiles the step, and records the seconds it took."""
        begin = self._clock()
        with self.pause("compiling"):
            compiled = function()
        seconds = self._clock() - begin
        self.event("compile", f"compiled in {seconds:.1f}s", seconds=seconds)
        self._since = self._clock()
        return compiled

    def step(self, step: int, metrics: PackedMetrics) -> None:
        """Takes the metrics of a step that was just launched, and records the step before it."""
        self._read()
        if self._logged_step is None:
            self._logged_step = step - 1
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the last launched step, and logs all steps that were not logged yet."""
        self._read(log=True)

    def _read(self, log: bool = False) -> None:
        """Reads the pending step, and logs the interval that ends with it if it is due or `log` asks for it."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values, config = {name: value.tolist() for name, value in metrics.unpack().items()}, self._config
        self.give_up |= bool(values.get("give_up", 0))  # a good step after it changes nothing
        if values.get("skipped") == 1:
            self._skipped.add(step)
        values = drop_unsampled(values, step, config.diagnose_every)
        self._unlogged.append(values)
        # A skipped step ends its interval: the record then holds the step of each.
        due = any(every and step % every == 0 for every in (config.log_every, config.diagnose_every, config.steps))
        log = log or due or step in self._skipped or self.give_up
        fields = {"step": step, "attempt": self.attempt, "tokens_seen": step * self._tokens_per_step}
        fields |= self._more(self._logged_step + 1, step) | self._timing(step) if log else {}
        line = fields | summarize(self._unlogged) if log else {}
        for sink in self.sinks:
            if getattr(sink, "every_step", False):
                self._call(sink, sink.step, step, fields | values)
            elif log:
                self._call(sink, sink.step, step, line)
        self._unlogged = [] if log else self._unlogged

    def _timing(self, step: int) -> dict[str, float]:
        """Returns the speed since the step logged before."""
        now = self._clock()
        seconds = (now - self._since) / (step - self._logged_step)
        self._since, self._logged_step = now, step
        timing = {"tokens_per_second": self._tokens_per_step / seconds, "step_seconds": seconds}
        return timing | ({"mfu": self._seconds_at_peak / seconds} if self._seconds_at_peak else {})

    def _call(self, sink: Sink, method: Callable, *arguments: Any) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self.report_failure(_name(sink), error)

    def report_failure(self, name: str, error: Exception) -> None:
        """Reports the first failure of the sink of a name."""
        if name not in self._failed:
            self._failed.add(name)
            problem = str(error) if isinstance(error, SinkFailed) else f"{type(error).__name__}: {error}"
            self.event("sink_failed", f"warning: the sink {name} failed, training continues: {problem}", sink=name)


def _name(sink: Sink) -> str:
    return getattr(sink, "name", type(sink).__name__)
