"""The metrics of a running loop: read one step late, timed, judged, written and shown."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxtrain.models.size import flops_per_token
from jaxtrain.monitoring.console import Console
from jaxtrain.monitoring.health import Finding, Health
from jaxtrain.monitoring.layers import drop_unsampled
from jaxtrain.monitoring.metrics import MetricsWriter, read_metrics
from jaxtrain.monitoring.packing import PackedMetrics
from jaxtrain.monitoring.rules import Facts
from jaxtrain.runtime.chips import peak_flops
from jaxtrain.runtime.processes import is_lead
from jaxtrain.training.run import Run

_EARLIER_LINES = 1000  # of a run that goes on, from which its health is taken up again


class Recorder:
    """Reads the metrics of each step while the next one runs, writes and shows those that are due; a context manager.

    What they say about the health of the run is an event `finding` and shown when it begins. `attempt` counts how many
    times the run was started, this time included; `evaluated` has the steps that earlier attempts evaluated; `give_up`
    says that the last step read was one bad step too many. Every process reads, and only process 0 writes and shows.
    """

    def __init__(self, run: Run):
        config, file = run.config.train, run.folder / "metrics.jsonl"
        self._nowhere = None if is_lead() else open(os.devnull, "w")  # noqa: SIM115 (closed on leaving)
        lines, events = read_metrics(file) if file.exists() else ([], [])
        self.attempt = 1 + sum(event["event"] in ("start", "resume") for event in events)
        self.give_up = False
        self.evaluated = {event["step"] for event in events if event["event"] == "eval"}
        self._config = config
        self._health = Health(Facts(run.config, run.program.vocab_size, run.store.train.num_tokens))
        self._earlier = lines[-_EARLIER_LINES:], [event for event in events if event["event"] == "eval"]
        self._writer = MetricsWriter(os.devnull if self._nowhere else file)
        self._console = Console(config.steps, run.config.optim.clip_norm, self._nowhere)
        self._pending: tuple[int, PackedMetrics] | None = None
        self._logged_step: int | None = None
        self._since = time.perf_counter()
        self._tokens_per_step = config.batch_size * config.seq_len
        peak = peak_flops(run.program.mesh.devices.flat[0].device_kind, config.precision)
        self._peak = peak and peak * run.program.mesh.size
        self._flops_per_step = self._tokens_per_step * flops_per_token(run.program.model.config, config.seq_len)

    def __enter__(self) -> "Recorder":
        self._console.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._console.__exit__(*exception)
        try:
            self._writer.close()
        except OSError:
            if exception[0] is None:  # else there is worse to tell
                raise
        if self._nowhere:
            self._nowhere.close()

    def event(self, name: str, text: str, **fields: Any) -> None:
        """Writes an event, and shows its text if it has one."""
        self._writer.event(name, **fields)
        if text:
            self.say(text)
        if name == "eval":
            self._tell(self._health.observe_evaluation(fields))

    def say(self, text: str) -> None:
        """Shows a text."""
        self._console.print(text)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Shows a table."""
        self._console.table(title, rows)

    def compile(self, make: Callable[[], Callable]) -> Callable:
        """Calls what compiles the step ahead of the loop, and says how long that took."""
        begin = time.perf_counter()
        compiled = make()
        seconds = time.perf_counter() - begin
        self.event("compile", f"compiled in {seconds:.1f}s", seconds=seconds)
        self._since = time.perf_counter()
        return compiled

    def step(self, done: int, metrics: PackedMetrics) -> None:
        """Takes a step just launched; reads the one before."""
        self.flush()
        if self._logged_step is None:
            self._logged_step = done - 1
        self._pending = (done, metrics)

    def flush(self) -> None:
        """Waits for the last launched step and records it."""
        if self._pending is None:
            return
        done, metrics = self._pending
        self._pending = None
        values = metrics.unpack()
        self.give_up = bool(values.get("give_up", 0))
        config = self._config
        sampled = bool(config.diagnose_every) and done % config.diagnose_every == 0
        values = drop_unsampled(values, done, config.diagnose_every)
        fields = {"step": done, "attempt": self.attempt, **values, "tokens_seen": done * self._tokens_per_step}
        if done % config.log_every == 0 or done == config.steps or sampled or self.give_up:
            fields |= self._timing(done)
            self._writer.write(**fields)
            self._console.update(fields)
        self._judge(fields)

    def _timing(self, done: int) -> dict[str, float]:
        """What a logged step says about speed, since the one logged before."""
        now = time.perf_counter()
        seconds = (now - self._since) / (done - self._logged_step)
        self._since, self._logged_step = now, done
        timing = {"tokens_per_second": self._tokens_per_step / seconds, "step_seconds": seconds}
        return timing | ({"mfu": self._flops_per_step / seconds / self._peak} if self._peak else {})

    def _judge(self, fields: dict[str, Any]) -> None:
        lines, evaluations = self._earlier
        self._earlier = (), ()
        # Not before the first step: only now is it known from where the run went on.
        earlier = [
            [record for record in records if record["step"] < fields["step"]] for records in (lines, evaluations)
        ]
        self._health.restore(*earlier)
        self._tell(self._health.observe(fields))

    def _tell(self, findings: list[Finding]) -> None:
        for finding in findings:
            self._writer.event("finding", **dataclasses.asdict(finding))
            self.say(str(finding))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves what happens inside out of the steps' time."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin
