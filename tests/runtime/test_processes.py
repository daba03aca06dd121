"""Several processes are one run: the same numbers, one record, and whoever disagrees or is missing is named.

Real processes of two simulated devices each, joined by gloo over the loopback; one process with four devices is what
they are compared with.
"""

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import LIMIT, wait_until
from process_helpers import Processes
from runs import QUICK, Faults, train

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import verify
from jaxtrain.checkpoints.restore import restore
from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import to_json
from jaxtrain.training.run import open_run

FAULTS = Faults(nan_micro_batch_step=5)  # one bad row, on a device of one process


FAULTY = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from runs import Faults, train
from jaxtrain.runtime.cluster import session
from jaxtrain.runtime.config_files import load_config
from jaxtrain.runtime.terminal import report_error

with session(report_error):
    train(load_config(sys.argv[1]), sys.argv[2], faults={FAULTS!r}, report=True)
"""


def train_command(config, run_dir, *, faulty=False):
    file = run_dir.parent / f"{run_dir.name}-{abs(hash(config))}.json"
    file.write_text(to_json(config))
    return ["-c", FAULTY, file, run_dir] if faulty else ["-m", "jaxtrain.cli", "train", file, "--run-dir", run_dir]


def train_in_two(config, run_dir):
    codes, outputs, errors = Processes(*[train_command(config, run_dir, faulty=True)] * 2).wait()
    assert codes == [0, 0], "\n".join(errors)
    return outputs


def changed(config, part, **fields):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


@pytest.fixture(scope="module")
def config(store):
    """Eight steps on four devices, with an evaluation on the way."""
    return Config(
        data=DataConfig(store=str(store)),
        model=llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=16),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=3),
        train=TrainConfig(steps=8, batch_size=8, seq_len=16, log_every=1, eval_every=4, eval_batches=2),
        mesh=MeshConfig(data=4),
        checkpoint=CheckpointConfig(every=3),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The undisturbed run of one process with four devices."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder, faults=FAULTS, report=True)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")[0] if line["skipped"]] == [5]
    return folder


def assert_same_run(folder, expected):
    """Compares decisions and numbers with another run, up to the order of float32 sums."""
    (lines, events), (other_lines, other_events) = (read_metrics(f / "metrics.jsonl") for f in (folder, expected))
    assert [line["step"] for line in lines] == [line["step"] for line in other_lines]
    for line, other in zip(lines, other_lines, strict=True):
        assert (line["skipped"], line["skip_reason"]) == (other["skipped"], other["skip_reason"])
        for key in ("loss", "nll", "grad_norm", "clip_factor", "update_norm", "param_norm", "tokens", "learning_rate"):
            np.testing.assert_allclose(line[key], other[key], rtol=1e-6, err_msg=f"{key} of step {line['step']}")
    evaluations = [
        {event["step"]: event for event in each if event["event"] == "eval"} for each in (events, other_events)
    ]
    assert evaluations[0].keys() == evaluations[1].keys()
    for step, other in evaluations[1].items():
        np.testing.assert_allclose(evaluations[0][step]["nll"], other["nll"], rtol=1e-6)
    states = []
    for each in (folder, expected):
        run = open_run(each, QUICK)
        states.append(restore(CheckpointFolder(each / "checkpoints"), run.program.abstract_state)[0])
    for leaf, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-6)


def test_two_processes_are_one_run_with_one_record(config, whole, tmp_path):
    """A whole run with every matrix sharded over the devices of both processes."""
    config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
    config = changed(config, "train", sample_tokens=4, sample_prompt="1 +")
    outputs = train_in_two(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    # Line for line, so that nothing is there twice; and the other process is quiet.
    (lines, events), (other_lines, other_events) = (
        read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", whole)
    )
    raw = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(raw) == len(lines) + len(events) == len(other_lines) + len(other_events)
    assert events[0]["processes"] == 2
    assert "step 8/8" in outputs[0]
    assert not re.search("step|jaxtrain|decay|validation", outputs[1])  # gloo's own lines are there
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {*("config.json", "metrics.jsonl", "checkpoints", "report.html", "sample.txt", "tokenizer.json")}
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("1 +")
    saved = tmp_path / "run" / "checkpoints" / "8" / "params"
    assert {path.name for path in saved.iterdir()} >= {"ocdbt.process_0", "ocdbt.process_1"}
    for step in ("3", "6", "8"):
        verify(saved.parents[1] / step)
    hashed = [event["bytes_hashed"] for event in events if event["event"] == "saved"]
    assert hashed
    assert all(len(each) == 2 and min(each) > 0 for each in hashed)


@pytest.mark.slow
def test_the_command_evaluates_on_two_processes(whole):
    """Its quick siblings are the evaluations of the run above, and the command on one process in test_load.py."""
    codes, outputs, errors = Processes(*[["-m", "jaxtrain.cli", "eval", whole, "--json"]] * 2).wait()
    assert codes == [0, 0], errors
    (measured,), () = ([line for line in output.splitlines() if line.startswith("{")] for output in outputs)
    expected = read_metrics(whole / "metrics.jsonl")[1][-1]["evaluation"]["nll"]
    assert json.loads(measured)["nll"] == pytest.approx(expected, rel=1e-6)  # the command adds up each position


@pytest.mark.slow
def test_a_run_resumes_on_two_processes_and_on_one_again(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for step in ("6", "8"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    train_in_two(changed(config, "train", stop_after=6), tmp_path / "run")
    train(config, tmp_path / "run", faults=FAULTS)
    assert_same_run(tmp_path / "run", whole)
    lines, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["attempt"] for line in lines] == [1] * 3 + [2] * 3 + [3] * 2
    resumed = [(event["step"], event["processes"]) for event in events if event["event"] == "resume"]
    assert resumed == [(3, 2), (6, 1)]


def test_a_signal_to_one_stops_both_after_the_same_step(config, tmp_path):
    config = changed(config, "train", steps=100_000, eval_every=None)  # too many to end before the signal
    run_dir = tmp_path / "run"
    both = Processes(*[train_command(config, run_dir)] * 2)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and read_metrics(metrics)[0], *both.processes)
    both.processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = both.wait()
    assert codes == [128 + signal.SIGTERM] * 2, errors
    stop = read_metrics(metrics)[1][-1]
    assert (stop["event"], stop["reason"]) == ("stop", "SIGTERM")
    assert read_metrics(metrics)[0][-1]["step"] == stop["step"]
    newest = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert newest == stop["step"]


@pytest.mark.slow
def test_process_0_finds_the_damaged_checkpoint_and_all_go_back(config, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "8")
    file = max((run_dir / "checkpoints" / "6" / "rest").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    outputs = train_in_two(config, run_dir)
    assert "checkpoint 6 is damaged: rest/" in outputs[0]
    assert "damaged" not in outputs[1]
    _, events = read_metrics(run_dir / "metrics.jsonl")
    assert [event["step"] for event in events if event["event"] == "resume"] == [3]
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"3", "6", "6.damaged", "8"}
    assert_same_run(run_dir, whole)


@pytest.mark.slow
def test_a_save_that_fails_ends_all_processes(config, tmp_path):
    """Process 0 alone writes the manifest, and the other process receives its error."""
    run_dir = tmp_path / "run"
    (tmp_path / "script.py").write_text(
        "import functools, sys\n"
        "from jaxtrain.checkpoints.save import Saver\n"
        "from jaxtrain.runtime.cluster import session\n"
        "from jaxtrain.runtime.config_files import load_config\n"
        "from jaxtrain.runtime.terminal import report_error\n"
        "from jaxtrain.training.run import Hooks\n"
        "from jaxtrain.training.train import train\n"
        "def full(stage):\n"
        "    if stage == 'unsealed': raise OSError(28, 'No space left on device')\n"
        "with session(report_error):\n"
        "    hooks = Hooks(make_saver=functools.partial(Saver, on_stage=full))\n"
        "    train(load_config(sys.argv[1]), sys.argv[2], hooks=hooks)\n"
    )
    (tmp_path / "config.json").write_text(to_json(config))
    command = [tmp_path / "script.py", tmp_path / "config.json", run_dir]
    codes, _, errors = Processes(*[command] * 2).wait()
    assert codes[0] == 1
    assert codes[1] != 0
    assert "the checkpoint of step 3 could not be saved: [Errno 28] No space left on device" in errors[0]
    assert CheckpointFolder(run_dir / "checkpoints").steps() == []


def test_processes_that_disagree_on_the_config_say_where(config, tmp_path):
    commands = [train_command(c, tmp_path / "run") for c in (config, changed(config, "train", batch_size=16))]
    codes, _, errors = Processes(*commands).wait()
    assert codes == [2, 2], errors
    for error in errors:
        assert "train.batch_size: process 0 says 8, process 1 says 16" in error
        assert error.count("says") == 2  # nothing else differs
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_processes_that_disagree_on_the_step_to_restore_name_it(config, whole, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(whole, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "8")  # else the run is finished
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "6")
    codes, _, errors = Processes(*[train_command(config, tmp_path / name) for name in ("a", "b")]).wait()
    assert codes == [2, 2], errors
    assert all("newest step: process 0 says 6, process 1 says 3" in error for error in errors)


@pytest.mark.slow
def test_a_run_directory_that_is_not_shared_is_an_error(config, tmp_path):
    codes, _, errors = Processes(*[train_command(config, tmp_path / name) for name in ("a", "b")]).wait()
    assert codes == [2, 2], errors
    assert all('process 0 says "exists", process 1 says "is missing"' in error for error in errors)
    assert all("file system that they share" in error for error in errors)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_named(config, tmp_path, rank):
    codes, _, (error,) = Processes(train_command(config, tmp_path / "run"), ranks=[rank], timeout=2).wait()
    assert codes == [2]
    expected = {0: "did not come within 2 s: process 1;", 1: "process 0 is missing"}
    assert expected[rank] in error
    assert "Traceback" not in error


SCRIPT = """
import sys, time
from jaxtrain.runtime import cluster, processes

