"""The training loop: its records, its progress, and that a stop and a resume change no bit."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from helpers import LIMIT, start, wait_until
from runs import assert_same_bits, change, numbers, state_of, train

from jaxtrain.config import DataConfig, MeshConfig
from jaxtrain.data.store import open_store
from jaxtrain.data.tokenizer import load_tokenizer
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import from_json, to_json
from jaxtrain.training.run import assemble, open_run
from jaxtrain.training.start import start_table


def with_train(config, **fields):
    return change(config, train=fields)


def on_devices(config, num_devices):
    return change(config, mesh={"data": num_devices})


@pytest.fixture(scope="module")
def whole_run(tiny_config, tmp_path_factory):
    """Trains an undisturbed run with evaluations and a sample."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = with_train(tiny_config, steps=40, eval_every=20, eval_batches=1, sample_tokens=20, sample_prompt="1 +")
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=15, keep=2))
    outcome = train(config, folder, report=True)
    return folder, config, outcome


def test_a_run_writes_the_documented_files(whole_run):
    folder, config, outcome = whole_run
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "tokenizer.json", "metrics.jsonl", "checkpoints", "report.html", "sample.txt")
    }
    assert from_json((folder / "config.json").read_text()) == config
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["30", "40"]
    steps, events = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in steps] == list(range(1, 41))
    contract = "loss nll z_loss grad_norm clip_factor update_norm param_norm learning_rate tokens"
    contract += " skipped skip_reason give_up"
    contract += " step steps clipped grad_norm_max tokens_seen tokens_per_second step_seconds attempt"
    assert all(set(line) == set(contract.split()) for line in steps)
    assert steps[-1]["tokens_seen"] == 40 * 8 * 16
    kinds = [event["event"] for event in events if event["event"] != "saved"]
    assert kinds == ["start", "compile", "save", "eval", "save", "save", "eval", "stop"]
    assert (outcome["reason"], outcome["skipped_steps"]) == ("finished", 0)
    assert (folder / "sample.txt").read_text().startswith("1 +")


def test_a_run_learns_and_logs_the_learning_rate_it_applied(whole_run):
    folder, config, outcome = whole_run
    steps, _ = read_metrics(folder / "metrics.jsonl")
    assert steps[0]["nll"] > 5.3  # ln 257 = 5.55
    assert outcome["evaluation"]["nll"] < 3.5
    rates = [line["learning_rate"] for line in steps]
    np.testing.assert_allclose(rates[:3], [config.optim.peak_lr * t / 3 for t in (1, 2, 3)], rtol=1e-6)
    np.testing.assert_allclose(rates[-1], config.optim.peak_lr * config.optim.floor, rtol=1e-6)


def test_bits_per_byte_stand_beside_gzip_and_xz(whole_run):
    folder, _, outcome = whole_run
    evaluation = outcome["evaluation"]
    validation = open_run(folder).store.validation
    assert evaluation["tokens"] == validation.num_tokens - 1
    bits = evaluation["nll"] * evaluation["tokens"] / np.log(2)
    np.testing.assert_allclose(evaluation["bits_per_byte"], bits / validation.num_bytes, rtol=1e-9)
    assert 0.5 < evaluation["gzip_bits_per_byte"] < 8
    assert 0.5 < evaluation["xz_bits_per_byte"] < 8


def test_a_finished_run_trains_no_further(whole_run):
    folder, config, outcome = whole_run
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(config, folder) == outcome
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_the_same_command_again_stops_where_it_stopped(tiny_config, tmp_path):
    config = with_train(tiny_config, stop_after=2)
    for _ in range(2):
        assert train(config, tmp_path / "run") == {"step": 2, "reason": "stop_after", "skipped_steps": 0}
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2]


def command(config_file, run_dir, *flags):
    return [sys.executable, "-m", "jaxtrain.cli", "train", str(config_file), "--run-dir", str(run_dir), *flags]


