"""metrics.jsonl: exact numbers, valid JSON, and recovery after a crash."""

import json
import math
import resource
import sys
from datetime import UTC, datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import call
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.monitoring.metrics import JsonLines, pack, read_log, read_metrics
from jaxtrain.runtime.chips import peak_flops


def _refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_float32_round_trips(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with JsonLines(path) as writer:
        for step, value in enumerate(values):
            writer.step(step, dict(loss=np.float32(value)))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=_refuse)
    steps, _ = read_metrics(path)
    np.testing.assert_array_equal(np.array([step["loss"] for step in steps], np.float32), np.float32(values))


def test_values_of_every_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as writer:
        writer.step(
            jnp.int32(3), dict(loss=jnp.float32(0.1), low=jnp.bfloat16(1.5), flag=np.bool_(True), none=None, big=2**40)
        )
        writer.event(
            "eval", "a\nb\u20ac", dict(step=3, nested={"values": [jnp.float32(math.nan), -math.inf, math.inf]})
        )
    (step,), (event,) = read_metrics(path)
    assert step == {"step": 3, "loss": float(np.float32(0.1)), "low": 1.5, "flag": True, "none": None, "big": 2**40}
    assert type(step["step"]) is int
    assert str(event["nested"]["values"]) == "[nan, -inf, inf]"
    assert event["text"] == "a\nb\u20ac"
    assert '["NaN", "-Infinity", "Infinity"]' in path.read_text()
    assert len(path.read_text().splitlines()) == 2


