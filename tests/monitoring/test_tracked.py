"""Experiment trackers: each step once under one id, whatever happens to the run; and the real packages."""

import contextlib
import glob
import json
import os
import struct
import sys
import threading
import time

import numpy as np
import pytest
from helpers import run as run_command
from helpers import user_environment
from runs import change, train

from jaxtrain.cli import main
from jaxtrain.config import Config, DataConfig, OptimConfig, TrainConfig
from jaxtrain.monitoring import trackers
from jaxtrain.monitoring.metrics import pack, read_metrics
from jaxtrain.monitoring.recorder import open_recorder
from jaxtrain.monitoring.rules import RunFacts

CONFIG = Config(
    data=DataConfig(store="any"),
    optim=OptimConfig(warmup_steps=5),
    train=TrainConfig(steps=60, batch_size=4, seq_len=8, log_every=5, diagnose_every=None),
)


class Fake(trackers.Tracker):
    """Tracker that stores its rows by id, and can lose the newest or fail."""

    stored: dict = {}  # noqa: RUF012
    runs: list = []  # noqa: RUF012

    def __init__(self, run):
        self.runs.append(run)
        self.rows = self.stored.setdefault(run.id, [])

    def log(self, step, values):
        self.rows.append((step, values))

    def note(self, step, name, text):
        self.rows.append((step, {name: text}))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "fake", ("json", Fake))
    monkeypatch.setattr(Fake, "stored", {})
    monkeypatch.setattr(Fake, "runs", [])
    return Fake


def attempt(folder, first, last, *events, version=0, config=CONFIG, **options):
    """Steps `first` + 1 to `last` of a run, an evaluation after every 10th; the loss tells step and version."""
    with open_recorder(folder, RunFacts(config), track=["fake"], **options) as recorder:
        names = {event["event"] for event in events}
        if "rewind" in names:
            recorder.event("rewind", "", step=first)
        recorder.event("resume" if first else "start", "", step=first, attempt=recorder.attempt, commit="abc")
        if "config_change" in names:
            recorder.event("config_change", "", step=first, changes={})
        for step in range(first + 1, last + 1):
            recorder.step(step, pack({"loss": np.float32(step + 1000 * version), "skipped": np.float32(0)}))
            if step % 10 == 0:
                recorder.flush()
                recorder.event("eval", "", step=step, nll=float(step + 1000 * version))
        recorder.flush()


def curve(rows, name):
    return [(step, values[name]) for step, values in rows if name in values]


def check(rows, folder):
    """The tracker has what metrics.jsonl has: no more, no less, in order."""
    lines, events = read_metrics(folder / "metrics.jsonl")
    assert curve(rows, "train/loss") == [(line["step"], line["loss"]) for line in lines]
    evaluations = {event["step"]: event["nll"] for event in events if event["event"] == "eval"}
    found = curve(rows, "validation/nll")
    assert found == sorted(found)
    assert {step for step, _ in found} == {step for step in evaluations if step <= lines[-1]["step"]}


def test_a_stopped_run_resumes_under_its_id(fake, tmp_path):
    attempt(tmp_path, 0, 20)
    attempt(tmp_path, 20, 40)
    ((_, rows),) = fake.stored.items()
    check(rows, tmp_path)
    assert [run.is_new for run in fake.runs] == [True, False]
    assert fake.runs[0].commit == "abc"
    assert fake.runs[0].config["optim.warmup_steps"] == 5


def test_steps_that_run_twice_after_a_crash_are_sent_once(fake, tmp_path):
    attempt(tmp_path, 0, 30)
    attempt(tmp_path, 20, 40)  # from the checkpoint of step 20
    ((_, rows),) = fake.stored.items()
    check(rows, tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 4, 8])
