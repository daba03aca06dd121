"""Resuming with other settings and from other places: what a run may change, and what it says about it."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import assert_same_bits, change, numbers, state_of, train

import jaxtrain
from jaxtrain.cli import main
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.training.run import (
    check_fingerprint,
    environment,
    environment_changes,
    fingerprint,
    open_run,
    restore_run_params,
)
from jaxtrain.training.run_folder import check_or_write_config, write_config


@pytest.fixture(scope="module")
def begun(tiny_config, tmp_path_factory):
    """A run stopped after 6 of 12 steps; tests work on copies."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    train(change(tiny_config, train={"stop_after": 6}), folder)
    return folder


@pytest.fixture
def run_dir(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def events_of(run_dir, name):
    return [event for event in read_metrics(run_dir / "metrics.jsonl")[1] if event["event"] == name]


CHANGES = {
    "a longer cosine": ({"train": {"steps": 20}}, {"train.steps": (12, 20)}),
    "the learning rate": ({"optim": {"peak_lr": 0.005}}, {"optim.peak_lr": (0.01, 0.005)}),
    "the schedule": ({"optim": {"schedule": "constant"}}, {"optim.schedule": ("cosine", "constant")}),
    "the batch": ({"train": {"batch_size": 16}}, {"train.batch_size": (8, 16)}),
    "micro-batches": ({"train": {"accumulate": 1}}, {"train.accumulate": (2, 1)}),
    "clipping and the guard": (
        {"optim": {"clip_norm": 0.5}, "guard": {"sigmas": None}},
        {"optim.clip_norm": (1.0, 0.5), "guard.sigmas": (6.0, None)},
    ),
}


def test_settings_change_on_resume_with_the_flag_alone(run_dir, tiny_config):
    """Each change alone is refused without the flag; with it, the run takes all of them."""
    before, config, expected = (run_dir / "config.json").read_bytes(), tiny_config, {}
    for name, (sections, changes) in CHANGES.items():
        with pytest.raises(ValueError, match=r"--allow-change.*--train\.init-from") as error:
            train(change(tiny_config, **sections), run_dir)
        assert all(f"{key}: {old!r} -> {new!r}" in str(error.value) for key, (old, new) in changes.items()), name
        assert (run_dir / "config.json").read_bytes() == before, name
        config, expected = change(config, **sections), expected | changes
    lines = numbers(run_dir)
    train(config, run_dir, allow_change=True)
    (event,) = events_of(run_dir, "config_change")
    assert event["step"] == 6
    assert {key: (value["old"], value["new"]) for key, value in event["changes"].items()} == expected
    assert numbers(run_dir)[:6] == lines
    assert numbers(run_dir)[-1]["step"] == config.train.steps
    assert open_run(run_dir).config.optim == config.optim
    train(config, run_dir)  # from now on this is the config of the run
    assert len(events_of(run_dir, "config_change")) == 1


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"model": {"d_model": 32}}, "model.d_model: 16 -> 32"),
        ({"model": {"logit_softcap": 5.0}}, "model.logit_softcap: None -> 5.0"),
        ({"optim": {"mu_dtype": "bfloat16"}}, "optim.mu_dtype: 'float32' -> 'bfloat16'"),
        ({"optim": {"clipping": "zclip"}}, "optim.clipping: 'global_norm' -> 'zclip'"),
        ({"guard": {"window": 8}}, "guard.window: 128 -> 8"),
        ({"train": {"precision": "float16"}}, "train.precision: 'float32' -> 'float16'"),
    ],
)
def test_fields_that_shape_the_state_never_change(sections, line, run_dir, tiny_config):
    for allow in (False, True):
        with pytest.raises(ValueError, match=r"--train\.init-from") as error:
            train(change(tiny_config, **sections), run_dir, allow_change=allow)
        assert line in str(error.value)
        assert "--allow-change" not in str(error.value)


