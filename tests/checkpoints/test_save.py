"""Saves: complete or absent, in the background, and reported when they fail."""

import errno
import json
import os
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import FINGERPRINT, Events, abstract, assert_same, make_state, names
from helpers import wait_until

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.checkpoints.save import STAGES, Saver
from jaxtrain.runtime import stop


class Disk:
    """`on_stage` of a Saver: the disk is full at a stage of the saves whose turn is in `fails`."""

    def __init__(self, *fails, stage="unsealed"):
        self.fails, self.stage, self.turn = fails, stage, 0

    def __call__(self, stage):
        if stage == "begin":
            self.turn += 1
        if stage == self.stage and self.turn in self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_the_newest_stay_and_saving_a_step_again_is_harmless(tmp_path):
    with Saver(CheckpointFolder(tmp_path, keep=2)) as saver:
        assert [saver.begin(make_state(step), FINGERPRINT) for step in (1, 2, 3, 3)] == [True, True, True, False]
    assert names(tmp_path) == ["2", "3"]


def test_a_save_is_not_touched_by_the_steps_that_follow_it(tmp_path):
    """The next step reuses the memory of the state that is still being written."""
    state = make_state(0, w=jnp.zeros((1000, 1000)))
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    folder = CheckpointFolder(tmp_path)
    with Saver(folder) as saver:
        saver.begin(state, FINGERPRINT)
        for _ in range(5):
            state = step(state)
    restored, _ = restore(folder, abstract(state))
    assert_same(restored, jax.tree.map(jnp.asarray, expected))


