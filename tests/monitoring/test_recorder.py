"""The recorder: what each sink receives, timing, skipped steps, and sinks that fail."""

import io
import itertools
import json
import threading

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring.console import Console
from jaxtrain.monitoring.metrics import JsonLines, pack, read_metrics
from jaxtrain.monitoring.recorder import Recorder, open_recorder
from jaxtrain.monitoring.rules import RunFacts
from jaxtrain.monitoring.sinks import SINKS, BackgroundSink, SinkFailed

CONFIG = TrainConfig(steps=40, batch_size=4, seq_len=8, log_every=10, diagnose_every=20)


class Collect:
    """Sink that records its calls."""

    def __init__(self, every_step=False):
        self.every_step, self.steps, self.events, self.closed = every_step, [], [], False

    def step(self, step, fields):
        assert fields["step"] == step
        self.steps.append(dict(fields))

    def event(self, name, text, fields):
        self.events.append((name, text, dict(fields)))

    def close(self):
        self.closed = True


class Fail(Collect):
    def step(self, step, fields):
        super().step(step, fields)
        raise KeyError("no such chart")

    event = step


def metrics(loss=2.0, skipped=0.0):
    values = {"loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "skipped": skipped, "layer_grad_norm": [1.0, 2.0]}
    return pack({name: np.float32(value) for name, value in values.items()})


def run_steps(recorder, steps, skipped=()):
    for step in steps:
        recorder.step(step, metrics(loss=float(step), skipped=float(step in skipped)))
    recorder.flush()


def test_sinks_receive_the_logged_steps_or_every_step():
    logged, every = Collect(), Collect(every_step=True)
    with Recorder(CONFIG, [logged, every]) as recorder:
        run_steps(recorder, range(1, 41), skipped=[33])
        recorder.event("eval", "validation", step=40, nll=1.0)
    assert [fields["step"] for fields in logged.steps] == [10, 20, 30, 33, 40]
    assert [fields["step"] for fields in every.steps] == list(range(1, 41))
    assert [fields["step"] for fields in every.steps if "layer_grad_norm" in fields] == [20, 40]
    assert (logged.steps[0]["loss"], every.steps[9]["loss"]) == (5.5, 10.0)  # a mean, and a step's own
    assert type(logged.steps[0]["loss"]) is float
    assert logged.steps[1]["layer_grad_norm"] == [1.0, 2.0]
    assert logged.steps[0]["tokens_seen"] == 10 * 4 * 8
    assert logged.events == every.events == [("eval", "validation", {"step": 40, "nll": 1.0})]
    assert logged.closed
    assert every.closed


def test_metrics_are_read_one_step_late():
    sink = Collect(every_step=True)
    recorder = Recorder(CONFIG, [sink])
    recorder.step(1, metrics())
    assert sink.steps == []
    recorder.step(2, metrics())
    assert [fields["step"] for fields in sink.steps] == [1]


def test_speed_is_measured_between_logged_steps_without_pauses():
    now = itertools.count()  # the clock advances a second with each reading
    sink = Collect()
    recorder = Recorder(CONFIG, [sink], seconds_at_peak=3.0, clock=lambda: float(next(now)))
    run_steps(recorder, range(1, 11))  # 1 s
    with recorder.pause():
        [next(now) for _ in range(100)]
    run_steps(recorder, range(11, 21))  # 1 s and the two readings of the pause
    assert [fields["step_seconds"] for fields in sink.steps] == [0.1, 0.2]
    assert [fields["tokens_per_second"] for fields in sink.steps] == [320.0, 160.0]
    assert [fields["mfu"] for fields in sink.steps] == [30.0, 15.0]


@pytest.mark.parametrize(
    ("skipped", "reason", "text"),
    [
        ([], "finished", "stopped at step 40: finished"),
        ([7], "finished", "stopped at step 40: finished, 1 step skipped"),
        ([7, 8], "SIGINT", "stopped at step 40: SIGINT, 2 steps skipped; the same command resumes the run"),
    ],
)
def test_the_end_says_how_many_steps_were_skipped_and_how_to_resume(skipped, reason, text):
    sink = Collect()
    with Recorder(CONFIG, [sink]) as recorder:
        run_steps(recorder, range(1, 41), skipped)
        recorder.stop({"step": 40, "reason": reason})
    assert sink.events == [("stop", text, {"step": 40, "reason": reason, "skipped_steps": len(skipped)})]


def test_skipped_steps_are_counted_over_all_attempts(tmp_path):
    """Steps after the checkpoint run again and count once."""

    config = Config(data=DataConfig(store="any"), optim=OptimConfig(warmup_steps=5), train=CONFIG)

    def attempt(first, last, skipped):
        with open_recorder(tmp_path, RunFacts(config)) as recorder:
            name = "resume" if first else "start"
            recorder.event(name, "", step=first, attempt=recorder.attempt)
            run_steps(recorder, range(first + 1, last + 1), skipped)
            return recorder.attempt, recorder.skipped_steps

    assert attempt(0, 25, [3, 4, 22]) == (1, 3)
    assert attempt(20, 30, [21]) == (2, 3)
    assert attempt(30, 31, []) == (3, 3)
    assert sum(line["skipped"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]) == 3


@pytest.mark.parametrize("wrap", [lambda sink: sink, BackgroundSink])
def test_a_sink_that_raises_is_reported_once_and_still_called(tmp_path, wrap):
    stream, failing, other = io.StringIO(), Fail(), Collect()
    console = Console(40, stream)
    sinks = [JsonLines(tmp_path / "m"), console, wrap(failing), other]
    with Recorder(CONFIG, sinks, console=console) as recorder:
        run_steps(recorder, range(1, 41))
    assert [fields["step"] for fields in failing.steps] == [10, 20, 30, 40]
    assert failing.closed
    assert [fields["step"] for fields in other.steps] == [10, 20, 30, 40]
    assert stream.getvalue().count("warning: the sink Fail failed, training continues: KeyError: 'no such chart'") == 1
    (event,) = read_metrics(tmp_path / "m")[1]
    assert (event["event"], event["sink"]) == ("sink_failed", "Fail")


def test_a_sink_without_a_method_is_reported_and_closed():
    class NoEvent:
        closed = False
        step = None

        def close(self):
            NoEvent.closed = True

    sink = BackgroundSink(NoEvent())
    sink.event("eval", "", {})
    with pytest.raises(SinkFailed, match=r"AttributeError.* has no attribute 'event'"):
        sink.close()
    assert NoEvent.closed


def test_a_slow_sink_loses_records_and_stops_nothing():
    gate = threading.Event()

    class Slow(Collect):
        def step(self, step, fields):
            gate.wait(30)
            super().step(step, fields)

    slow, other = Slow(), Collect()
    with Recorder(CONFIG, [BackgroundSink(slow, capacity=2), other]) as recorder:
        run_steps(recorder, range(10, 101, 10))
        (event,) = other.events
        assert event[1].endswith("it is 2 records behind: records are dropped")
        gate.set()
    assert slow.closed
    assert len(other.steps) == 10
    assert 2 <= len(slow.steps) <= 3


def test_a_sink_that_never_ends_is_abandoned():
    class Stuck(Collect):
        def close(self):
            threading.Event().wait(60)

    other = Collect()
    with Recorder(CONFIG, [other, BackgroundSink(Stuck(), patience=0.05)]) as recorder:
        run_steps(recorder, [10])
    assert "did not finish within 0.05 s" in other.events[0][1]


def test_lines_that_could_not_be_written_are_an_error_unless_there_is_one():
    class Full(Collect):
        def close(self):
            raise OSError(28, "metrics.jsonl lacks its last lines")

    with pytest.raises(OSError, match="lacks its last lines"), Recorder(CONFIG, [Full()]):
        pass
    with pytest.raises(ValueError, match="worse"), Recorder(CONFIG, [Full()]):
        raise ValueError("worse")


# A sink from outside the package.

CONFIG_WITH_A_SINK = """
import json
from pathlib import Path

from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama
from jaxtrain.monitoring.sinks import SINKS


class Tracker:
    def __init__(self, run_dir):
        self.file = open(Path(run_dir) / "tracker.txt", "a")

    def step(self, step, fields):
        print(step, json.dumps(fields), file=self.file)

    def event(self, name, text, fields):
        print(name, json.dumps(fields), file=self.file)

    def close(self):
        self.file.close()


def broken(run_dir):
    raise ConnectionError("offline")


SINKS["tracker"] = Tracker
SINKS["broken"] = broken


def config():
    return Config(
        data=DataConfig(store=STORE),
        model=llama(num_layers=1, num_heads=1, d_model=8, d_ff=8, max_seq_len=8),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=4, batch_size=2, seq_len=8, log_every=2),
        mesh=MeshConfig(data=1),
        checkpoint=CheckpointConfig(every=100),
    )
"""


def test_a_sink_in_a_config_file_receives_the_run(tmp_path, store, capsys, monkeypatch):
    from jaxtrain.cli import main

    for name in ("tracker", "broken"):
        monkeypatch.setitem(SINKS, name, None)  # restored after the test
    file, run = tmp_path / "with_sink.py", tmp_path / "run"
    file.write_text(CONFIG_WITH_A_SINK.replace("STORE", repr(str(store))))
    assert main(["train", str(file), "--run-dir", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "warning: the sink broken failed, training continues: ConnectionError: offline" in printed
    lines = [line.split(" ", 1) for line in (run / "tracker.txt").read_text().splitlines()]
    received = {name: json.loads(fields) for name, fields in lines}
    order = ("start", "2", "4", "eval", "stop")
    assert tuple(name for name, _ in lines if name in order) == order
    (_, last), _ = read_metrics(run / "metrics.jsonl")
    assert received["4"] == last
    assert received["stop"]["reason"] == "finished"