def report(error):
    print(f"error: {error}", file=sys.stderr)
    return 2

def body(rank):
    if what == "fails" and rank == 1:
        raise ValueError("the disk is full")
    if what == "sleeps" and rank == 1:
        time.sleep(1000)
    if what == "lead":
        assert processes.run_on_lead("think", lambda: 7) == (7 if rank == 0 else None)
        assert processes.broadcast_from_lead("think", lambda: [7, rank]) == [7, 0]
        processes.run_on_lead("think again", lambda: {}["nothing"])
    processes.agree("a number", {"a": {"b": 1}, "c": [1, 2]})

what = sys.argv[1]
with cluster.session(report):
    from jax._src.distributed import global_state
    body(global_state.process_id)
"""


def test_a_process_that_fails_alone_ends_the_others_with_its_words(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    codes, _, errors = Processes(*[[tmp_path / "script.py", "fails"]] * 2, timeout=200).wait()
    assert codes[0] != 0
    assert codes[1] != 0
    assert "process 1 failed: the disk is full" in errors[0]
    assert "the disk is full" in errors[1]


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_does_not_hold_the_others(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    both = Processes(*[[tmp_path / "script.py", "sleeps"]] * 2, timeout=2)
    _, error = both.processes[0].communicate(timeout=LIMIT)
    assert both.processes[0].returncode == 2
    assert "process 1 did not agree on a number within 2 s" in error
    codes, *_ = both.wait()
    assert codes[1] != 0  # the coordinator has gone


def test_an_error_on_the_lead_is_an_error_everywhere(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    codes, _, errors = Processes(*[[tmp_path / "script.py", "lead"]] * 2).wait()
    assert 0 not in codes
    assert "KeyError: 'nothing'" in errors[0]
    assert "ValueError: 'nothing'" in errors[1]


RUN = """
import os, signal, sys, time
import absl.logging
from jaxtrain.runtime.cluster import session
from jaxtrain.runtime.config_files import load_config
from jaxtrain.runtime.terminal import report_error
from jaxtrain.training.run import Hooks
from jaxtrain.training.train import train