def test_rows_that_a_crash_lost_are_sent_again(fake, tmp_path, kept):
    attempt(tmp_path, 0, 30)
    ((name, rows),) = fake.stored.items()
    del rows[kept:]
    names = {"train": "train/loss", "validation": "validation/nll"}
    last = {kind: max([step for step, values in rows if key in values], default=0) for kind, key in names.items()}
    (tmp_path / "trackers/fake.json").write_text(json.dumps({"id": name, **last}))
    attempt(tmp_path, 20, 40)
    assert list(fake.stored) == [name]
    check(rows, tmp_path)


@pytest.mark.parametrize("event", ["rewind", "config_change"])
def test_steps_that_are_replaced_get_a_new_id(fake, tmp_path, event):
    attempt(tmp_path, 0, 30)
    attempt(tmp_path, 10, 40, {"event": event}, version=1)
    old, new = fake.stored.values()
    assert [step for step, _ in curve(old, "train/loss")] == [5, 10, 15, 20, 25, 30]
    check(new, tmp_path)
    assert curve(new, "train/loss")[1:3] == [(10, 8.0), (15, 1013.0)]
    assert fake.runs[1].title.endswith("-2")
    attempt(tmp_path, 40, 50, version=1)
    assert len(fake.stored) == 2


def test_a_tracker_that_is_added_later_or_lost_its_state_gets_the_whole_run(fake, tmp_path):
    attempt(tmp_path, 0, 20)
    (tmp_path / "trackers/fake.json").write_text("{torn")
    attempt(tmp_path, 20, 30)
    check(list(fake.stored.values())[1], tmp_path)


class Raises(Fake):
    def __init__(self, run):
        raise ConnectionError("offline")


class Sleeps(Fake):
    gate = threading.Event()

    def log(self, step, values):
        self.gate.wait(120)


class Stumbles(Fake):
    def log(self, step, values):
        if step % 10:
            raise KeyError("no such chart")
        super().log(step, values)


@pytest.mark.parametrize("kind", [Raises, Sleeps, Stumbles])
def test_a_tracker_in_trouble_is_reported_once_and_holds_nothing_up(fake, tmp_path, monkeypatch, capsys, kind):
    """One that raises at once, one that hangs until its queue is full, one that raises now and then."""
    monkeypatch.setitem(trackers.TRACKERS, "fake", ("json", kind))
    config = change(CONFIG, train={"log_every": 1, "steps": 1200})
    Sleeps.gate = threading.Event()
    begin = time.monotonic()
    attempt(tmp_path, 0, 1200, config=config, track_patience=0.05)
    assert time.monotonic() - begin < 60
    Sleeps.gate.set()
    assert capsys.readouterr().out.count("warning: the sink fake failed, training continues") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == list(range(1, 1201))


def test_wrong_names_and_missing_packages(tmp_path, capsys, monkeypatch, tiny_config):
    config = tmp_path / "c.py"
    config.write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"--track: 'wandbb' is none of .* did you mean wandb\?"):
        train(tiny_config, tmp_path / "run", track=["wandbb"])
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("no_such_package", Fake))
    with pytest.raises(ImportError, match=r"pip install 'jaxtrain\[mlflow\]'"):
        train(tiny_config, tmp_path / "run", track=["mlflow"])
    assert not (tmp_path / "run").exists()
    assert main(["train", "--help"]) == 0
    assert "--track" in capsys.readouterr().out


