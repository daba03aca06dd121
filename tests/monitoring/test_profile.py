"""`--profile`: the trace of a real run holds all scopes and is reported; bad ranges are errors."""

import dataclasses
import gzip
import itertools
import json
import shutil
from typing import Any, NamedTuple

import pytest
from runs import QUICK, train

from jaxtrain.cli import main
from jaxtrain.config import TrainConfig
from jaxtrain.data.store import open_store
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.monitoring.profile import parse_profile, scopes_of
from jaxtrain.monitoring.report import describe_times, write_report
from jaxtrain.monitoring.trace import OTHER, SCOPES, busy_times, newest_trace, read_line, read_times
from jaxtrain.runtime.compile_options import TRACE_OPTIONS
from jaxtrain.runtime.config_files import to_json
from jaxtrain.runtime.hlo import HloModule
from jaxtrain.runtime.mesh import make_mesh
from jaxtrain.training.program import make_program


@pytest.fixture(scope="module")
def profiled(tiny_config, tmp_path_factory):
    """A run of twelve steps, of which 5, 6 and 7 were traced; step 5 is saved among them."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    train(tiny_config, folder, profile="5:8")
    return folder


def test_a_run_writes_a_trace_that_viewers_open(profiled):
    folder = profiled / "profile" / "plugins" / "profile" / "steps_5-7"  # where TensorBoard expects it
    assert {path.name for path in folder.iterdir()} == {
        f"process0.{kind}" for kind in ("xplane.pb", "trace.json.gz", "scopes.json")
    }
    assert not list((profiled / "profile").glob(".*"))
    trace = json.loads(gzip.decompress((folder / "process0.trace.json.gz").read_bytes()))
    assert "metadata" not in trace  # Perfetto refuses it
    steps = [event for event in trace["traceEvents"] if event.get("name") == "train"]
    assert [int(event["args"]["step_num"]) for event in steps] == [5, 6, 7]
    _, events = read_metrics(profiled / "metrics.jsonl")
    (event,) = [event for event in events if event["event"] == "profile"]
    assert (event["first"], event["last"]) == (5, 7)


def test_the_time_of_a_step_is_shared_among_all_scopes(profiled):
    steps, times = read_times(newest_trace(profiled))
    assert list(steps) == [5, 6, 7]
    assert list(times) == [*SCOPES, OTHER]
    assert all(times[scope] > 0 for scope in SCOPES)


def test_every_matrix_product_has_a_scope_in_both_passes(tiny_config, store):
    program = make_program(tiny_config, make_mesh(tiny_config.mesh), open_store(store).vocab_size)
    text = program.train_step.lower(program.abstract_state, program.abstract_batch).compile().as_text()
    scopes, found = scopes_of(text), set()
    for lines in HloModule(text).computations.values():
        for line in lines:
            if line.source.endswith("dot_general"):
                assert line.name in scopes, line
            if line.name in scopes:
                found.add((scopes[line.name], "transpose(" in line.source))
    assert {scope for scope, _ in found} == set(SCOPES)
    assert found >= {("embed", True), ("attention", True), ("mlp", True)}
    assert ("optimizer", True) not in found  # the head forms its gradient in the forward pass


def test_the_report_shows_the_shares(profiled, capsys):
    assert main(["report", str(profiled)]) == 0
    printed = capsys.readouterr().out
    assert "time by scope: steps 5 to 7" in printed
    page = (profiled / "report.html").read_text()
    heading, rows = describe_times(profiled)
    assert heading.startswith("steps 5 to 7")
    for scope, share, milliseconds in rows:
        assert f"  {scope:10}{share:>7}{milliseconds:>9} ms a step" in printed
        assert f"<td>{scope}</td><td>{share}</td>" in page


def test_profiling_changes_no_number(profiled, tiny_config, tmp_path):
    train(tiny_config, tmp_path / "run")
    clocks = {"attempt", "tokens_per_second", "step_seconds", "time"}
    lines = [
        [{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(run / "metrics.jsonl")[0]]
        for run in (profiled, tmp_path / "run")
    ]
    assert lines[0] == lines[1]
    assert not (tmp_path / "run" / "profile").exists()
    assert describe_times(tmp_path / "run") == ("", [])
    assert "Time by scope" not in write_report(tmp_path / "run").read_text()


def test_a_damaged_trace_leaves_the_report_whole(profiled, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(profiled, run)
    trace = newest_trace(run)
    (trace / "process0.xplane.pb").write_bytes(b"junk")
    with pytest.raises(ValueError, match="the trace in"):
        read_times(trace)
    (trace / "process0.xplane.pb").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: no file process0\.xplane\.pb"):
        read_times(trace)
    assert "no file process0.xplane.pb" in write_report(run).read_text()
    (trace / "process0.scopes.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        read_times(trace)


def test_a_run_resumed_after_the_range_says_so_and_trains(tiny_config, tmp_path, capsys, monkeypatch):
    """The program has the options of a traced one only if the range is ahead: here one that the compiler refuses."""
    monkeypatch.setitem(TRACE_OPTIONS, "cpu", {"xla_no_such_option": True})
    first = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, stop_after=6))
    train(first, tmp_path / "run", profile="2:4")
    assert newest_trace(tmp_path / "run").name == "steps_2-3"
    refused = "this compiler refuses xla_no_such_option: compiling without"
    assert refused in capsys.readouterr().out
    assert train(tiny_config, tmp_path / "run", profile="6:9")["reason"] == "finished"
    printed = capsys.readouterr().out
    assert "no profile: the run resumes after step 6, and --profile begins with step 6" in printed
    assert refused not in printed
    assert newest_trace(tmp_path / "run").name == "steps_2-3"


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tiny_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, stop_after=2))
    train(config, tmp_path / "run")
    (tmp_path / "run" / "profile").write_text("a file")
    assert train(tiny_config, tmp_path / "run", profile="4:6")["reason"] == "finished"
    assert "no profile: " in capsys.readouterr().out


def test_an_error_in_the_range_ends_the_trace_with_it(tiny_config, tmp_path):
    """The trace has the steps before the error, and the next run can trace."""

    def fail_at_five(step):
        calls = itertools.count(1)

        def call(*arguments):
            if next(calls) == 5:
                raise RuntimeError("the fifth")
            return step(*arguments)

        return call

    with pytest.raises(RuntimeError, match="the fifth"):
        train(tiny_config, tmp_path / "run", profile="3:9", hooks=QUICK._replace(wrap_step=fail_at_five))
    assert newest_trace(tmp_path / "run").name == "steps_3-4"
    train(tiny_config, tmp_path / "run2", profile="3:4")
    assert newest_trace(tmp_path / "run2").name == "steps_3-3"


BAD = [
    ("10", "is not a range: write START:STOP"),
    ("a:b", "is not a range: write START:STOP"),
    ("1:2:3", "is not a range: write START:STOP"),
    ("-1:3", "is not a range: write START:STOP"),
    ("0:3", "starts before step 1: steps are counted from 1"),
    ("4:4", "is empty: it means START to STOP - 1"),
    ("5:4", "is empty: it means START to STOP - 1"),
    ("12:14", r"ends after the last step 12 \(train\.steps\): give a range up to 13"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_ranges_are_refused_before_anything_is_made(text, message, tiny_config, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        parse_profile(text, tiny_config.train)
    file = tmp_path / "tiny.json"
    file.write_text(to_json(tiny_config))
    assert main(["train", str(file), "--run-dir", str(tmp_path / "run"), f"--profile={text}"]) == 2
    assert "error: --profile" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_range_is_without_its_end():
    config = TrainConfig(steps=12, stop_after=6)
    assert list(parse_profile("5:7", config)) == [5, 6]
    assert not parse_profile(None, config)
    with pytest.raises(ValueError, match=r"last step 6 \(train\.stop_after\)"):
        parse_profile("5:8", config)


HLO = """HloModule jit_train_step, is_scheduled=true

