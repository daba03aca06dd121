"""Resuming on another mesh: the numbers are those of the first mesh, and only the mesh may change."""

import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest
from runs import QUICK, train

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, llama
from jaxtrain.data.loader import TrainBatches, global_batch
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.mesh import by_rows, make_mesh
from jaxtrain.training.run import assemble, open_run

MESHES = [MeshConfig(*sizes) for sizes in ((1, 1, 1), (1, 2, 1), (1, 2, 2), (4, 1, 2))]
each_mesh = pytest.mark.parametrize("mesh", MESHES, ids=str)


@pytest.fixture(scope="module")
def config(store):
    """Eight steps on a mesh of 2 x 2 x 2 devices, which divide heads, channels and vocabulary."""
    return Config(
        data=DataConfig(store=str(store)),
        model=llama(num_layers=2, num_heads=2, d_model=16, d_ff=32, max_seq_len=16, vocab_multiple=8),
        optim=OptimConfig(peak_lr=1e-2, warmup_steps=3),
        train=TrainConfig(steps=10, batch_size=8, seq_len=16, log_every=1, stop_after=8),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        checkpoint=CheckpointConfig(every=4),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The undisturbed run, with checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(config, folder)
    return folder


def state_of(config, folder, step):
    run = assemble(config, folder, open_run(folder, QUICK).store, QUICK)
    return restore(CheckpointFolder(folder / "checkpoints"), run.program.abstract_state, step)[0]


@pytest.mark.slow  # its quick siblings: the bits of the restored state below, and steps on any mesh in test_program.py
@each_mesh
def test_a_run_resumes_on_another_mesh_with_the_same_losses(config, whole, tmp_path, mesh):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    config = dataclasses.replace(config, mesh=mesh)
    train(config, tmp_path / "run")
    lines, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    expected, _ = read_metrics(whole / "metrics.jsonl")
    assert [line["attempt"] for line in lines] == [1] * 4 + [2] * 4
    assert [event["devices"] for event in events if event["event"] == "resume"] == [make_mesh(mesh).size]
    for line, other in zip(lines, expected, strict=True):
        assert line["step"] == other["step"]
        for key in ("loss", "grad_norm", "clip_factor", "update_norm", "param_norm", "learning_rate", "tokens"):
            np.testing.assert_allclose(line[key], other[key], rtol=1e-5, err_msg=f"{key} of step {line['step']}")
    states = [jax.device_get(state_of(config, folder, 8)) for folder in (tmp_path / "run", whole)]
    chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-6)


@each_mesh
def test_another_mesh_restores_the_same_bits_with_its_own_shardings(config, whole, mesh):
    saved = state_of(config, whole, 4)
    other = dataclasses.replace(config, mesh=mesh)
    restored = state_of(other, whole, 4)
    wanted = assemble(other, whole, open_run(whole, QUICK).store, QUICK).program.abstract_state
    for a, b, like in zip(*map(jax.tree.leaves, (saved, restored, wanted)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert b.sharding.is_equivalent_to(like.sharding, b.ndim)
        assert len(a.sharding.device_set) == 8
    # Each device has a shard of the matrix along every axis of the mesh.
    kernel = restored.params["layers"]["feed_forward"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * mesh.fsdp * mesh.tensor == kernel.size


@each_mesh
def test_the_batches_do_not_depend_on_the_mesh(config, whole, mesh):
    split = open_run(whole, QUICK).store.train
    batches = TrainBatches(split, seed=0, batch_size=8, seq_len=16, vocab_size=257)
    for step in (0, 7):
        placed = global_batch(batches, step, by_rows(make_mesh(mesh)))
        for name, rows in batches.batch(step).items():
            np.testing.assert_array_equal(placed[name], rows)


def test_another_shape_is_refused_on_any_mesh(config, whole):
    for mesh in (config.mesh, *MESHES):
        wider = dataclasses.replace(config, mesh=mesh, model=dataclasses.replace(config.model, d_ff=64))
        with pytest.raises(ValueError, match=r"feed_forward/up/kernel: float32\[2, 16, 32\] in the checkpoint, .*64"):
            state_of(wider, whole, 4)


def test_only_the_mesh_may_change(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    changed = dataclasses.replace(config, mesh=MESHES[1], seed=1)
    with pytest.raises(ValueError, match="seed: 0 -> 1") as error:
        train(changed, tmp_path / "run")
    assert "mesh." not in str(error.value)


def test_sizes_that_do_not_divide_are_refused_with_the_arithmetic(config, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match=r"batch_size 8 .*= 6"):
        train(dataclasses.replace(config, mesh=MeshConfig(data=3, fsdp=2)), tmp_path / "run")