def events_of(folder):
    """Reads the scalars of TensorBoard event files: (step, tag, value), and the tags of texts."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, texts = [], set()
    for path in sorted(folder.glob("*/events.*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.append((event.step, value.tag, value.simple_value))
                else:
                    texts.add(value.tag)
    return scalars, texts


def test_tensorboard(tiny_config, tmp_path):
    pytest.importorskip("tensorboardX")
    run = tmp_path / "run"
    config = change(tiny_config, train={"log_every": 2})
    train(change(config, train={"stop_after": 6}), run, track=["tensorboard"])
    outcome = train(config, run, track=["tensorboard"])
    scalars, texts = events_of(run / "tensorboard")
    lines, _ = read_metrics(run / "metrics.jsonl")
    losses = [(step, value) for step, tag, value in scalars if tag == "train/nll"]
    assert losses == [(line["step"], pytest.approx(line["nll"])) for line in lines]
    assert [step for step, tag, _ in scalars if tag == "validation/nll"] == [12]
    assert scalars[-1][2] != 0
    assert outcome["reason"] == "finished"
    assert {tag.split("/")[0] for tag in texts} >= {"config", "commit", "stop"}
    assert len(os.listdir(run / "tensorboard")) == 1


TWICE = """
import dataclasses, sys
from pathlib import Path
import numpy as np
sys.path[:0] = PATHS
from test_tracked import CONFIG
from jaxtrain.monitoring.metrics import pack
from jaxtrain.monitoring.recorder import open_recorder
from jaxtrain.monitoring.rules import RunFacts

def attempt(first, last):
    with open_recorder(Path("run"), RunFacts(CONFIG), track=[NAME]) as recorder:
        recorder.event("resume" if first else "start", "", step=first, attempt=recorder.attempt, commit="abc")
        for step in range(first + 1, last + 1):
            recorder.step(step, pack({"loss": np.float32(step), "skipped": np.float32(0)}))
        recorder.flush()
        recorder.event("eval", "", step=last, nll=2.0)

Path("run").mkdir(exist_ok=True)
attempt(*map(int, sys.argv[1:]))
"""


def wandb_records(data):
    """Splits the bytes of a .wandb file into records: a header, then blocks of 32 KiB as LevelDB logs have them."""
    at, whole = 7, b""
    while at < len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += 7 + length
        piece = data[at - length : at]
        whole = piece if kind in (1, 2) else whole + piece  # a full record or a first piece; a middle or last piece
        if kind in (1, 4):
            yield whole


def wandb_rows(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    rows, ids = [], set()
    for path in sorted(folder.glob("run/wandb/offline-run-*/*.wandb")):
        ids.add(path.parent.name.rsplit("-", 1)[1])
        for record in map(Record.FromString, wandb_records(path.read_bytes())):
            if record.WhichOneof("record_type") == "history":
                items = {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append((items["step"], items))
    assert len(ids) == 1
    return rows


def mlflow_rows(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    (experiment,) = [one for one in client.search_experiments() if one.name == "jaxtrain"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["optim.warmup_steps"] == "5"
    assert found.data.tags["mlflow.source.git.commit"] == "abc"
    names = ("train/loss", "validation/nll")
    return [(m.step, {n: m.value}) for n in names for m in client.get_metric_history(found.info.run_id, n)]


def trackio_rows(folder):
    import sqlite3

    (path,) = glob.glob(str(folder / "trackio/jaxtrain*.db"))
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    return [(step, json.loads(metrics)) for step, metrics in rows]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "read"), [("wandb", wandb_rows), ("mlflow", mlflow_rows), ("trackio", trackio_rows)])
def test_the_real_trackers_have_each_step_once(name, read, tmp_path, monkeypatch):
    pytest.importorskip(trackers.TRACKERS[name][0])
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    code = TWICE.replace("PATHS", repr(paths)).replace("NAME", repr(name))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    environment = user_environment(
        JAX_PLATFORMS="cpu",
        PYTHONPATH=os.path.dirname(paths[1]),
        WANDB_MODE="offline",
        MLFLOW_TRACKING_URI=f"file:{tmp_path}/mlruns",
        TRACKIO_DIR=str(tmp_path / "trackio"),
        HF_HUB_OFFLINE="1",
    )
    for first, last in ((0, 30), (20, 40)):
        out = run_command([sys.executable, "-c", code, first, last], cwd=tmp_path, environment=environment)
        assert "failed" not in out
    rows = read(tmp_path)
    assert sorted(curve(rows, "train/loss")) == [(s, s - 2) for s in range(5, 41, 5)]
    assert [step for step, _ in curve(rows, "validation/nll")] == [30, 40]