CONSTANT = {"schedule": "constant"}
WSD = {"schedule": "wsd", "decay_steps": 4}
EXTENSIONS = {
    "constant, after its end": (CONSTANT, None, CONSTANT),
    "the plateau of wsd, with a longer decay": (WSD, 6, WSD | {"decay_steps": 9}),
}


@pytest.mark.parametrize(("optim", "stop", "later"), EXTENSIONS.values(), ids=EXTENSIONS)
def test_extending_needs_no_flag_where_past_learning_rates_stay(optim, stop, later, tiny_config, tmp_path):
    first = change(tiny_config, optim=optim, train={"stop_after": stop})
    longer = change(tiny_config, optim=later, train={"steps": 18})
    train(first, tmp_path / "run")
    if optim == WSD:  # in its decay it is refused
        shutil.copytree(tmp_path / "run", tmp_path / "decay")
        train(change(first, train={"stop_after": 10}), tmp_path / "decay")
        with pytest.raises(ValueError, match=r"train\.steps: 12 -> 18"):
            train(change(first, train={"steps": 18, "stop_after": None}), tmp_path / "decay")
    train(longer, tmp_path / "run")
    train(longer, tmp_path / "straight")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    assert_same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))
    assert events_of(tmp_path / "run", "config_change")


def test_a_cosine_is_not_extended_without_the_flag(run_dir, tiny_config):
    with pytest.raises(ValueError, match=r"train\.steps: 12 -> 18"):
        train(change(tiny_config, train={"steps": 18}), run_dir)


def test_paths_are_compared_by_their_target(run_dir, tiny_config, store, tmp_path, monkeypatch):
    """Another spelling of the path, another working directory, and a store that was moved."""
    train(change(tiny_config, data={"store": f"{store}/../{store.name}/"}, train={"stop_after": 7}), run_dir)
    shutil.copytree(store, tmp_path / "elsewhere" / "tok")
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(change(tiny_config, data={"store": "./tok/"}, train={"stop_after": 8}), run_dir)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(run_dir), "--batches", "1"]) == 0  # from another working directory
    (tmp_path / "elsewhere" / "tok").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no token store at .*tok.*--data\.store"):
        open_run(run_dir)
    assert open_run(run_dir, store=str(tmp_path / "moved")).store.vocab_size == 257
    assert train(change(tiny_config, data={"store": "moved"}), run_dir)["reason"] == "finished"


def test_a_run_is_compared_with_what_made_its_steps(run_dir):
    """Another decay mask is refused; step 6 was made by the attempt before the one that resumed from step 6."""
    run = open_run(run_dir)
    saved = fingerprint(run)
    check_fingerprint(run, saved, 6)
    with pytest.raises(ValueError, match=rf"another decay mask \(it differs for {saved['decay_mask'][0]}\)"):
        check_fingerprint(run, saved | {"decay_mask": saved["decay_mask"][1:]}, 6)
    start = {"event": "start", "step": 0, **environment(run)}
    events = [start, start | {"event": "resume", "step": 6, "devices": 99}]
    assert [environment_changes(run, events, step) for step in (6, 7)] == [{}, {"devices": (99, 1)}]


def test_a_run_of_more_devices_opens_on_these(run_dir):
    """Eight rows in two micro-batches: each is sharded over four of the eight devices here."""
    file = run_dir / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mesh": {"data": 16, "fsdp": 1, "tensor": 1}}))
    assert dict(open_run(run_dir).program.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1}


def test_other_data_is_refused(run_dir, tiny_config, corpus, tmp_path):
    prepare([str(corpus)], tmp_path / "other", validation_fraction=0.5, progress=False)
    with pytest.raises(ValueError, match=r"other data than .*other holds \(fingerprint \w{12}, not \w{12}\)"):
        train(change(tiny_config, data={"store": str(tmp_path / "other")}), run_dir)
    assert open_run(run_dir).config.data.store != str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other data than .*other holds \(fingerprint \w{12}, not \w{12}\)"):
        restore_run_params(open_run(run_dir, store=str(tmp_path / "other")))


