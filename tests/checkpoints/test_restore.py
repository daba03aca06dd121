"""Restoring: the result is what was saved, or an error that names the path."""

import shutil

import jax.numpy as jnp
import pytest
from checkpoint_helpers import FINGERPRINT, Events, abstract, assert_same, big_file, make_state, names, save_steps

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import read_fingerprint, restore, restore_params


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_new_process_reads_what_was_written_onto_its_devices(three, num_devices):
    state = make_state()
    restored, fingerprint = restore(CheckpointFolder(three), abstract(state, num_devices))
    assert_same(restored, state)
    assert fingerprint == FINGERPRINT
    assert len(restored.params["w"].sharding.device_set) == num_devices


def test_parameters_and_fingerprint_alone(three):
    state = make_state()
    params, step = restore_params(CheckpointFolder(three), abstract(state).params)
    assert step == 3
    assert_same(params, state.params)
    assert read_fingerprint(CheckpointFolder(three), 2) == (FINGERPRINT, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": jnp.ones(2)}, "extra: missing from the checkpoint"),
        ({"w": jnp.ones((2, 4))}, r"w: float32\[2, 3\] in the checkpoint, float32\[2, 4\] in the run"),
        ({"w": jnp.ones((2, 3), jnp.bfloat16)}, r"w: float32\[2, 3\] in the checkpoint, bfloat16\[2, 3\] in the run"),
        ({"layers": {}}, "layers/scale: in the checkpoint, not in the run"),
    ],
)
def test_restore_is_strict_and_names_the_path(three, changes, message):
    """A checkpoint that does not fit is not taken for a damaged one."""
    events, like = Events(), abstract(make_state())
    like = like.replace(params={**like.params, **abstract(changes)})
    folder = CheckpointFolder(three, report=events)
    with pytest.raises(ValueError, match=rf"3 does not fit this run(.|\n)*params/{message}"):
        restore(folder, like, repair=True)
    with pytest.raises(ValueError, match=message):
        restore_params(folder, like.params)
    assert (events, folder.steps()) == ([], [1, 2, 3])


def test_restore_is_strict_about_the_optimizer_too(three):
    like = abstract(make_state())
    like = like.replace(opt_state=(*like.opt_state, {"more": like.step}))
    with pytest.raises(ValueError, match="opt_state/4/more: missing"):
        restore(CheckpointFolder(three), like)


def test_missing_checkpoints_are_named(three, tmp_path):
    like = abstract(make_state())
    with pytest.raises(ValueError, match=r"step 7 .* there are \[1, 2, 3\]"):
        restore(CheckpointFolder(three), like, 7)
    empty = CheckpointFolder(tmp_path / "empty")
    assert empty.latest_step() is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        restore(empty, like)


def truncate(checkpoint, part="params"):
    file = big_file(checkpoint, part)
    file.write_bytes(file.read_bytes()[:10])


def test_a_damaged_checkpoint_is_named_and_set_aside(three, tmp_path):
    path, events, like = shutil.copytree(three, tmp_path / "checkpoints"), Events(), abstract(make_state())
    truncate(path / "3")
    folder = CheckpointFolder(path, report=events)
    problem = r"checkpoint 3 is damaged: params/.* has 10 bytes, its manifest says \d+"
    with pytest.raises(ValueError, match=rf"{problem}.*try another step: there are \[1, 2\]"):
        restore(folder, like, 3)
    assert restore_params(folder, like.params)[1] == 2
    assert names(path) == ["1", "2", "3"]  # reading moves nothing
    events.clear()
    assert_same(restore(folder, like, repair=True)[0], make_state(2))
    assert names(path) == ["1", "2", "3.damaged"]
    ((event, text, fields),) = events
    assert (event, fields["step"], fields["back_to"]) == ("checkpoint_damaged", 3, 2)
    assert text.endswith("going back to step 2")
    save_steps(path, 3)  # its place is free
    assert folder.latest_step() == 3
    truncate(path / "3")
    restore(folder, like, repair=True)
    assert names(path) == ["1", "2", "3.damaged", "3.damaged.2"]


def test_if_all_are_damaged_every_file_stays_where_it_is(three, tmp_path):
    path = shutil.copytree(three, tmp_path / "checkpoints")
    truncate(path / "1")
    big_file(path / "2", "rest").unlink()
    (path / "3" / "manifest.json").write_text("{")
    folder = CheckpointFolder(path)
    with pytest.raises(ValueError, match=r"checkpoint 3 is damaged: .*2 is damaged: .*1 is damaged: .* has 10 bytes"):
        restore(folder, abstract(make_state()), repair=True)
    assert folder.steps() == [1, 2, 3]


def test_parameters_alone_need_no_optimizer_state(three, tmp_path, capsys):
    path, like = shutil.copytree(three, tmp_path / "checkpoints"), abstract(make_state())
    big_file(path / "3", "rest").unlink()
    assert restore_params(CheckpointFolder(path), like.params)[1] == 3
    assert int(restore(CheckpointFolder(path), like)[0].step) == 2
    assert "checkpoint 3 is damaged: rest/" in capsys.readouterr().err