def environment(num_devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={num_devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONWARNINGS": "default"}


def test_stopping_twice_in_an_epoch_and_resuming_gives_the_same_bits(tiny_config, tmp_path):
    """Every leaf of the state and every number of every line, on four devices.

    The drills of tests/checkpoints resume in a process of its own.
    """
    config = on_devices(tiny_config, 4)
    for folder, stops in (("whole", [None]), ("parts", [4, 9, None])):
        for stop in stops:
            train(with_train(config, stop_after=stop), tmp_path / folder)
    tokens_seen = [line["tokens_seen"] for line in numbers(tmp_path / "parts")]
    epoch = open_run(tmp_path / "parts").store.train.num_tokens
    assert tokens_seen[8] < epoch  # both restarts lie inside the first
    assert len(tokens_seen) == 12
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert_same_bits(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    attempts = [line["attempt"] for line in read_metrics(tmp_path / "parts" / "metrics.jsonl")[0]]
    assert attempts == [1] * 4 + [2] * 5 + [3] * 3


def test_sigterm_saves_and_the_run_resumes_with_the_same_numbers(tiny_config, tmp_path):
    config = with_train(tiny_config, steps=100_000)  # too many to end before the signal
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    process = start(command(file, tmp_path / "run"), env=environment(1), stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and read_metrics(metrics)[0], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=LIMIT) == 128 + signal.SIGTERM
    _, events = read_metrics(metrics)
    assert events[-1]["event"] == "stop"
    assert events[-1]["reason"] == "SIGTERM"
    stopped = events[-1]["step"]
    assert stopped > 0
    assert int(state_of(tmp_path / "run").step) == stopped
    config = with_train(config, stop_after=stopped + 2)
    train(config, tmp_path / "run")
    train(config, tmp_path / "undisturbed")
    assert len(numbers(tmp_path / "run")) == stopped + 2
    assert numbers(tmp_path / "run") == numbers(tmp_path / "undisturbed")


@pytest.mark.slow  # quick sibling: test_program.py
def test_the_numbers_do_not_depend_on_micro_batches_or_devices(tiny_config, tmp_path):
    reference = None
    for devices, accumulate in ((1, 1), (4, 2)):
        folder = tmp_path / f"{devices}-{accumulate}"
        train(on_devices(with_train(tiny_config, accumulate=accumulate), devices), folder)
        lines = numbers(folder)
        reference = reference or lines
        for line, expected in zip(lines, reference, strict=True):
            for key in ("loss", "nll", "grad_norm", "param_norm", "clip_factor"):
                np.testing.assert_allclose(line[key], expected[key], rtol=1e-4)


def test_prefetch_depth_changes_nothing(tiny_config, tmp_path):
    for depth in (1, 7):
        data = dataclasses.replace(tiny_config.data, prefetch=depth)
        train(dataclasses.replace(tiny_config, data=data), tmp_path / str(depth))
    assert numbers(tmp_path / "1") == numbers(tmp_path / "7")


def test_a_folder_keeps_its_config(tiny_config, tmp_path):
    train(with_train(tiny_config, stop_after=2), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"optim\.peak_lr: 0\.01 -> 0\.02"):
        train(
            dataclasses.replace(tiny_config, optim=dataclasses.replace(tiny_config.optim, peak_lr=0.02)),
            tmp_path / "run",
        )
    assert (tmp_path / "run" / "config.json").read_text() == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("")
    with pytest.raises(ValueError, match=r"no run directory.*chapter1\.tex"):
        train(tiny_config, tmp_path / "thesis")


def test_a_run_that_never_began_may_be_mended(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="not divisible"):
        train(on_devices(tiny_config, 8), tmp_path / "run")
    train(with_train(tiny_config, stop_after=2), tmp_path / "run")
    assert open_run(tmp_path / "run").config.mesh.data == 1


def test_a_store_made_in_the_run_directory_serves_when_the_text_is_gone(tiny_config, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 200)
    config = dataclasses.replace(tiny_config, data=DataConfig(sources=(str(text),)))
    train(with_train(config, stop_after=1), tmp_path / "run")
    text.unlink()
    assert train(with_train(config, stop_after=2), tmp_path / "run")["step"] == 2


def test_a_config_names_the_end_of_text_token(tiny_config, corpus, tmp_path):
    """The tokenizer file has none of the usual names, like BERT's; the remedy of the error works."""
    words = [*(f"word{i}" for i in range(255)), "[UNK]", "[SEP]"]  # as many as bytes, for a shared program
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    fields = {"store": None, "sources": (str(corpus),), "tokenizer": f"hf:{tmp_path / 'words.json'}"}
    config = change(tiny_config, data=fields, train={"stop_after": 1})
    with pytest.raises(ValueError, match=r"data\.eot in a config"):
        train(config, tmp_path / "run")
    train(change(config, data={"eot": "[SEP]"}), tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").eot_text == "[SEP]"


def test_a_batch_that_does_not_divide_is_an_error_with_the_arithmetic(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size 8 is not divisible by .* 2 x 8 devices along .* = 16"):
        train(on_devices(tiny_config, 8), tmp_path / "run")


def test_metrics_are_json_for_any_reader(whole_run):
    folder, _, _ = whole_run
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_start_table_shows_the_memory_of_one_device(tiny_config, tmp_path):
    held = {}
    for name, mesh in (("whole", MeshConfig(data=1)), ("parts", MeshConfig(data=2, fsdp=2))):
        config = dataclasses.replace(tiny_config, mesh=mesh)
        run = assemble(config, tmp_path / name, open_store(config.data.store))
        held[name] = dict(start_table(run))
    num_params = held["whole"]["parameters"].split(",computing")[0]
    assert held["parts"]["parameters"].startswith(num_params)
    assert held["parts"]["devices"] == "4 x cpu: data 2 x fsdp 2"
    assert held["whole"]["devices"] == "1 x cpu"
    # All but the norms' scales (5 x 16 numbers) is halved.
    kilobytes = [float(row["memory per device"].split()[1]) for row in held.values()]
    assert kilobytes[1] - 0.32 == pytest.approx((kilobytes[0] - 0.32) / 2, abs=0.02)