def test_a_run_directory_is_all_that_a_loaded_model_needs(run_dir, tiny_config, store, tmp_path, monkeypatch):
    """`jaxtrain.load` of a run whose store is gone: parameters, logits, loss and text."""
    config = (run_dir / "config.json").read_text()
    (run_dir / "config.json").write_text(config.replace(str(store), str(tmp_path / "gone")))
    model = jaxtrain.load(run_dir)
    assert (model.step, model.config.train.steps) == (6, 12)
    tokens = np.array([model.tokenizer.encode("1 + 2 = 3")], np.int32)
    logits = model.logits(tokens)
    assert logits.shape == (1, tokens.shape[1], 257)
    labels = np.roll(tokens, -1, axis=1)
    sums = model.loss({"inputs": tokens, "labels": labels, "where": np.ones(tokens.shape, bool)})
    expected = -jax.nn.log_softmax(logits)[0, np.arange(tokens.shape[1]), labels[0]].sum()
    np.testing.assert_allclose(sums.nll, expected, rtol=1e-5)
    assert model.generate("1 + 2", 5, seed=3) == model.generate("1 + 2", 5, seed=3)
    assert main(["generate", str(run_dir), "--prompt", "1 +", "--num-tokens", "4"]) == 0


def test_the_package_names_its_parts_lazily():
    assert set(jaxtrain.__all__) <= set(dir(jaxtrain))
    assert all(getattr(jaxtrain, name) for name in jaxtrain.__all__)
    assert jaxtrain.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        jaxtrain.lode  # noqa: B018


ENVIRONMENTS = {
    "another jax": {"jax": "0.9.9"},
    "another device": {"device": "TPU v9"},
    "more devices and processes": {"devices": 64, "processes": 8},
    "none": {},
    "a record without them": {"jax": None, "device": None},
}


@pytest.mark.parametrize("before", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_another_environment_is_announced(before, run_dir, tiny_config, capsys):
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (start,) = [line for line in lines if line.get("event") == "start"]
    now = {name: start[name] for name in before}
    for name, value in before.items():
        start.pop(name) if value is None else start.update({name: value})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    train(change(tiny_config, train={"stop_after": 8}), run_dir)
    said = capsys.readouterr().out
    expected = {name: {"old": value, "new": now[name]} for name, value in before.items() if value is not None}
    assert [event["changes"] for event in events_of(run_dir, "environment_change")] == ([expected] if expected else [])
    for name, value in expected.items():
        assert f"{name}: {value['old']!r} -> {value['new']!r}" in said
    assert said.count("another environment from step 7 on: ") == bool(expected)
    train(tiny_config, run_dir)
    assert len(events_of(run_dir, "environment_change")) == bool(expected)  # step 8 was made here


def test_a_log_that_ends_before_the_checkpoint_is_reported(run_dir, tiny_config, capsys):
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line).get("step") in (None, 0, 1, 2, 3)))
    train(change(tiny_config, train={"stop_after": 7}), run_dir)
    assert "metrics.jsonl ends at step 3: the lines up to step 6 are lost" in capsys.readouterr().out
    train(tiny_config, run_dir)
    assert [event["last_line"] for event in events_of(run_dir, "log_lost")] == [3]  # told once


def test_the_error_lists_what_the_user_has_changed(tiny_config, tmp_path):
    """The warm-up in steps follows from train.steps where it is a share of them."""
    config = change(tiny_config, optim={"warmup_steps": None, "warmup_fraction": 0.25})
    write_config(tmp_path, config)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(ValueError, match="with another config") as error:
        check_or_write_config(tmp_path, change(config, train={"steps": 24}), 5)
    assert str(error.value).splitlines()[1:] == ["  train.steps: 12 -> 24"]
    with pytest.raises(ValueError, match=r"optim\.warmup_steps: 3 -> 6"):
        check_or_write_config(tmp_path, change(config, optim={"warmup_fraction": 0.5}), 5)
