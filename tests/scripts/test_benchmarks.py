"""The benchmarks run at tiny sizes, and docs/benchmarks.md equals the rendering of its records."""

import json
import os
import runpy
import sys

import pytest
from helpers import QUICK_XLA, ROOT, call

sys.path.insert(0, str(ROOT / "scripts"))

import bench_health
from benchmark import Table


def run(*command, **environment):
    flags = {"XLA_FLAGS": QUICK_XLA, "PYTHONPATH": str(ROOT), **environment}
    return call([sys.executable, *command], cwd=ROOT, env={**os.environ, **flags})


def run_here(monkeypatch, script, *arguments):
    """Runs a script in this process."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")


TINY = [
    *("--model.num-layers=1", "--model.num-heads=2", "--model.d-model=16", "--model.d-ff=32", "--model.max-seq-len=8"),
    *("--model.vocab-size=31", "--train.seq-len=8", "--train.batch-size=2", "--train.accumulate=1"),
    *("--train.precision=float32", "--mesh.data=1", "--steps=2", "--rounds=2"),
]


def test_the_train_step_is_timed_and_recorded(tmp_path, monkeypatch):
    record = tmp_path / "train.json"
    run_here(monkeypatch, "bench_train.py", str(ROOT / "configs/gpt2_124m.py"), *TINY, "--json", str(record))
    made = json.loads(record.read_text())
    (table,) = made["tables"]
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert row[""] == "jaxtrain"
    assert row["tokens/s"] == pytest.approx(16 / (row["ms, median"] / 1e3))
    assert [len(seconds) for seconds in made["rounds"]["jaxtrain"]] == [2, 2]
    assert made["versions"]["jax"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "torch", "--peer-python", "nowhere/python"], "error: no Python at nowhere/python: create one"),
        (["--peer", "torch", "--peer-python", sys.executable, "--model.logit-softcap=5"], "plain GPT-2 and Llama"),
        (["--model.num-heads=3"], "d_model 16 is not divisible by model.num_heads 3"),
    ],
)
def test_rejects_an_unusable_command(flags, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_here(monkeypatch, "bench_train.py", str(ROOT / "configs/gpt2_124m.py"), *TINY, *flags)


def test_a_plan_is_a_row_of_memory_and_collectives():
    """The exchange of the embedding is no traffic of weights; its blocking part does not count."""
    row_of = runpy.run_path(str(ROOT / "scripts/bench_plans.py"))["row_of"]
    moved = [("all-gather", 3e9, 1e9), ("all-gather", 1e9, 0), ("reduce-scatter", 2e9, 0), ("all-to-all", 9e9, 9e9)]
    keys = ("kind", "bytes", "blocking_bytes")
    found = {"argument_bytes_per_device": 5e9, "temporary_bytes_per_device": 6e9, "warning": None}
    found |= {"mesh": {"data": 1, "fsdp": 8}, "collectives": [dict(zip(keys, one, strict=True)) for one in moved]}
    assert row_of("h100:8", found) == ["h100:8", "fsdp 8", 5.0, 6.0, 4.0, 2.0, 0.0, 1.0, "no"]
    assert row_of("h100:8", found | {"warning": "replaced"})[-1] == "yes"


def test_a_plan_is_compared_with_the_real_program():
    compare = runpy.run_path(str(ROOT / "scripts/bench_plans.py"))["compare"]
    sizes = {f"{name}_bytes_per_device": size for name, size in (("argument", 4e9), ("temporary", 6e9), ("peak", 10e9))}
    planned = sizes | {"kernels": {"__triton_gemm": 3}}
    ran = sizes | {"temporary_bytes_per_device": 8e9, "peak_in_use": 12.5e9, "kernels": {"__cublas$gemm": 2}}
    memory, kernels = compare("h200:1", planned, ran)
    assert memory.rows[1] == ["temporaries", 6.0, 8.0, 0.75]
    assert memory.rows[3] == ["peak in use, measured", 10.0, 12.5, 0.8]
    assert kernels.rows == [["__cublas$gemm", 0, 2], ["__triton_gemm", 3, 0]]


def test_the_loss_head_is_timed(tmp_path, monkeypatch):
    record = tmp_path / "loss.json"
    sizes = ["--return-memory", "--tokens=64", "--vocab", "40", "--d-model=8", "--chunk-size", "16", "--repeats=1"]
    run_here(monkeypatch, "bench_loss.py", *sizes, "--json", str(record))
    assert [row[0] for row in json.loads(record.read_text())["tables"][0]["rows"]] == ["dense", "optax", "chunk 16"]


def test_prepare_is_timed_and_loses_no_document(tmp_path):
    record = tmp_path / "prepare.json"
    done = run("scripts/bench_prepare.py", "--gigabytes=0.0003", "--tokenizers", "byte", "--json", str(record))
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(record.read_text())["tables"]
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert (row["lost"], row["same"]) == (0, "yes")
    assert row["peak GB"] > 0.02


def test_compiled_forms_are_compared_by_part():
    tabulate = runpy.run_path(str(ROOT / "scripts/bench_compiled.py"))["tabulate"]
    head, copies = ({"part": part, "cycles": 2_000_000, "bytes": 3 * 10**9} for part in ("head", "copies"))
    forms = {
        "before": {"temporary_bytes": 5 * 10**9, "parameters": 10**9, "costs": [head, copies]},
        "after": {"temporary_bytes": 4 * 10**9, "parameters": 10**9, "costs": [head]},
    }
    table = tabulate("Compiled step", forms)
    assert list(table.columns) == ["", "before: Mcycles", "before: GB", "after: Mcycles", "after: GB"]
    assert table.rows == [
        ["head", 2.0, 3.0, 2.0, 3.0],
        ["copies", 2.0, 3.0, 0.0, 0.0],
        ["total", 4.0, 6.0, 2.0, 3.0],
        ["temporaries", None, 5.0, None, 4.0],
        ["bytes per parameter", None, 6.0, None, 3.0],
    ]


def test_operations_are_compared_by_kind_of_work():
    names = runpy.run_path(str(ROOT / "scripts/bench_operations.py"))
    operators = {"aten::addmm": 4.0, "aten::mm": 3.0, "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 2.0}
    operators |= {"aten::_fused_adamw_": 1.0, "aten::linalg_vector_norm": 1.0, "aten::copy_": 0.5, "## Call Fx": 8.0}
    peer = names["by_kind_of_peer"](operators)
    assert [peer[kind] for kind in names["KINDS"]] == [7.0, 2.0, 2.0, 8.0, 0.5]
    Times, Counter = names["Times"], names["Counter"]
    ours = Counter({"matrix products": 6.0, "attention": 3.0, "its products": 2.0})
    waiting = Counter({"attention": 1.5, "between operations": 0.5})
    table = names["comparison"](
        Times({}, ours, Counter(), waiting, 11.0, 10.0), Times({}, peer, *2 * ({},), 19.5, 19.0)
    )
    rows = {name: numbers for name, *numbers in table.rows}
    assert rows["attention"] == [3.0, 1.5, 2.0, 2.5]
    assert rows["its products"] == [2.0, 0.0, None, None]
    assert rows["between operations"] == [None, 0.5, 0.0, 0.5]
    assert rows["step without it"] == [10.0, None, 19.0, -9.0]
    assert [note.partition(": every")[0] for note in table.notes[1:]] == [
        "Slower by 2.5 ms, attention, 1.5 of them waiting",
        "Without waiting the step would take 8.0 ms.",
    ]


def test_an_idle_core_waits_for_the_operations_that_run():
    """Of two cores: `a` runs alone from 10 to 30, beside `b` to 40, `b` alone to 50, later `c` on three threads."""
    names = runpy.run_path(str(ROOT / "scripts/bench_operations.py"))
    parts = [(10, 40, "a"), (30, 50, "b"), *3 * [(60, 70, "c")]]
    waiting = names["waiting_times"](parts, 2)
    assert waiting == {"a": 20, "b": 10, "between operations": 2 * 10}
    table = names["table_of"]("ours", "all threads", {"a": 30.0, "b": 20.0, "c": 30.0}, 2, waiting)
    assert list(table.columns) == ["operation", "ms / step", "share", "a core idle, ms"]
    assert table.rows == [["a", 30, 0.375, 20], ["c", 30, 0.375, 0], ["others", 20, 0.25, 10], ["total", 80, 1, 30]]


def test_the_compiled_step_needs_the_compiler():
    command = "import sys, runpy, importlib.util as u; f = u.find_spec; sys.argv = sys.argv[1:]; "
    command += "u.find_spec = lambda name, *rest: None if name == 'libtpu' else f(name, *rest); "
    command += "sys.path.insert(0, 'scripts'); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run("-c", command, "scripts/bench_compiled.py", "configs/gpt2_124m.py", "--topology", "v5e:2x2")
    assert (done.returncode, done.stderr) == (1, 'error: no TPU compiler: pip install -e ".[plan]"\n')


@pytest.mark.slow  # the next test scores given findings
def test_health_rules_are_scored_on_real_runs(tmp_path):
    record = tmp_path / "health.json"
    runs = ["--only", "no label counts", "--steps=16", "--sources", "jaxtrain/fields.py"]
    done = run("scripts/bench_health.py", *runs, "--json", str(record))
    assert done.returncode == 0, done.stderr
    halves, rules, _ = json.loads(record.read_text())["tables"]
    assert halves["rows"] == [["tuning", 0, 0, 1, 1, 1.0, 1.0], ["report", 0, 0, 0, 0, None, None]]
    assert rules["rows"] == [["no_progress", 1, 1, 0]]


def test_a_false_alarm_costs_precision_and_a_miss_recall():
    healthy, sick, missed = bench_health.HEALTHY[0], bench_health.SICK[0], bench_health.SICK[-2]
    judged = [(healthy, ["label_leak"]), (healthy, []), (sick, [*sick.expected, "no_progress"]), (missed, [])]
    assert bench_health.tables(judged)[0].rows[0] == ["tuning", 2, 1, 2, 1, 1 / 3, 0.5]
    counts = bench_health.score(judged)
    assert [counts[name] for name in ("loss_rising", "label_leak", missed.expected[0])] == [
        (1, 1, 0),
        (0, 0, 1),
        (1, 0, 0),
    ]


def test_monitoring_has_the_figures_of_the_record():
    table = Table(**json.loads((ROOT / "docs/benchmarks/health.json").read_text())["tables"][0])
    rows = table.markdown().splitlines()[2:6]
    assert "\n".join(rows) in (ROOT / "docs/monitoring.md").read_text(), "copy the table of docs/benchmarks/health.json"


def test_a_table_is_text_and_markdown():
    columns = {"form": "", "ms": ".1f", "ratio": ".2f"}
    table = Table("Speed", columns, [["ours", 1.25, None], ["peer", 10, 8.0]], ["Note."])
    lines = ["", "Speed", "form    ms  ratio", "ours   1.2      -", "peer  10.0   8.00", "Note."]
    assert table.text().splitlines() == lines
    assert table.markdown().splitlines() == [
        *("**Speed**", "", "| form | ms | ratio |", "| --- | ---: | ---: |"),
        *("| ours | 1.2 | - |", "| peer | 10.0 | 8.00 |", "", "Note."),
    ]


def test_the_page_equals_the_rendering_of_its_records():
    render = runpy.run_path(str(ROOT / "scripts/bench_all"))["render"]
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert render(ROOT / "docs/benchmarks") == page, "run scripts/bench_all and commit the page"
    assert "jaxtrain is faster by" in page


def test_no_records_are_an_error(tmp_path):
    done = run("scripts/bench_all", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no JSON records in {tmp_path}")
