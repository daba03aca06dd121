"""Drills: a run that is killed, stopped or out of disk space at any moment resumes as if nothing had happened.

The slow drills are real processes and real signals: a driver kills the process, or sends it a signal, at a named
moment. Each has a quick sibling: a crash at each stage of a save in test_save.py, a signal during a save here.
"""

import dataclasses
import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import absl.logging
import jax
import numpy as np
import pytest
from drill_helpers import GRACE, Command, assert_undisturbed, evaluations, events, numbers, with_fields
from helpers import LIMIT
from runs import QUICK, train

from jaxtrain import cli
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore, restore_params
from jaxtrain.checkpoints.save import STAGES, Saver
from jaxtrain.config import CheckpointConfig
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import to_json
from jaxtrain.runtime.terminal import report_error
from jaxtrain.training.run import open_run
from jaxtrain.training.run_folder import run_lock


@pytest.fixture(scope="module")
def config(tiny_config):
    config = with_fields(tiny_config, "train", steps=20, eval_every=7, eval_batches=2, sample_tokens=4)
    return dataclasses.replace(config, checkpoint=CheckpointConfig(every=2, keep=2))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder)
    return folder


@pytest.mark.slow
def test_kill_9_at_every_point_of_a_save(config, whole, tmp_path):
    """Each attempt is killed at its second save; listed checkpoints are whole, and the next start deletes leftovers."""
    command = Command(config, tmp_path)
    checkpoints = CheckpointFolder(command.run_dir / "checkpoints")
    newest = 0
    for point in STAGES:
        code, errors = command("kill", point)
        assert code == -signal.SIGKILL, errors
        before, newest = newest, checkpoints.latest_step()
        # The first save of an attempt is there, and the second if it was renamed.
        assert newest == before + (4 if point == "committed" else 2)
        litter = [path.name for path in checkpoints.path.iterdir() if path.name.startswith(".")]
        wanted = {"begin": 0, "committed": 0}.get(point, 1)
        assert len(litter) == wanted, litter
        if litter:
            name = rf"\.{newest + 2}\.partial.*" if point != "deleting" else rf"\.{newest - 4}\.deleting"
            assert re.fullmatch(name, litter[0])
            assert (checkpoints.path / litter[0] / "manifest.json").exists() == (point == "sealed")
    code, errors = command()
    assert code == 0, errors
    assert [event["step"] for event in events(command.run_dir, "resume")] == [2, 4, 6, 8, 12, 14]
    assert_undisturbed(command.run_dir, whole)


@pytest.mark.slow
def test_sigterm_at_any_moment(config, whole, tmp_path):
    """Stops before the first step, in an evaluation, in a save, in the last evaluation, in the sample, and twice."""
    command = Command(config, tmp_path)
    checkpoints = CheckpointFolder(command.run_dir / "checkpoints")

    def stopped_at(what, where, step, *flags):
        begin = time.monotonic()
        code, errors = command(what, where, *flags)
        assert time.monotonic() - begin < GRACE
        assert code == 128 + signal.SIGTERM, errors
        last = read_metrics(command.run_dir / "metrics.jsonl")[1][-1]
        assert (last["event"], last["reason"], last["step"]) == ("stop", "SIGTERM", step)
        assert (checkpoints.latest_step() or 0) == step

    stopped_at("stuck", "global_batch", 0)  # the first batch, whose shapes the compiler needs
    assert numbers(command.run_dir) == []
    stopped_at("stuck", "evaluate_sources", 7)  # the last step that was done, though no step to save
    assert evaluations(command.run_dir) == {}  # no result of a part of the split
    stopped_at("stuck", "restore", 7)
    code, errors = command("terminate", "unsealed")  # in the save of step 8
    assert code == 128 + signal.SIGTERM, errors
    stopped = events(command.run_dir, "stop")[-1]["step"]
    assert stopped == checkpoints.latest_step() >= 8
    assert command("terminate twice", "unsealed")[0] == -signal.SIGTERM
    assert checkpoints.latest_step() == stopped
    stopped_at("stuck", "continue_text", 20)
    stopped_at("stuck", "evaluate_sources", 20)
    code, errors = command()
    assert code == 0, errors
    assert_undisturbed(command.run_dir, whole)


