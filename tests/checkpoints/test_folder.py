"""Checkpoint folder: complete checkpoints, retention, renaming."""

import json
import os
import re
import shutil

import pytest
from checkpoint_helpers import Events, names, save_steps

from jaxtrain.checkpoints.folder import CheckpointFolder, require_writable_path, retained


@pytest.fixture
def copy(three, tmp_path):
    """A copy of checkpoints 1, 2 and 3."""
    return shutil.copytree(three, tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        ((1, None, None), {60}),
        ((2, None, None), {50, 60}),
        ((9, None, None), {10, 20, 30, 40, 50, 60}),
        ((1, 30, None), {30, 60}),
        ((1, 20, None), {20, 40, 60}),
        ((1, None, 1), {20, 60}),
        ((2, 40, 2), {20, 30, 40, 50, 60}),
        ((1, None, 9), {20, 30, 50, 60}),  # NaN has no rank; an unmeasured step has none either
    ],
)
def test_the_newest_the_multiples_and_the_best_stay(rule, stay):
    """The newest stays although it is the worst."""
    scores = {20: 1.0, 30: 2.0, 40: float("nan"), 50: 2.5, 60: 9.0, 70: 0.1}
    keep, keep_every, keep_best = rule
    kept = retained([10, 20, 30, 40, 50, 60], scores, keep=keep, keep_every=keep_every, keep_best=keep_best)
    assert kept == stay


def test_scores_outlive_the_process(tmp_path):
    for step, nll in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), (5, 4.0)):
        rule = {"keep": 1, "keep_best": 2}
        CheckpointFolder(tmp_path, **rule).score(step, nll)
        save_steps(tmp_path, step, **rule)
    assert CheckpointFolder(tmp_path).steps() == [2, 3, 5]


def test_leftovers_of_a_crash_do_not_count_and_are_deleted(copy):
    for name in (".4.partial", ".4.partial.orbax-checkpoint-tmp", ".1.deleting"):
        shutil.copytree(copy / "1", copy / name)
    (copy / "5.rewound").mkdir()
    folder = CheckpointFolder(copy)
    assert folder.steps() == [1, 2, 3]
    folder.clean()
    assert names(copy) == ["1", "2", "3", "5.rewound"]
    save_steps(copy, 4)
    assert folder.latest_step() == 4


def test_a_rewind_renames_later_checkpoints(copy):
    folder = CheckpointFolder(copy, keep_best=1)
    for _ in range(2):
        for step in (1, 3):
            folder.score(step, 4.0 - step)
        assert folder.rewind(2) == [3]
        assert folder.rewind(2) == []
        assert json.loads((copy / "scores.json").read_text()) == {"1": 3.0}
        shutil.copytree(copy / "3.rewound", copy / "3")
    assert names(copy) == ["1", "2", "3", "3.rewound", "3.rewound.2", "scores.json"]


def test_a_rewind_survives_a_power_cut(copy, monkeypatch):
    """The folder is synced after each rename: otherwise a later checkpoint might come back and be resumed."""
    done, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: (rename(old, new), done.append(new.name)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    CheckpointFolder(copy).rewind(1)
    assert done == ["3.rewound", str(copy), "2.rewound", str(copy)]


@pytest.mark.parametrize("rule", [{"keep": 0}, {"keep_every": 0}, {"keep_best": -1}])
def test_a_rule_that_keeps_nothing_is_refused(tmp_path, rule):
    with pytest.raises(ValueError, match=f"{re.escape(str(rule))} of a checkpoint folder must be above 0"):
        CheckpointFolder(tmp_path, **rule)


SCORES = ["", "{", "[1, 2]", "null", "3", '{"a": 1}', '{"1": "b"}', '{"1": [2]}', '{"1": null}', "\0\0", "[" * 200_000]
SCORES += ['{"' + "9" * 5000 + '": 1}', '{"1": 1' + "0" * 4000 + "}"]


@pytest.mark.parametrize("text", SCORES, ids=lambda text: text[:10])
def test_malformed_scores_are_a_warning(copy, text):
    """A damaged scores.json is one warning that names the file; later scores count."""
    events = Events()
    folder = CheckpointFolder(copy, keep=3, keep_best=1, report=events)
    (copy / "scores.json").write_text(text)
    folder.prune()
    folder.prune()
    folder.score(2, 0.5)
    folder.rewind(3)
    ((warning, fields),) = events.named("checkpoint_warning")
    assert warning.startswith(f"{copy / 'scores.json'}: ")
    assert fields["path"] == str(copy / "scores.json")
    assert folder.steps() == [1, 2, 3]
    assert json.loads((copy / "scores.json").read_text()) == {"2": 0.5}


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path)], ids=["folder", "FIFO", "loop"]
)
def test_scores_that_are_no_file_are_a_warning(copy, make):
    events = Events()
    folder = CheckpointFolder(copy, keep=3, keep_best=1, report=events)
    make(copy / "scores.json")
    folder.score(2, 0.5)
    folder.prune()
    assert len(events.named("checkpoint_warning")) == 1
    assert folder.steps() == [1, 2, 3]


def test_scores_that_cannot_be_written_are_a_warning(copy):
    events = Events()
    folder = CheckpointFolder(copy, keep=1, keep_best=1, report=events)
    (copy / "scores.json.tmp").mkdir()
    folder.score(1, 0.5)
    folder.score(2, 0.7)
    folder.prune()
    assert folder.steps() == [1, 3]  # the best stays
    ((warning, _),) = events.named("checkpoint_warning")
    assert warning.startswith(f"{copy / 'scores.json'}: the validation losses for checkpoint.keep_best could not be")


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(copy):
    """An existing name and a read-only folder stand for an immutable file and for NFS."""
    events = Events()
    folder = CheckpointFolder(copy, keep=1, report=events)
    (copy / ".1.deleting").mkdir()
    (copy / ".1.deleting" / "x").touch()
    folder.prune()
    assert folder.steps() == [1, 3]
    folder.prune()
    ((warning, _),) = events.named("checkpoint_warning")
    assert warning.startswith(f"{copy / '1'}: this old checkpoint could not be deleted")

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    events.clear()
    folder = CheckpointFolder(copy, keep=1, report=events, delete=refuse)
    folder.clean()
    shutil.rmtree(copy / ".1.deleting")
    folder.prune()
    assert folder.steps() == [3]
    assert [fields["path"] for _, fields in events.named("checkpoint_warning")] == [str(copy / ".1.deleting")]
    CheckpointFolder(copy).clean()
    assert names(copy) == ["3"]


@pytest.mark.parametrize("name", ["gs:", "x gs:", "gs:/y", "a*", "b?", "[c]", "d\\e", "\udcff"])
def test_unwritable_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints cannot be saved in .*: give another --run-dir"):
        require_writable_path(tmp_path / name)


@pytest.mark.parametrize("name", ["gs:x", "a:b", "s3:", "gs", "file:", "c d", "\u00e9"])
def test_other_names_are_accepted(name, tmp_path):
    require_writable_path(tmp_path / name)
