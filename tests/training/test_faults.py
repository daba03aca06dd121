"""Whole runs with deliberate faults: what is skipped, what is recorded, and that the run continues or gives up."""

import math

import jax
import numpy as np
import pytest
from runs import Faults, FaultyBatches, assert_same_bits, change, numbers, state_of, train

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import find_fingerprint
from jaxtrain.data.loader import TrainBatches
from jaxtrain.data.store import open_store
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.training.train import GAVE_UP

# Every fault but the long spike, on steps of their own; a small window, so that spikes are noticed soon.
FAULTS = Faults(nan_loss_step=2, nan_micro_batch_step=4, gradient_step=10, inf_step=12, spike_step=14, spike_steps=2)
REASONS = {2: 1, 4: 1, 10: 3, 12: 1, 14: 2, 15: 2}


STEPS = 20  # in most tests, which share its program


def faulty_config(config, *, steps=STEPS, **fields):
    return change(config, train={"steps": steps, **fields}, guard={"window": 8})


@pytest.fixture(scope="module")
def faulty_run(tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "run"
    train(faulty_config(tiny_config), folder, faults=FAULTS)
    return folder


def test_each_fault_is_skipped_and_named_and_the_loss_still_falls(faulty_run):
    lines = numbers(faulty_run)
    assert {line["step"]: line["skip_reason"] for line in lines if line["skipped"]} == REASONS
    assert all(line["update_norm"] == 0 and line["clip_factor"] == 0 for line in lines if line["skipped"])
    assert math.isnan(lines[1]["loss"])
    assert lines[9]["grad_norm"] > 1e3
    assert lines[11]["grad_norm"] == math.inf
    assert math.isfinite(lines[11]["loss"])
    assert lines[13]["loss"] > 5 * lines[12]["loss"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_parameters_stand_still_while_steps_are_skipped(faulty_run):
    lines = {line["step"]: line for line in numbers(faulty_run)}
    for step in REASONS:
        assert lines[step + 1]["param_norm"] == lines[step]["param_norm"]
    assert lines[4]["param_norm"] != lines[3]["param_norm"]


def test_skips_do_not_move_the_schedule(faulty_run, tiny_config, tmp_path):
    """Each step has the learning rate of a run without faults; Adam counts the updates."""
    train(faulty_config(tiny_config), tmp_path / "healthy", faults=Faults())
    rates = [[line["learning_rate"] for line in numbers(folder)] for folder in (faulty_run, tmp_path / "healthy")]
    assert rates[0] == rates[1]
    state = state_of(faulty_run)
    assert int(state.step) == STEPS
    assert int(state.opt_state.inner[1].count) == int(state.opt_state.accepted) == STEPS - len(REASONS)


def test_a_restart_does_not_change_the_guard(faulty_run, tiny_config, tmp_path):
    """The guard's window is in the checkpoint, also directly after a skip."""
    for stop in (9, 12, None):
        train(faulty_config(tiny_config, stop_after=stop), tmp_path / "run", faults=FAULTS)
    assert numbers(tmp_path / "run") == numbers(faulty_run)
    assert_same_bits(state_of(tmp_path / "run"), state_of(faulty_run))


@pytest.mark.slow  # its quick sibling is the run of two processes in test_processes.py
def test_the_same_steps_are_skipped_on_a_mesh(tiny_config, tmp_path):
    """Rows, matrices and vocabulary are sharded; the bad row lies on one device. In float16, which scales the loss."""
    config = change(faulty_config(tiny_config, precision="float16"), mesh={"data": 2, "fsdp": 2})
    train(config, tmp_path / "run", faults=FAULTS)
    lines = numbers(tmp_path / "run")
    reasons = REASONS | {10: 1}  # 1e4 times the gradient overflows
    assert {line["step"]: line["skip_reason"] for line in lines if line["skipped"]} == reasons
    scales = [line["loss_scale"] for line in lines]
    expected = [2.0**15 / 2 ** sum(step > bad for bad in (2, 4, 10, 12)) for step in range(1, STEPS + 1)]
    assert scales == expected
    assert float(state_of(tmp_path / "run").loss_scale.scale) == expected[-1]


def test_float16_learns_as_float32_does(tiny_config, tmp_path):
    """The losses equal those of float32 within the 11 bits of float16."""
    losses = {}
    for precision in ("float32", "float16"):
        train(faulty_config(tiny_config, precision=precision), tmp_path / precision, faults=Faults())
        losses[precision] = np.array([line["loss"] for line in numbers(tmp_path / precision)])
    assert losses["float32"][-1] < losses["float32"][0] - 1
    np.testing.assert_allclose(losses["float16"], losses["float32"], rtol=0.01)


@pytest.mark.slow  # its quick sibling is the restart with a guard, whose state is restored in the same way
def test_a_restart_does_not_change_loss_scaling(tiny_config, tmp_path):
    """The checkpoint holds the loss scale and the steps since its last change."""
    for name, stops in (("whole", [None]), ("parts", [5, None])):
        for stop in stops:
            config = faulty_config(tiny_config, steps=12, precision="float16", stop_after=stop)
            config = change(config, loss_scale={"growth_interval": 4})
            train(config, tmp_path / name, faults=Faults(inf_step=3))
    assert [line["loss_scale"] / 2.0**14 for line in numbers(tmp_path / "whole")] == [2] * 3 + [1] * 4 + [2] * 4 + [4]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


def test_a_long_spike_ends_the_run_with_its_state_and_a_report(tiny_config, tmp_path):
    """50 bad steps exceed 10 in a row; none of them changed the state."""
    config = change(faulty_config(tiny_config, steps=40), checkpoint={"every": 1000})
    outcome = train(config, tmp_path / "run", faults=Faults(spike_step=9), report=True)
    lines, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert next(line["step"] for line in lines if line["give_up"]) == 19  # the eleventh of them
    assert events[-1]["event"] == "stop"
    assert outcome["reason"] == events[-1]["reason"] == GAVE_UP
    assert (tmp_path / "run" / "report.html").exists()
    state = state_of(tmp_path / "run")
    assert int(state.opt_state.accepted) == 8
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("steps", [STEPS, 40])
def test_a_good_step_after_too_many_bad_ones_saves_nothing(steps, tiny_config, tmp_path):
    """Eleven bad steps, then a good one, which may be the last of the run."""
    faults = Faults(spike_step=9, spike_steps=11)
    outcome = train(faulty_config(tiny_config, steps=steps), tmp_path / "run", faults=faults)
    assert outcome == {"step": 20, "reason": GAVE_UP, "skipped_steps": 11}
    lines, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == list(range(9, 20))
    assert (events[-1]["reason"], events[-1]["skipped_steps"]) == (GAVE_UP, 11)
    saved, _ = find_fingerprint(CheckpointFolder(tmp_path / "run" / "checkpoints"))
    assert saved["skipped_steps"] == 11
    config = faulty_config(tiny_config, steps=steps)
    assert train(config, tmp_path / "run", faults=Faults()) == outcome  # the same command trains no further
    assert train(config, tmp_path / "run", faults=Faults(), rewind=20)["reason"] == "finished"


def test_the_faults_reach_the_right_rows(tiny_config):
    split = open_store(tiny_config.data.store).train
    batches = FaultyBatches(TrainBatches(split, seed=0, batch_size=8, seq_len=16, vocab_size=257), FAULTS)
    whole = batches.rows(3, 0, 8)  # step 4: NaN in one micro-batch
    np.testing.assert_array_equal(np.isnan(whole["loss_factor"]), np.arange(8) == 0)
    assert not np.isnan(batches.rows(3, 4, 8)["loss_factor"]).any()
    np.testing.assert_array_equal(batches.rows(13, 2, 6)["loss_factor"], np.full(4, 10, np.float32))
    np.testing.assert_array_equal(batches.rows(15, 2, 6)["loss_factor"], np.ones(4))
    np.testing.assert_array_equal(batches.rows(9, 0, 2)["gradient_factor"], np.full(2, 1e4, np.float32))
    np.testing.assert_array_equal(batches.rows(11, 0, 2)["gradient_offset"], np.full(2, np.inf))
    healthy = batches.rows(0, 0, 8)
    assert {name: set(healthy[name].tolist()) for name in ("loss_factor", "gradient_factor", "gradient_offset")} == {
        "loss_factor": {1.0},
        "gradient_factor": {1.0},
        "gradient_offset": {0.0},
    }
