"""Restoring: the result is what was saved, or an error that names the path."""

import shutil
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpoint_helpers import FINGERPRINT, Events, abstract, assert_same, big_file, make_state, names, save_steps

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.leaves import NotFinite, describe_leaves
from jaxtrain.checkpoints.manifest import MANIFEST, seal, share_of
from jaxtrain.checkpoints.restore import choose, find_fingerprint, restore, restore_params
from jaxtrain.runtime.files import write_json
from jaxtrain.step import TrainState


@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_new_process_reads_what_was_written_onto_its_devices(three, num_devices):
    state = make_state()
    restored, fingerprint = restore(CheckpointFolder(three), abstract(state, num_devices))
    assert_same(restored, state)
    assert fingerprint == FINGERPRINT
    assert len(restored.params["w"].sharding.device_set) == num_devices


def test_parameters_and_fingerprint_alone(three):
    state = make_state()
    params, fingerprint, step = restore_params(CheckpointFolder(three), abstract(state).params)
    assert step == 3
    assert_same(params, state.params)
    assert fingerprint == FINGERPRINT
    assert find_fingerprint(CheckpointFolder(three), 2) == (FINGERPRINT, 2)


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
    """A checkpoint that does not fit is not reported as damaged."""
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


def test_a_damaged_checkpoint_is_named_and_renamed(three, tmp_path):
    path, events, like = shutil.copytree(three, tmp_path / "checkpoints"), Events(), abstract(make_state())
    truncate(path / "3")
    folder = CheckpointFolder(path, report=events)
    problem = r"checkpoint 3 is damaged: params/.* has 10 bytes, its manifest says \d+"
    with pytest.raises(ValueError, match=rf"{problem}.*try another step: there are \[1, 2\]"):
        restore(folder, like, 3)
    assert restore_params(folder, like.params)[-1] == 2
    assert names(path) == ["1", "2", "3"]  # reading moves nothing
    events.clear()
    assert_same(restore(folder, like, repair=True)[0], make_state(2))
    assert names(path) == ["1", "2", "3.damaged"]
    ((text, fields),) = events.named("checkpoint_damaged")
    assert (fields["step"], fields["back_to"]) == (3, 2)
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
    assert restore_params(CheckpointFolder(path), like.params)[-1] == 3
    assert int(restore(CheckpointFolder(path), like)[0].step) == 2
    assert "checkpoint 3 is damaged: rest/" in capsys.readouterr().err


def test_a_checkpoint_of_manifest_version_1_is_restored(tmp_path):
    """version_1.tar.gz was written by the code before checkpoints/ was a package, on jax 0.10.2."""
    with tarfile.open(Path(__file__).parent / "version_1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    params = {"w": jnp.arange(6.0).reshape(2, 3), "layers": {"scale": jnp.ones((2, 4))}}
    state = TrainState.create(params, optax.adam(1e-2)).replace(step=jnp.int32(7))
    restored, fingerprint = restore(CheckpointFolder(tmp_path), abstract(state))
    assert_same(restored, state)
    assert fingerprint == FINGERPRINT
    assert restore_params(CheckpointFolder(tmp_path), abstract(params))[-1] == 7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", ["params/layers/scale", "params/w", "opt_state/1/nu/w"])
def test_a_state_that_is_not_finite_is_refused_by_name(tmp_path, leaf, value):
    """The checkpoint is whole, but was written by a program without the finite check."""

    def poison(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.full_like(x, value) if name == leaf else x

    state = jax.tree_util.tree_map_with_path(poison, make_state())
    parts = {"params": state.params, "rest": state.replace(params=None)}
    handlers = {part: ocp.StandardCheckpointHandler() for part in parts}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
        args = {part: ocp.args.StandardSave(tree) for part, tree in parts.items()}
        writer.save(tmp_path / "3", args=ocp.args.Composite(**args))
    (tmp_path / "3" / "record").mkdir()
    write_json(tmp_path / "3" / "record" / "metadata", FINGERPRINT)
    seal(tmp_path / "3", 3, describe_leaves(parts["params"], "params") | describe_leaves(parts["rest"], "rest"), {})
    with pytest.raises(NotFinite, match=rf"checkpoint .*/3 holds NaN or infinities in {leaf}: use an earlier"):
        restore(CheckpointFolder(tmp_path), abstract(state))
    if leaf.startswith("params"):
        with pytest.raises(NotFinite, match=rf" in {leaf}: "):
            restore_params(CheckpointFolder(tmp_path), abstract(state).params)
    else:
        assert restore_params(CheckpointFolder(tmp_path), abstract(state).params)[-1] == 3


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_processes_share_the_files(count):
    """Every file is hashed once: by the process that wrote it, the other files in even shares."""
    names = [f"params/ocdbt.process_{p}/d/{i}" for p in range(count) for i in range(3)]
    others = [f"params/d/{i}" for i in range(8 * count)] + [MANIFEST]
    shares = [share_of(names + others, process, count) for process in range(count)]
    assert sorted(name for share in shares for name in share) == sorted(names + others)
    for process, share in enumerate(shares):
        assert [name for name in share if "ocdbt" in name] == names[3 * process : 3 * process + 3]
        assert len(share) - 3 in (8, 9)


@pytest.mark.parametrize("problems", [["", ""], ["", "params/x is missing"], ["rest/y is missing", ""]])
def test_one_process_that_finds_damage_is_enough(three, tmp_path, problems):
    path = shutil.copytree(three, tmp_path / "checkpoints")
    events = Events()
    like = {"params": abstract(make_state()).params}
    shares = iter([problems, ["", ""]])

    def gather(task, value):
        del task
        return [[problem, value[1]] for problem in next(shares)]

    chosen = choose(CheckpointFolder(path, report=events), like, gather=gather)
    assert chosen == (2 if any(problems) else 3)
    assert [fields["problem"] for _, fields in events.named("checkpoint_damaged")] == [p for p in problems if p]
    (_, fields) = events.named("verified")[0]
    assert fields["bytes_hashed"][0] > 0
