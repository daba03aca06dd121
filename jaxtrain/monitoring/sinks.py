"""Sinks: receivers of a run's steps and events, such as a file, the terminal or an experiment tracker.

A sink is any object with the methods of `Sink`. To add one to every run, for example in a config file, enter a function
of the run directory into `SINKS`:

    from jaxtrain.monitoring.sinks import SINKS

    SINKS["my tracker"] = MyTracker  # called as MyTracker(run_dir)

From Python, `train(config, run_dir, hooks=Hooks(sinks=[MyTracker()]))` adds one to a single run.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.monitoring.health import Health
from jaxtrain.monitoring.rules import RunFacts

Fields = Mapping[str, Any]


class Sink(Protocol):
    """Receiver of one run's steps and events.

    The lead process calls a sink; the other processes have none. A sink with the attribute `every_step = True` receives
    every step, any other sink the logged ones.
    """

    def step(self, step: int, fields: Fields) -> None:
        """Receives a completed step (1 is the first) and its metrics, named as in `metrics.read_metrics`."""

    def event(self, name: str, text: str, fields: Fields) -> None:
        """Receives an event, such as `eval` or `stop`, with its text for people ("" has none) and its fields."""

    def close(self) -> None:
        """Ends the record; nothing follows."""


SINKS: dict[str, Callable[[Path], Sink]] = {}  # further sinks by name; called with the run directory


class SinkFailed(RuntimeError):
    """A sink that raised, or that cannot keep up."""


class BackgroundSink:
    """Runs a sink on a separate thread, so that the training loop never waits for it.

    Records are dropped while the sink is `capacity` records behind. Errors and drops surface as SinkFailed from the
    next call, which `Recorder` reports once; the sink still receives what follows.
    """

    def __init__(
        self,
        sink: Sink | Callable[[], Sink],
        name: str = "",
        *,
        every_step: bool = False,
        capacity: int = 1000,
        patience: float = 10.0,
    ):
        """Starts the thread.

        Args:
          sink: the sink to run, or a function that makes it on the thread.
          name: its name in reports of failure; the default is the name of its class.
          every_step: passes every step on, as for a sink with that attribute.
          capacity, patience: records that may wait for it, and seconds that `close` waits for it to finish.
        """
        self.name = name or type(sink).__name__
        self.every_step = every_step or getattr(sink, "every_step", False)
        self._sink, self._patience = sink, patience
        self._queue: queue.Queue[tuple[Any, ...]] = queue.Queue(capacity)
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"sink {self.name}", daemon=True)
        self._thread.start()

    def step(self, step: int, fields: Fields) -> None:
        self._put("step", step, fields)

    def event(self, name: str, text: str, fields: Fields) -> None:
        self._put("event", name, text, fields)

    def close(self) -> None:
        """Waits up to `patience` seconds for the queued records and for the sink's own `close`."""
        try:
            self._queue.put(("close",), timeout=self._patience)
        except queue.Full:
            pass
        else:
            self._thread.join(self._patience)
        if self._thread.is_alive():
            raise SinkFailed(f"it did not finish within {self._patience:g} s: its last records are lost")
        self._raise_problem()

    def _put(self, *call: Any) -> None:
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            raise SinkFailed(f"it is {self._queue.maxsize} records behind: records are dropped") from None
        self._raise_problem()

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise SinkFailed(f"{type(problem).__name__}: {problem}") from problem

    def _work(self) -> None:
        sink, method = self._sink, ""
        if not hasattr(sink, "step"):
            sink = self._attempt(sink)
        while method != "close":
            method, *arguments = self._queue.get()
            if sink is not None:  # else making it has failed
                self._attempt(methodcaller(method, *arguments), sink)

    def _attempt(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as problem:
            self._problem = problem


class HealthSink:
    """Judges every step and evaluation, and reports each finding as an event."""

    every_step = True

    def __init__(self, facts: RunFacts, report: Callable[..., None], lines: Iterable[Fields], events: Iterable[Fields]):
        """`lines` and `events` are the earlier records of a resumed run, as `read_metrics` returns them."""
        self._health, self._report = Health(facts), report
        self._earlier = list(lines), [event for event in events if event["event"] == "eval"]

    def step(self, step: int, fields: Fields) -> None:
        self._publish(self._health.observe(fields))

    def event(self, name: str, text: str, fields: Fields) -> None:
        """Judges an evaluation; on `start` and `resume`, replays the records up to that step without reporting."""
        if name == "eval":
            self._publish(self._health.observe_evaluation(fields))
        elif name in ("start", "resume"):
            before = ([record for record in records if record["step"] <= fields["step"]] for records in self._earlier)
            list(self._health.replay(*before))  # their findings were reported
            self._earlier = [], []

    def close(self) -> None:
        """Does nothing."""

    def _publish(self, findings: Iterable[Any]) -> None:
        for finding in findings:
            self._report("finding", str(finding), **asdict(finding))