def test_events_carry_their_time(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    with JsonLines(tmp_path / "m") as writer:
        writer.event("start", "", dict(step=0, name="positional names do not clash"))
        with pytest.raises(ValueError, match="must not be named time"):
            writer.event("stop", "", dict(time=1))
    steps, (event,) = read_metrics(tmp_path / "m")
    assert steps == []
    assert event["event"] == "start"
    assert event["name"] == "positional names do not clash"
    time = datetime.fromisoformat(event["time"])
    assert time.utcoffset().total_seconds() == 0
    assert before <= time <= datetime.now(UTC)


def test_lines_are_there_when_the_process_dies(tmp_path):
    path = tmp_path / "m"
    code = (
        "import os, sys\nfrom jaxtrain.monitoring.metrics import JsonLines\n"
        "writer = JsonLines(sys.argv[1])\nwriter.step(1, {})\nwriter.event('eval', '', {'step': 1})\nos._exit(1)"
    )
    call([sys.executable, "-c", code, path])
    steps, events = read_metrics(path)
    assert steps == [{"step": 1}]
    assert events[0]["event"] == "eval"


def test_a_file_cut_at_any_byte_can_be_read_and_appended_to(tmp_path):
    path = tmp_path / "m"
    with JsonLines(path) as writer:
        writer.step(1, dict(loss=2.5))
        writer.step(2, dict(loss=1.5))
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with JsonLines(path) as writer:
            writer.step(3, dict(loss=0.5))
        found = [step["step"] for step in read_metrics(path)[0]]
        assert found == [1] * (cut >= second - 1) + [2] * (cut >= len(whole) - 1) + [3], cut
        assert b"\n\n" not in path.read_bytes()


def test_the_last_attempt_wins(tmp_path):
    path = tmp_path / "m"
    with JsonLines(path) as writer:
        for step in (10, 20, 30):
            writer.step(step, dict(attempt=1))
    with JsonLines(path) as writer:
        writer.event("start", "", dict(step=30, attempt=2))
        for step in (30, 20, 5):  # out of order, to see them sorted
            writer.step(step, dict(attempt=2))
    steps, events = read_metrics(path)
    assert [(step["step"], step["attempt"]) for step in steps] == [(5, 2), (10, 1), (20, 2), (30, 2)]
    assert len(events) == 1


def test_steps_replaced_by_a_restart_are_left_out(tmp_path):
    path = tmp_path / "m"
    with JsonLines(path) as writer:
        writer.event("start", "", dict(step=0))
        for step in (1, 2, 3, 4, 5, 6):
            writer.step(step, dict(attempt=1))
        writer.event("resume", "", dict(step=4))
        writer.step(5, dict(attempt=2))
        assert [(line["step"], line["attempt"]) for line in read_metrics(path)[0]][4:] == [(5, 2)]
        writer.event("eval", "", dict(step=1))  # no restart
        writer.event("resume", "", dict(step=2))
        writer.step(3, dict(attempt=3))
    steps, events = read_metrics(path)
    assert [(line["step"], line["attempt"]) for line in steps] == [(1, 1), (2, 1), (3, 3)]
    assert [event["event"] for event in events] == ["start", "resume", "eval", "resume"]
    with JsonLines(path) as writer:
        writer.event("start", "", dict(step=0))  # the first checkpoint had not been written
    assert read_metrics(path)[0] == []


@pytest.mark.parametrize(
    "damage",
    [
        b"12",
        b'"text"',
        b"[]",
        b"",
        b'{"other": 1}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"step": "3"}',
        b'{"step": [1]}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 3, "steps": 1e999}',
        b'{"step": 3, "steps": 0.5}',
        b'{"step": 3, "attempt": "1"}',
        b'{"step": 3, "loss": null}',
        b'{"step": 3, "loss": "low"}',
        b'{"step": 3, "loss": [1.0]}',
        b'{"step": 3, "loss": ' + b"9" * 400 + b"}",
        b'{"step": 3, "skipped": true}',
        b'{"step": 3, "layer_grad_norm": 1.0}',
        b'{"step": 3, "layer_grad_norm": [1.0, null]}',
        b'{"event": 3}',
        b'{"event": "resume"}',
        b'{"event": "eval", "step": "3"}',
        b'{"event": "eval", "step": 3, "nll": "low"}',
        b'{"event": "finding", "step": 3}',
        b'{"event": "start", "step": 0, "vocab_size": "all"}',
    ],
    ids=lambda damage: damage[:40],
)
def test_damaged_lines_are_left_out_and_numbered(tmp_path, damage):
    path = tmp_path / "m"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    assert read_metrics(path) == ([{"step": 1}, {"step": 2}], [])
    assert read_log(path).damaged == ([2] if damage else [])


def test_a_value_that_is_no_json_writes_nothing(tmp_path):
    with JsonLines(tmp_path / "m") as writer:
        with pytest.raises(TypeError):
            writer.step(1, dict(bad=object()))
        writer.step(2, {})
    assert (tmp_path / "m").read_text() == '{"step": 2}\n'


@pytest.fixture
def room():
    """Limits the size of files, which stands for a full disk: `room(9)`; None: no limit."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if size is None else size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_holds_lines_back_and_loses_none(tmp_path, room, capsys):
    """The disk is full in the middle of a line, twice, and at the end, where it is an error."""
    path = tmp_path / "m"
    writer = JsonLines(path)
    for step in (1, 4):
        writer.step(step, {})
        room(path.stat().st_size + 5)
        writer.step(step + 1, {})
        writer.step(step + 2, {})
        assert [line["step"] for line in read_metrics(path)[0]] == list(range(1, step + 1))
        assert capsys.readouterr().err.count("its lines wait until it can") == 1
        room(None)
    writer.step(7, {})
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 8))
    room(path.stat().st_size)
    writer.step(8, {})
    with pytest.raises(OSError, match=r"m lacks its last lines \(1\)"):
        writer.close()
    writer.close()


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"nothing/metrics\.jsonl.*jaxtrain train"):
        read_metrics(tmp_path / "nothing" / "metrics.jsonl")


def test_peak_flops_of_known_devices_only():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5", "bfloat16") == 459e12
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


METRICS = {"loss": np.float32(2.5), "layer_grad_norm": np.arange(3, dtype=np.float32), "skipped": np.float32(np.nan)}


def test_packed_metrics_are_one_array_and_unpack_unchanged():
    packed = jax.jit(lambda metrics: pack(dict(sorted(metrics.items(), reverse=True))))(METRICS)
    assert [leaf.shape for leaf in jax.tree.leaves(packed)] == [(5,)]
    out = packed.unpack()
    assert list(out) == ["skipped", "loss", "layer_grad_norm"]
    for name, value in METRICS.items():
        assert (out[name].shape, out[name].dtype) == (np.shape(value), np.float32)
        np.testing.assert_array_equal(out[name], value)
    np.testing.assert_array_equal(jax.tree.map(lambda x: 2 * x, packed).unpack()["layer_grad_norm"], [0, 2, 4])