def test_the_manifest_lists_every_leaf_and_file(three):
    manifest = json.loads((three / "2" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["step"]) == ("jaxtrain-checkpoint", 1, 2)
    assert manifest["leaves"]["params/w"] == {"shape": [2, 3], "dtype": "float32"}
    assert manifest["leaves"]["rest/step"] == {"shape": [], "dtype": "int32"}
    files = {str(path.relative_to(three / "2")): path for path in (three / "2").rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    assert "record/metadata" in files
    assert all(manifest["files"][name]["bytes"] == files[name].stat().st_size for name in manifest["files"])


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_refused(three, tmp_path, where, value):
    """The error names the leaf, and the newest checkpoint stays."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    state = make_state(4)
    if where == "params":
        state = state.replace(params={**state.params, "w": state.params["w"].at[1, 2].set(value)})
    else:
        adam = next(part for part in state.opt_state if hasattr(part, "nu"))
        broken = adam._replace(nu={**adam.nu, "w": adam.nu["w"].at[0, 0].set(value)})
        state = state.replace(opt_state=tuple(broken if part is adam else part for part in state.opt_state))
    with (
        Saver(CheckpointFolder(tmp_path)) as saver,
        pytest.raises(ValueError, match=rf"step 4 is not finite and is not saved: {where}/[\w/]*w; .* of step 3$"),
    ):
        saver.begin(state, FINGERPRINT)
    assert names(tmp_path) == ["1", "2", "3"]


def test_a_disk_without_room_is_reported_and_leaves_no_litter(tmp_path):
    """A real limit on the size of files stands for the full disk; the next save is the retry."""
    big, events = jax.random.normal(jax.random.key(0), (300, 300)), Events()
    with Saver(CheckpointFolder(tmp_path, report=events)) as saver:
        saver.begin(make_state(1), FINGERPRINT)
        saver.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            saver.begin(make_state(2, w=big), FINGERPRINT)
            saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["1"]
        ((text, fields),) = events.named("save_failed")
        assert "step 2 could not be saved" in text
        assert fields["problem"].startswith("[Errno 27] File too large: '/"), fields["problem"]
        assert len(fields["problem"].splitlines()) == 1
        assert text.endswith("the next save is the retry")
        saver.begin(make_state(2), FINGERPRINT)
    assert names(tmp_path) == ["1", "2"]
    assert len(events.named("save_failed")) == 1  # reported once


def save_all(saver, *steps):
    for step in steps:
        saver.begin(make_state(step), FINGERPRINT)


def test_a_folder_that_cannot_be_made_starts_no_threads_that_wait_for_it(tmp_path, monkeypatch):
    """As on a file system that became read-only: they would delay the exit by minutes."""
    make = os.mkdir

    def mkdir(path, *arguments, **options):
        if ".partial" in str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return make(path, *arguments, **options)

    with Saver(CheckpointFolder(tmp_path, report=(events := Events()))) as saver:
        monkeypatch.setattr(os, "mkdir", mkdir)
        saver.begin(make_state(1), FINGERPRINT)
        monkeypatch.undo()
        left = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax.")]
    assert "Read-only file system" in events.named("save_failed")[0][1]["problem"]
    assert names(tmp_path) == []
    assert left == []


@pytest.mark.parametrize("stage", ["begin", "arrays", "unsealed", "sealed"])
def test_two_failures_in_a_row_are_an_error(tmp_path, stage):
    """Failures at every stage; a successful save resets the count."""
    events = Events()
    saver = Saver(CheckpointFolder(tmp_path, report=events), on_stage=Disk(1, 3, 4, stage=stage))
    with pytest.raises(OSError, match=r"step 4 could not be saved: .*No space left.*free some space"), saver:
        save_all(saver, 1, 2, 3, 4)
    assert [fields["step"] for _, fields in events.named("save_failed")] == [1, 3, 4]
    assert [text.rsplit("; ")[-1] for text, _ in events.named("save_failed")] == [
        *["the next save is the retry"] * 2,
        "the run ends",
    ]
    assert names(tmp_path) == ["2"]


def test_a_last_save_that_fails_is_retried_at_once(tmp_path):
    saver = Saver(CheckpointFolder(tmp_path), on_stage=Disk(1))
    with saver:
        saver.finish(make_state(5), FINGERPRINT)
    assert names(tmp_path) == ["5"]
    saver = Saver(CheckpointFolder(tmp_path), on_stage=Disk(1, 2))
    with pytest.raises(OSError, match="step 6 could not be saved"), saver:
        saver.finish(make_state(6), FINGERPRINT)


def test_a_failure_is_reported_without_waiting(tmp_path):
    begun, released, events = threading.Event(), threading.Event(), Events()

    def full(stage):
        if stage == "unsealed":
            begun.set()
            released.wait(60)
            raise OSError(errno.ENOSPC, "No space left on device")

    with Saver(CheckpointFolder(tmp_path, report=events), on_stage=full) as saver:
        saver.begin(make_state(1), FINGERPRINT)
        assert begun.wait(60)
        saver.poll()
        assert events.named("save_failed") == []
        released.set()
        wait_until(lambda: saver.poll() or events.named("save_failed"))
    assert "No space left" in events.named("save_failed")[0][0]
    assert names(tmp_path) == []


def test_a_save_that_hangs_is_given_up_and_named(tmp_path, monkeypatch):
    released, events = threading.Event(), Events()
    monkeypatch.setenv("JAXTRAIN_TIMEOUT", "0.5")
    saver = Saver(
        CheckpointFolder(tmp_path, report=events),
        on_stage=lambda stage: stage == "unsealed" and released.wait(60),
        notice_seconds=0.5,
    )
    saver.begin(make_state(1), FINGERPRINT)
    with pytest.raises(TimeoutError, match=r"step 1 has made no progress for 2 s: check that .* JAXTRAIN_TIMEOUT"):
        saver.wait()
    assert "waiting for the checkpoint of step 1" in events.named("save_slow")[0][0]
    assert stop.is_stuck()
    released.set()
    wait_until(lambda: not stop.is_stuck())


class Crash(BaseException):
    """Stops the thread of a save at its current stage, as the end of the process does."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("stage", "newest"), [(stage, 3 if stage in STAGES[4:] else 2) for stage in STAGES[1:]])
def test_a_crash_at_any_stage_leaves_whole_checkpoints_and_litter(tmp_path, stage, newest):
    """The quick sibling of the drill with kill -9."""

    def crash(reached):
        if reached == stage:
            raise Crash

    folder = CheckpointFolder(tmp_path, keep=1, keep_every=2)
    with Saver(folder) as before:
        save_all(before, 1, 2)
    with Saver(folder, on_stage=crash) as saver:  # also waits for Orbax's threads, which no crash stops here
        saver.begin(make_state(3), FINGERPRINT)
    if stage == "arrays":  # they have given the folder its next name
        (tmp_path / ".3.partial").rename(tmp_path / ".3.partial.orbax-checkpoint-tmp")
    litter = [name for name in names(tmp_path) if name.startswith(".")]
    assert litter == {"committed": [], "deleting": []}.get(stage, litter[:1])
    folder = CheckpointFolder(tmp_path)
    folder.clean()
    assert folder.latest_step() == newest
    assert_same(restore(folder, abstract(make_state()))[0], make_state(newest))
    with Saver(folder) as after:
        save_all(after, 3, 4)
    assert folder.steps()[-2:] == [3, 4]


def test_the_log_is_on_the_disk_before_a_checkpoint_counts(tmp_path):
    """The log is fsynced before the rename publishes the checkpoint."""
    events, log = Events(), tmp_path / "metrics.jsonl"
    with Saver(CheckpointFolder(tmp_path / "checkpoints", report=events), log=log) as saver:
        save_all(saver, 1)  # there is no log: a warning that names it, and the checkpoint counts
    ((text, _),) = events.named("checkpoint_warning")
    assert text.startswith(f"{log}: the log could not be flushed to the disk")
    synced, log_inode = [], log.touch() or log.stat().st_ino

    def fsync(descriptor):
        steps = CheckpointFolder(tmp_path / "checkpoints").steps()
        synced.append((os.fstat(descriptor).st_ino == log_inode, steps))
        os.fsync(descriptor)

    with Saver(CheckpointFolder(tmp_path / "checkpoints"), log=log, fsync=fsync) as saver:
        save_all(saver, 2)
    assert synced == [(True, [1])]


@pytest.mark.parametrize("what", ["deleted", "renamed", "another in its place", "its parent"])
@pytest.mark.parametrize("stage", ["begin", "arrays", "sealed"])
def test_a_run_directory_that_disappears_is_an_error_and_no_ghost(tmp_path, what, stage):
    run, events, turn = tmp_path / "parent" / "run", Events(), []
    run.mkdir(parents=True)

    def vanish(reached):
        turn.append(reached)
        if reached != stage or turn.count(stage) < 2:
            return
        if stage == "arrays":
            saver._writer.wait_until_finished()
        if what == "deleted":
            shutil.rmtree(run)
        else:
            (run.parent if what == "its parent" else run).rename(tmp_path / "elsewhere")
        if what == "another in its place":
            run.mkdir()
            (run / "theirs").touch()
        if stage != "begin":  # what Orbax and an evaluation do, whose threads have not noticed
            (run / "checkpoints" / ".2.partial").mkdir(parents=True)
        folder.score(2, 1.0)

    folder = CheckpointFolder(run / "checkpoints", keep_best=1, report=events)
    saver = Saver(folder, on_stage=vanish)
    with pytest.raises(OSError, match=r"step 2 could not be saved"), saver:
        finish_all(saver, 1, 2)
    assert events.named("save_failed")
    assert not (run / "checkpoints").exists()
    assert run.exists() == (what == "another in its place")
    assert run.parent.exists() == (what != "its parent")
    if what != "deleted":
        assert (tmp_path / "elsewhere" / "checkpoints" / "1" / "manifest.json").exists() or what != "renamed"


def finish_all(saver, *steps):
    for step in steps:
        saver.finish(make_state(step), FINGERPRINT)


def test_the_bytes_that_each_process_hashed_are_reported(tmp_path):
    events = Events()
    with Saver(CheckpointFolder(tmp_path, report=events)) as saver:
        save_all(saver, 1)
    ((_, fields),) = events.named("saved")
    files = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"]
    assert fields == {"step": 1, "bytes_hashed": [sum(entry["bytes"] for entry in files.values())]}