def test_sigterm_during_a_save_lets_it_end(config, whole, tmp_path):
    """Quick sibling of the drill, in this process: the run resumes with the same bits."""
    turns = []

    def terminate(stage):
        turns.append(stage)
        if stage == "unsealed" and turns.count(stage) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hooks = QUICK._replace(make_saver=functools.partial(Saver, on_stage=terminate))
    outcome = train(config, tmp_path / "run", hooks=hooks)
    assert outcome["reason"] == "SIGTERM"
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").latest_step() == outcome["step"]
    assert outcome["step"] < 20
    train(config, tmp_path / "run")
    assert_undisturbed(tmp_path / "run", whole)


def test_a_damaged_checkpoint_costs_one_interval(config, whole, tmp_path, capsys):
    """Damage is printed and recorded; the step is saved again."""
    command = Command(with_fields(config, "train", stop_after=9), tmp_path)
    train(with_fields(config, "train", stop_after=9), command.run_dir)
    file = max((command.run_dir / "checkpoints" / "9" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"nonsense")
    assert cli.main(["eval", str(command.run_dir), "--json"]) == 0
    shown = capsys.readouterr()
    assert '"step": 8' in shown.out
    said = rf"checkpoint 9 is damaged: params/.*{file.name} has 8 bytes, its manifest says \d+; going back to step 8"
    assert re.search(said, shown.err)
    assert (command.run_dir / "checkpoints" / "9").exists()
    assert cli.main(["eval", str(command.run_dir), "--step", "9"]) == 2
    assert "checkpoint 9 is damaged" in capsys.readouterr().err
    train(config, command.run_dir)
    assert re.search(said, capsys.readouterr().out.replace("\n", " "))
    (event,) = events(command.run_dir, "checkpoint_damaged")
    assert (event["step"], event["back_to"]) == (9, 8)
    assert (command.run_dir / "checkpoints" / "9.damaged").exists()
    assert_undisturbed(command.run_dir, whole)


class FullDisk:
    """`on_stage` of a Saver: the disk is full at the last stage of each save whose turn is in `fails`."""

    def __init__(self, fails):
        self.fails, self.turn = fails, 0

    def __call__(self, stage):
        self.turn += stage == "unsealed"
        if stage == "unsealed" and self.turn in self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_the_next_save_is_the_retry_of_a_failed_one(config, whole, tmp_path):
    """A run survives any number of failed saves that are not consecutive."""
    hooks = QUICK._replace(make_saver=functools.partial(Saver, on_stage=FullDisk({1, 3, 5})))
    train(config, tmp_path / "run", hooks=hooks)
    failed = events(tmp_path / "run", "save_failed")
    assert [event["step"] for event in failed] == [2, 6, 10]
    assert all("No space left" in event["problem"] for event in failed)
    assert_undisturbed(tmp_path / "run", whole)


def test_a_lost_config_is_read_from_the_newest_whole_checkpoint(config, whole, tmp_path, capsys):
    """A power cut may leave config.json empty or torn; the run still refuses another config, and resumes."""
    run_dir = shutil.copytree(whole, tmp_path / "run")
    (run_dir / "checkpoints" / "20" / "record" / "metadata").write_bytes(b"torn")
    other_types = {**json.loads((run_dir / "config.json").read_bytes()), "seed": "0", "data": [], "\ud800": 1}
    torn = (None, b"", b"{", bytes(100), b"[" * 200_000, b"{}", json.dumps(other_types).encode(), os.mkfifo, Path.mkdir)
    for content in torn:
        file = run_dir / "config.json"
        file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
        if content is not None:
            content(file) if callable(content) else file.write_bytes(content)
        with pytest.raises(ValueError, match="seed: 0 -> 1"):
            train(dataclasses.replace(config, seed=1), run_dir)
        assert "config.json was lost: restored from the checkpoint of step 18" in capsys.readouterr().err
        if content is not None:
            aside = run_dir / "config.json.damaged"
            assert callable(content) or aside.read_bytes() == content
            aside.rmdir() if aside.is_dir() else aside.unlink()
    (run_dir / "config.json").unlink(missing_ok=True)
    (run_dir / "config.json").write_bytes(b"{")
    assert open_run(run_dir, QUICK).config.seed == config.seed  # eval, generate and replay read the same config
    assert "config.json is lost: reading the config in the checkpoint of step 18" in capsys.readouterr().err
    assert (run_dir / "config.json").read_bytes() == b"{"  # and write nothing
    assert cli.main(["report", str(run_dir)]) == 0
    assert "config.json was lost: restored from the checkpoint of step 18" in capsys.readouterr().err
    assert train(config, run_dir)["reason"] == "finished"
    assert_undisturbed(run_dir, whole)


def test_two_failed_saves_in_a_row_end_the_run(config, tmp_path):
    """The run ends soon with the reason; the completed steps are recorded, whatever the cause."""
    hooks = QUICK._replace(make_saver=functools.partial(Saver, on_stage=FullDisk({2, 3})))
    remedy = "step 6 could not be saved: .*free some space or fix the permissions, and start the run again"
    with pytest.raises(OSError, match=remedy) as error:
        train(config, tmp_path / "run", hooks=hooks)
    assert report_error(error.value) == 1
    assert [event["step"] for event in events(tmp_path / "run", "save_failed")] == [4, 6]
    assert events(tmp_path / "run", "stop") == []
    assert not (tmp_path / "run" / "lock").exists()


def test_tracebacks_of_orbax_appear_only_with_debug(config, tmp_path, caplog):
    """Returns the tracebacks of errors that the run reports in one line."""
    (tmp_path / "config.json").write_text(to_json(config))
    before = absl.logging.get_verbosity()
    try:
        for flags, shown in (([], []), (["--debug"], ["a traceback"])):
            absl.logging.set_verbosity(absl.logging.WARNING)  # absl's default, which an earlier command has changed
            assert cli.main(["schedule", str(tmp_path / "config.json"), *flags]) == 0
            absl.logging.error("a traceback")
            assert [record.message for record in caplog.records if record.name == "absl"] == shown
    finally:
        absl.logging.set_verbosity(before)


def test_two_runs_in_one_folder_are_refused(config, tmp_path, capsys):
    """A second process changes nothing; the lock file of a dead process locks nothing."""
    run_dir = tmp_path / "run"
    train(with_fields(config, "train", stop_after=2), run_dir)
    (tmp_path / "config.json").write_text(to_json(config))
    arguments = ["train", str(tmp_path / "config.json"), "--run-dir", str(run_dir)]
    with run_lock(run_dir):
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")}
        capsys.readouterr()
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"is being trained in by process {os.getpid()} on {os.uname().nodename}" in said
        assert "--run-dir" in said
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run_dir.rglob("*")} == before
        assert cli.main(["eval", str(run_dir)]) == 0  # reading is free
    assert not (run_dir / "lock").exists()
    with run_lock(run_dir):
        pass
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("")
    with pytest.raises(ValueError, match=r"no run directory, it holds mother\.txt"), run_lock(tmp_path / "letters"):
        pass
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["mother.txt"]