%fused_computation (param: f32[4]) -> f32[4] {
  %param = f32[4]{0} parameter(0)
  %a = f32[4]{0} negate(%param), metadata={op_name="jit(train_step)/jvp(Transformer)/layers/Block/mlp/neg"}
  %b = f32[4]{0} negate(%a), metadata={op_name="jit(train_step)/transpose(jvp(Transformer))/Block/mlp/neg"}
  ROOT %c = f32[4]{0} negate(%b), metadata={op_name="jit(train_step)/optimizer/neg"}
}

ENTRY %main (head.1: f32[4]) -> f32[4] {
  %head.1 = f32[4]{0} parameter(0), metadata={op_name="state.params['head']"}
  %fusion = f32[4]{0} fusion(%head.1), kind=kLoop, calls=%fused_computation
  %dot.1 = f32[4]{0} negate(%fusion), metadata={op_name="jit(train_step)/transpose(jvp(head))/while/body/dot_general"}
  %att = f32[4]{0} negate(%dot.1), metadata={op_name="jit(train_step)/vmap(jvp(Transformer))/Block/attention/x/mul"}
  ROOT %last = f32[4]{0} negate(%att), metadata={op_name="jit(train_step)/square"}
}
"""


def test_scopes_are_read_from_the_compiled_program():
    """The innermost scope counts, without transformations; an unnamed fusion has its most frequent scope."""
    expected = {"a": "mlp", "b": "mlp", "c": "optimizer", "fusion": "mlp", "dot.1": "head", "att": "attention"}
    assert scopes_of(HLO) == expected


class Event(NamedTuple):
    name: str
    start_ns: float
    duration_ns: float = 0.0
    stats: Any = ()


class Line(NamedTuple):
    events: list


def op(name, start, duration, module="jit_train_step"):
    return Event(name, start, duration, [("hlo_op", name), ("hlo_module", module)])


def test_time_counts_for_the_innermost_span_and_for_the_scheduler_of_a_task():
    """A loop of 100 ns around a dot of 30 ns, which schedules 40 ns on a pool thread."""
    caller = Line(
        [
            Event("ThunkExecutor::Execute", 0, 1000),
            op("while", 100, 100),
            op("dot", 120, 30),
            Event("ThreadpoolListener::Record", 130, 0, [("_p", 7)]),
            op("eval", 300, 50, module="jit_eval_step"),
            Event("$Python", 0, 5000),
        ]
    )
    worker = Line(
        [
            Event("ThreadpoolListener::StartRegion", 140, 0, [("_c", "7")]),
            Event("ThreadpoolListener::StopRegion", 180),
            Event("ThreadpoolListener::StartRegion", 200, 0, [("_c", "8")]),  # scheduled by nobody that is known
            Event("ThreadpoolListener::StopRegion", 260),
        ]
    )
    lines = [read_line(line, "jit_train_step", False) for line in (caller, worker)]
    assert busy_times(lines) == {"while": 70, "dot": 30 + 40}


def test_a_device_names_its_operations_by_their_text():
    """Lines as in the `XLA Ops` of a TPU, written from the description of the format."""
    line = Line([Event("%fusion.1 = f32[8]{0} fusion(%a)", 0, 10), Event("%dot.2 = f32[8] dot(%b)", 20, 5)])
    assert busy_times([read_line(line, "jit_train_step", True)]) == {"fusion.1": 10, "dot.2": 5}