_, config, run_dir, what, rank = sys.argv
absl.logging.set_verbosity(absl.logging.FATAL) # as the command line does

def wrap(train_step):
    count = 0
    def wrapped(state, batch):
        nonlocal count
        count += 1
        if count == 6 and os.environ["JAX_PROCESS_ID"] == rank:
            if what == "hangs":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, batch)
    return wrapped

with session(report_error):
    train(load_config(config), run_dir, hooks=Hooks(wrap_step=wrap, write_report=str))
"""


def run_script(config, tmp_path, *, timeout, **what):
    """Starts two processes; `hangs=1` says what happens to process 1 in its sixth step."""
    (tmp_path / "script.py").write_text(RUN)
    (tmp_path / "config.json").write_text(to_json(config))
    ((verb, rank),) = what.items()
    words = [tmp_path / "script.py", tmp_path / "config.json", tmp_path / "run", verb, rank]
    return Processes(*[words] * 2, timeout=timeout)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_hangs_ends_all_with_their_stacks_and_a_code_to_start_again(config, tmp_path, rank):
    """Its quick sibling with one process is in test_watchdog.py."""
    config = changed(config, "train", stall_minutes=0.05, eval_every=None)
    codes, _, errors = run_script(config, tmp_path, timeout=20, hangs=rank).wait()
    assert codes == [75, 75], errors
    for error in errors:
        assert f": process {rank} is behind, with step 5 launched, others with 6;" in error
        assert "Thread 0x" in error
        assert "Traceback" not in error
    assert "in wrapped" in errors[rank]
    assert "in wrapped" not in errors[1 - rank]
    (stalled,) = [event for event in read_metrics(tmp_path / "run" / "metrics.jsonl")[1] if event["event"] == "stalled"]
    assert f"process {rank} is behind" in stalled["problem"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_survivor_of_a_killed_process_names_it_in_one_line(config, tmp_path, rank):
    """Its quick siblings are in test_peers.py."""
    config = changed(config, "train", steps=1000, eval_every=None)
    both = run_script(config, tmp_path, timeout=200, killed=rank)
    both.processes[rank].communicate(timeout=LIMIT)
    _, error = both.processes[1 - rank].communicate(timeout=30)
    assert both.processes[1 - rank].returncode == 75
    assert error == (
        f"error: process {rank} is lost: it was killed, or its host is down; see its log; the same command resumes "
        "the run\n"
    )


@pytest.mark.slow
def test_two_runs_of_one_interpreter_save_the_same_steps(config, tmp_path):
    """The names of their messages differ; the store refuses a name that was used before."""
    file = tmp_path / "config.json"
    file.write_text(to_json(changed(config, "train", steps=4, eval_every=None)))
    script = (
        FAULTY.replace(f", faults={FAULTS!r}, report=True", "") + "    train(load_config(sys.argv[1]), sys.argv[3])\n"
    )
    codes, _, errors = Processes(*[["-c", script, file, tmp_path / "a", tmp_path / "b"]] * 2).wait()
    assert codes == [0, 0], errors
    assert [CheckpointFolder(tmp_path / name / "checkpoints").steps() for name in "ab"] == [[3, 4]] * 2