def test_a_rewind_undoes_later_steps(config, whole, tmp_path, capsys):
    """A rewind also removes the later steps from the metrics, and they are saved again."""
    run_dir = tmp_path / "run"
    config = with_fields(config, "checkpoint", keep=9)
    train(with_fields(config, "train", stop_after=11), run_dir)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"no checkpoint of step 5 .* there are \[2, 4, 6, 8, 10, 11\]"):
        train(config, run_dir, rewind=5)
    assert capsys.readouterr().out == ""  # it ends before the start is described
    damaged = run_dir / "checkpoints" / "4" / "record" / "metadata"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"checkpoint 4 is damaged: .*: try another step"):
        train(config, run_dir, rewind=4)
    assert CheckpointFolder(run_dir / "checkpoints").steps() == [2, 4, 6, 8, 10, 11]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(with_fields(config, "train", stop_after=7), run_dir, rewind=6)
    assert [line["step"] for line in numbers(run_dir)] == [1, 2, 3, 4, 5, 6, 7]
    (event,) = events(run_dir, "rewind")
    assert (event["step"], event["renamed"]) == (6, [8, 10, 11])
    folders = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert folders == {"2", "4", "6", "7", "8.rewound", "10.rewound", "11.rewound"}
    train(config, run_dir)
    assert {"8", "10"} <= {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert_undisturbed(run_dir, whole)


def test_init_from_takes_the_weights_alone(config, whole, tmp_path):
    """A warm start has a fresh optimizer and reads the data from the start."""
    source = f"{whole}/checkpoints/18"
    begun = with_fields(with_fields(config, "train", init_from=source, stop_after=1), "optim", peak_lr=2e-3)
    train(begun, tmp_path / "run")
    (event,) = events(tmp_path / "run", "start")
    assert (event["source"], event["source_step"]) == (source, 18)
    run = open_run(whole)
    params, _, _ = restore_params(CheckpointFolder(whole / "checkpoints"), run.program.abstract_state.params, 18)
    (first,) = numbers(tmp_path / "run")
    plain = with_fields(with_fields(config, "train", stop_after=1), "optim", peak_lr=2e-3)
    train(plain, tmp_path / "plain")
    assert first["tokens_seen"] == numbers(tmp_path / "plain")[0]["tokens_seen"]  # the data from their beginning
    assert first["nll"] < numbers(tmp_path / "plain")[0]["nll"] - 0.5  # and yet it knows something
    assert first["learning_rate"] == numbers(tmp_path / "plain")[0]["learning_rate"]
    after, _ = _state(tmp_path / "run")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.params, params)
    assert 0 < max(jax.tree.leaves(moved)) < 2 * first["learning_rate"]  # one step of a fresh Adam
    # A started run no longer needs the source, and keeps its initial weights.
    gone = with_fields(begun, "train", stop_after=2)
    with pytest.raises(ValueError, match=r"train\.init_from: .* -> None"):
        train(with_fields(gone, "train", init_from=None), tmp_path / "run")
    whole.rename(tmp_path / "elsewhere")
    try:
        assert train(gone, tmp_path / "run")["step"] == 2
    finally:
        (tmp_path / "elsewhere").rename(whole)


