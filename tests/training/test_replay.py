"""Replaying a step: the numbers, the micro-batches, layers and documents; and steps that are run twice."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import QUICK, Faults, change, corrupt_second_run, train, with_faults

from jaxtrain.cli import main
from jaxtrain.config import MeshConfig
from jaxtrain.monitoring.interval import summarize
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import from_json, to_json
from jaxtrain.training.batches import batch_source
from jaxtrain.training.replay import longest_repetition
from jaxtrain.training.replay import replay as run_again
from jaxtrain.training.run import open_run, restore_run_params


def replay(run_dir, step, hooks=QUICK):
    return run_again(run_dir, step, hooks)


TIMES = {"attempt", "tokens_per_second", "step_seconds"}


def snapshot(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in folder.rglob("*")
    }


def numbers(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")[0]]


@pytest.fixture(scope="module")
def run_dir(tiny_config, tmp_path_factory):
    """A finished run that left batches out, stopped once, and has checkpoints of steps 5, 7, 10 and 12."""
    folder = tmp_path_factory.mktemp("replay") / "run"
    config = change(tiny_config, checkpoint={"keep": 9}, data={"skip": ("3:5", "8:9")})
    train(change(config, train={"stop_after": 7}), folder)
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def sixth(run_dir):
    return replay(run_dir, 6)


@pytest.mark.parametrize(("step", "first"), [(4, 0), (9, 7)])
def test_a_step_reproduces_bit_for_bit_from_the_checkpoint_before_it(run_dir, step, first):
    """Replays the batches that the run read, skipped data included; the run directory does not change."""
    before = snapshot(run_dir)
    result = replay(run_dir, step)
    assert snapshot(run_dir) == before
    assert result["from_step"] == first
    assert result["compared_steps"] == list(range(first + 1, step + 1))
    assert result["differences"] == []
    assert result["reproduces"] is True
    logged = numbers(run_dir)[step - 1]
    assert {key: float(value) for key, value in result["metrics"].items()}.items() <= logged.items()
    assert logged["steps"] == 1
    assert result["notes"] == []


def test_a_line_that_covers_several_steps_is_compared_as_a_whole(run_dir, tmp_path):
    """Lines 8 (steps 7 and 8, one of them before the checkpoint) and 10 (steps 9 and 10)."""
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {record["step"]: record for record in records if "event" not in record}
    own = ("step", "attempt", "tokens_seen")
    lines = [summarize([steps[last - 1], steps[last]]) | {name: steps[last][name] for name in own} for last in (8, 10)]
    kept = [record for record in records if "event" in record]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*kept, *lines]))
    result = replay(folder, 10)
    assert (result["from_step"], result["compared_steps"], result["reproduces"]) == (7, [10], True)
    assert result["logged"]["loss"] != float(result["metrics"]["loss"])


def test_the_parts_add_up_to_the_step(sixth):
    metrics, parts = sixth["metrics"], sixth["micro_batches"]
    assert [part["micro_batch"] for part in parts] == [0, 1]
    assert sum(part["tokens"] for part in parts) == metrics["tokens"]
    np.testing.assert_allclose(np.mean([part["nll"] for part in parts]), metrics["nll"], rtol=1e-5)
    assert all(0 < part["grad_norm"] < 2 * metrics["grad_norm"] for part in parts)
    for part in parts:
        rows = [row["nll"] for row in sixth["rows"] if row["micro_batch"] == part["micro_batch"]]
        np.testing.assert_allclose(np.mean(rows), part["nll"], rtol=1e-5)
    layers = sixth["layers"]
    assert [layer["name"] for layer in layers if "layer" in layer["name"]] == ["layer 0", "layer 1"]
    for norm in ("grad_norm", "param_norm"):
        total = np.sqrt(sum(layer[norm] ** 2 for layer in layers))
        np.testing.assert_allclose(total, metrics[norm], rtol=1e-5)
    total = np.sqrt(sum(layer["update_norm"] ** 2 for layer in layers))
    np.testing.assert_allclose(total, metrics["update_norm"], rtol=1e-4)  # a difference of rounded parameters


def test_the_loss_of_a_row_does_not_depend_on_other_rows(run_dir, sixth):
    run = open_run(run_dir)
    params, _ = restore_run_params(run, 5)
    batch = batch_source(run)(5)
    for row in sixth["rows"]:
        if row["row"] in (1, 4):  # which another way to make micro-batches would exchange
            sums = run.program.eval_step(
                params, batch | {"where": batch["where"] & (np.arange(8) == row["row"])[:, None]}
            )
            np.testing.assert_allclose(row["nll"], sums.nll / sums.weight, rtol=1e-5)


def test_the_rows_name_their_documents(run_dir, sixth):
    split = open_run(run_dir).store.train
    losses = [row["nll"] for row in sixth["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert {row["row"] for row in sixth["rows"]} == set(range(8))
    for row in sixth["rows"]:
        begin, end = row["tokens"]
        assert end - begin == 17
        first, last = row["documents"]
        ends = [*split.document_starts[1:], split.num_tokens]
        assert split.document_starts[first] <= begin < ends[first]
        assert split.document_starts[last] <= end - 1 < ends[last]
        tokens = split.read(begin, 17).tolist()
        text = "".join(chr(token) if token < 256 else "<|endoftext|>" for token in tokens)
        assert row["text"].replace("\\n", "\n") == text
        assert "\n" not in row["text"]


def test_numbers_that_do_not_reproduce_are_named(run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    doctored = [json.loads(line) for line in lines]
    for line in doctored:
        if line.get("step") == 8 and "loss" in line:
            line["grad_norm"] = float(np.nextafter(np.float32(line["grad_norm"]), np.float32(9)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in doctored))
    result = replay(folder, 9)
    assert result["reproduces"] is False
    assert [(one["step"], one["metric"]) for one in result["differences"]] == [(8, "grad_norm")]


def test_lines_replaced_by_a_rewind_are_not_compared(run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    resumed = next(i for i, line in enumerate(lines) if '"resume"' in line)
    # As if the first attempt had got to step 12 with other data before it was killed, and the second to step 10.
    stale = [json.dumps(json.loads(line) | {"attempt": 1, "loss": 1.0}) for line in lines if '"step": 11,' in line]
    kept = [line for line in lines[resumed:] if '"step": 11,' not in line and '"step": 12,' not in line]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:resumed], *stale, *kept]) + "\n")
    result = replay(folder, 11)
    assert result["logged"] is None
    assert result["reproduces"] is None


def test_a_step_that_the_run_has_not_reached_is_refused(run_dir):
    for step in (0, -1, 13):
        with pytest.raises(ValueError, match=f"has no step {step} to replay: give --step 1 to 12"):
            replay(run_dir, step)


@pytest.mark.parametrize(("name", "value"), [("devices", 4), ("device", "TPU v4"), ("jax", "0.1"), ("processes", 2)])
def test_another_environment_or_config_is_noted(run_dir, tmp_path, name, value):
    shutil.copytree(run_dir, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change = {"event": "config_change", "text": "changed from step 7 on: train.batch_size: 2 -> 8", "changes": {}}
    lines += [change | {"step": done} for done in (5, 6)]  # 5 is the checkpoint
    file.write_text("".join(json.dumps(line | ({name: value} if name in line else {})) + "\n" for line in lines))
    environment, config = replay(tmp_path / "run", 6)["notes"]
    assert environment.startswith(f"{name} was {value} in the run and is ")
    assert config == "steps up to 6 do not reproduce: changed from step 7 on: train.batch_size: 2 -> 8"


@pytest.mark.slow
def test_other_devices_give_the_same_numbers_to_rounding(tiny_config, tmp_path):
    """Equal bits on the devices of the run, equal up to rounding on others."""
    folder = tmp_path / "run"
    train(change(tiny_config, mesh={"data": 2, "fsdp": 2}, train={"stop_after": 7}), folder)
    same = replay(folder, 7)
    assert same["reproduces"] is True
    assert same["notes"] == []
    config = from_json((folder / "config.json").read_text())
    (folder / "config.json").write_text(to_json(dataclasses.replace(config, mesh=MeshConfig(data=1))))
    other = replay(folder, 7)
    assert other["notes"] == ["devices was 4 in the run and is 1 here: expect equal numbers up to rounding only"]
    np.testing.assert_allclose(other["metrics"]["loss"], same["metrics"]["loss"], rtol=1e-5)
    losses = [{row["row"]: row["nll"] for row in result["rows"]} for result in (same, other)]
    for row, nll in losses[0].items():
        np.testing.assert_allclose(losses[1][row], nll, rtol=1e-5)


def test_the_command_prints_tables(run_dir, capsys):
    """Its JSON is read in test_own_model.py."""
    assert main(["replay", str(run_dir), "--step", "8"]) == 0
    printed = capsys.readouterr().out
    for part in ("step 8, from the checkpoint of step 7", "reproduces bit for bit: step 8", "grad_norm", "layer 1"):
        assert part in printed
    assert "\x1b" not in printed


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_longest_repetition(tokens):
    best = 0
    for n in range(1, len(tokens)):
        for start in range(len(tokens)):
            stop = start + n
            while stop < len(tokens) and tokens[stop] == tokens[stop - n]:
                stop += 1
            if stop - start >= 2 * n:
                best = max(best, stop - start)
    length, period = longest_repetition(np.array(tokens, np.int64))
    assert length == best
    assert (period == 0) == (best == 0)


def test_steps_run_twice_change_no_number(tiny_config, tmp_path):
    """A healthy run passes, and its numbers equal those of a run without the check."""
    train(tiny_config, tmp_path / "once")
    train(change(tiny_config, train={"replay_check": 1}), tmp_path / "twice")
    assert numbers(tmp_path / "twice") == numbers(tmp_path / "once")
    assert snapshot(tmp_path / "twice").keys() >= {"checkpoints/12"}


def test_a_flipped_bit_ends_the_run_before_it_is_saved(tiny_config, tmp_path):
    """On four devices; the error is one line, with the leaves and the checkpoint to resume from."""
    config = change(tiny_config, train={"replay_check": 5}, mesh={"data": 4})
    hooks = QUICK._replace(wrap_step=corrupt_second_run(10))
    with pytest.raises(OSError, match="silent data corruption") as error:
        train(config, tmp_path / "run", hooks=hooks)
    message = str(error.value)
    assert "step 10 gave other bits when it was run again" in message
    assert "params/" in message
    assert "resume from the checkpoint of step 5" in message
    assert "\n" not in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
    steps, events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert events[-1]["event"] == "replay_mismatch"
    assert events[-1]["step"] == 10
    assert any(leaf.startswith("params/") for leaf in events[-1]["leaves"])


def test_a_bad_micro_batch_is_found(tiny_config, tmp_path):
    """The skipped step is bad again, and the row with the fault is listed first."""
    config = change(tiny_config, train={"stop_after": 7})
    faults = Faults(nan_micro_batch_step=6)
    train(config, tmp_path / "run", faults=faults)
    result = replay(tmp_path / "run", 6, with_faults(faults))
    assert result["reproduces"] is True
    assert result["metrics"]["skipped"] == 1
    assert [np.isfinite(part["loss"]) for part in result["micro_batches"]] == [False, True]
    assert result["rows"][0]["row"] == 0
    assert np.isnan(result["rows"][0]["nll"])
    assert all(np.isfinite(row["nll"]) for row in result["rows"][1:])
    assert all(layer["update_norm"] == 0 for layer in result["layers"])


def test_a_damaged_checkpoint_is_passed_over(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    record = next((tmp_path / "run" / "checkpoints" / "7").glob("record/*"))
    record.write_bytes(record.read_bytes()[:-1])
    before = snapshot(tmp_path / "run")
    result = replay(tmp_path / "run", 9)
    assert (result["from_step"], result["reproduces"]) == (5, True)
    assert "checkpoint 7 is damaged" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before
    for step in (5, 7):  # nothing is whole before step 9: from the start, then
        manifest = tmp_path / "run" / "checkpoints" / str(step) / "manifest.json"
        manifest.write_text("")
    result = replay(tmp_path / "run", 9)
    assert (result["from_step"], result["reproduces"]) == (0, True)
    assert "going back to the start of the run" in capsys.readouterr().err


def test_a_run_that_began_with_other_weights_is_replayed_from_those(run_dir, tiny_config, tmp_path):
    """A warm-started run replays from the initial weights that it read, even if the source has newer checkpoints."""
    shutil.copytree(run_dir, tmp_path / "source")
    for step in (10, 12):
        shutil.move(tmp_path / "source" / "checkpoints" / str(step), tmp_path / str(step))
    train(change(tiny_config, train={"init_from": str(tmp_path / "source"), "stop_after": 3}), tmp_path / "run")
    for step in (10, 12):
        shutil.move(tmp_path / str(step), tmp_path / "source" / "checkpoints" / str(step))
    result = replay(tmp_path / "run", 2)
    assert (result["from_step"], result["reproduces"]) == (0, True)
    assert result["metrics"]["loss"] < 5
