"""`jaxtrain runs`: states, order and broken directories."""

import fcntl
import json

from test_report import make_run

from jaxtrain.cli import main
from jaxtrain.monitoring.run_record import read_record
from jaxtrain.monitoring.run_table import read_rows, sort_key, sort_rows


def write_events(run, *events):
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"stop"' not in line]
    (run / "metrics.jsonl").write_text("\n".join([*kept, *map(json.dumps, events)]) + "\n")


def test_states(tmp_path):
    run = make_run(tmp_path / "run")
    stops = {"finished": "finished", "SIGTERM": "stopped", "stop_after": "stopped", "too many bad steps": "gave up"}
    for reason, state in stops.items():
        write_events(run, {"event": "stop", "step": 40, "reason": reason})
        assert read_record(run).state == state
    write_events(run)
    assert read_record(run).state == "crashed"
    (run / "lock").write_text("process 1 on a host that crashed")
    assert read_record(run).state == "crashed"
    with open(run / "lock") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert read_record(run).state == "running"
        write_events(run, {"event": "stop", "step": 40, "reason": "finished"})
        assert read_record(run).state == "finished"  # the report at the end of a run
    write_events(run, {"event": "stop", "step": 40, "reason": "SIGTERM"}, {"event": "resume", "step": 40})
    assert read_record(run).state == "crashed"


def test_rows_and_their_order(tmp_path, capsys):
    runs = tmp_path / "runs"
    for name, rate in (("b", 3e-3), ("a", 1e-3), ("deep/c", 2e-3)):
        make_run(runs / name, peak_lr=rate)
    for name, content in (("torn", "{"), ("text", '"x"'), ("none", "null")):
        (runs / name).mkdir()
        (runs / name / "config.json").write_text(content)
        (runs / name / "metrics.jsonl").write_text('{"step": "x"}\n[]\n')
    (runs / "exported").mkdir()
    (runs / "exported" / "config.json").write_text('{"model_type": "llama"}')  # is no run
    (runs / "of-a").symlink_to("a")  # the same run
    (runs / "link").symlink_to(make_run(tmp_path / "elsewhere", peak_lr=4e-3))
    (runs / "lost").mkdir()
    (runs / "lost" / "metrics.jsonl").write_text("")
    rows = read_rows(runs)
    assert [row["name"] for row in rows] == ["a", "b", "deep/c", "link", "lost", "none", "text", "torn"]
    assert [row["state"] for row in rows] == ["stopped"] * 4 + ["broken"] * 4
    assert rows[0]["config"] == {"optim.peak_lr": 1e-3}
    assert rows[0]["validation_loss"] == 1.25
    for key in ("name", "state", "steps", "validation", "tokens/s", "time", "optim.peak_lr", "peak_lr"):
        ordered = [row["name"] for row in sort_rows(rows, sort_key(rows, key))]
        assert sorted(ordered) == [row["name"] for row in rows]
    down = [row["name"] for row in sort_rows(rows, "optim.peak_lr", descending=True)]
    assert down == ["link", "b", "deep/c", "a", "lost", "none", "text", "torn"]
    assert main(["runs", str(runs), "--sort", "-optim.peak_lr"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("peak_lr=0.003") < printed.index("peak_lr=0.001")
    assert "torn: " in printed
    assert "config.json: expected an object, got str; correct it" in printed
    assert main(["runs", str(runs), "--json"]) == 0
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == [row["name"] for row in rows]


def test_wrong_arguments(tmp_path, capsys):
    assert main(["runs", str(tmp_path)]) == 2
    assert "holds no run directory" in capsys.readouterr().err
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    make_run(tmp_path / "run")
    assert main(["runs", str(tmp_path), "--sort", "valdation"]) == 2
    assert "did you mean validation?" in capsys.readouterr().err