def _state(run_dir):
    run = open_run(run_dir)
    return restore(CheckpointFolder(run_dir / "checkpoints"), run.program.abstract_state)


def test_init_from_refuses_sources_that_do_not_fit(config, whole, corpus, tmp_path):
    """The error creates no run directory."""
    from jaxtrain.data.prepare.prepare import prepare

    pytest.importorskip("tokenizers")
    start = with_fields(config, "train", init_from=str(whole), stop_after=1)
    for source, message in (
        (tmp_path / "nowhere", "no such checkpoint, it has no checkpoint"),
        (whole / "checkpoints" / "3", r"no such checkpoint, its checkpoints are \[18, 20\]"),
        (tmp_path / "run", "the run's own folder: leave it out, or give another --run-dir"),
        (tmp_path / "run" / "checkpoints" / "3", "the run's own folder"),
    ):
        with pytest.raises(ValueError, match=message):
            train(with_fields(start, "train", init_from=str(source)), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"does not fit this run(.|\n)*params/"):
        train(with_fields(start, "model", d_ff=64), tmp_path / "wider")
    assert train(start, tmp_path / "wider")["step"] == 1  # it had not begun, so it may be mended
    prepare([str(corpus)], tmp_path / "store", tokenizer="bpe:257", validation_fraction=0.2, progress=False)
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        train(with_fields(start, "data", store=str(tmp_path / "store")), tmp_path / "tokens")


@pytest.mark.slow
def test_thirty_kills_at_random_times(config, tmp_path):
    """Kills at random moments: in the loop, in a save, at the start. Prints the figures."""
    every, kills = 5, 32
    config = with_fields(with_fields(config, "train", steps=300, eval_every=50), "checkpoint", every=every)
    train(config, tmp_path / "whole")
    command, chance = Command(config, tmp_path), random.Random(4)
    metrics, lost, longest, unsaved, starts = command.run_dir / "metrics.jsonl", 0, 0, 0, 0
    for _ in range(kills):
        begun = max((line["step"] for line in numbers(command.run_dir)), default=0) if metrics.exists() else 0
        process = command.start()
        if chance.random() < 0.2:
            time.sleep(chance.uniform(0.0, 5.0))  # most of that is Python's start and the compiler's work
        else:
            goal = begun + chance.randrange(1, 2 * every)
            deadline = time.monotonic() + LIMIT
            while time.monotonic() < deadline and process.poll() is None:
                if metrics.exists() and max((line["step"] for line in numbers(command.run_dir)), default=0) >= goal:
                    break
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.2))
        process.kill()
        process.communicate(timeout=LIMIT)
        assert process.returncode == -signal.SIGKILL  # it did not end before
        folder = command.run_dir / "checkpoints"
        done = max((line["step"] for line in numbers(command.run_dir)), default=0) if metrics.exists() else 0
        repeated = done - (CheckpointFolder(folder).latest_step() or 0)
        lost, longest = lost + repeated, max(longest, repeated)
        unsaved += bool(list(folder.glob(".*.partial*")))
    code, errors = command()
    assert code == 0, errors
    starts = events(command.run_dir, "start") + events(command.run_dir, "resume")
    print(
        f"{kills} kills, {len(starts)} starts that came as far as restoring, {lost} of {config.train.steps} steps "
        f"repeated, {longest} at most after one kill, {unsaved} saves cut short"
    )
    assert longest <= 2 * every  # one save at most is on its way
    assert_undisturbed(command.run_dir, tmp_path / "whole")
